"""Which objects of a QuPath export count as tissue, by their type and class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from g2l_core.errors import UsageError

SUBTRACTED = (
    "ignore*", "exclude*", "artefact*", "artifact*", "pen", "pen *", "background*", "fold", "folds", "fold *",
    "tissue fold*", "necrosis*", "necrotic*",
)  # fmt: skip
"""Classes whose areas are taken away unless they are asked for, in lower case."""

IGNORED_ENDING = "*"
"""QuPath measures nothing in classes that end so, such as Region*. Their areas neither count nor are taken away."""

_OLD_TYPES = {"PathAnnotationObject": "annotation", "PathCellObject": "cell", "PathDetectionObject": "detection"}


class Use(Enum):
    """What is done with an area."""

    COUNT = "count"
    SUBTRACT = "subtract"
    LEAVE = "leave"


@dataclass(frozen=True, kw_only=True)
class ClassChoice:
    """The classes that are asked for and those that are left out, without regard to case; they may be patterns."""

    wanted: tuple[str, ...] = ()
    """Only these count; empty means all that are not left out."""
    unwanted: tuple[str, ...] = ()
    """The areas of these are taken away, besides those of `SUBTRACTED`."""

    @classmethod
    def parse(cls, text: str) -> "ClassChoice":
        """Read `Tumor,Stroma` or `!Necrosis`, or both together.

        Raises:
            UsageError: A name is empty, or stands on both sides.
        """
        names = [name.strip() for name in text.split(",")] if text else []
        wanted = tuple(sorted({name for name in names if not name.startswith("!")}))
        unwanted = tuple(sorted({name[1:].strip() for name in names if name.startswith("!")}))
        if "" in wanted or "" in unwanted or {*wanted} & {*unwanted}:
            raise UsageError(
                f"{text!r}: expected classes by comma, such as Tumor,Stroma, with ! before those to leave out"
            )
        return cls(wanted=wanted, unwanted=unwanted)

    def __str__(self) -> str:
        return ",".join([*self.wanted, *(f"!{name}" for name in self.unwanted)])

    def use_of(self, name: str) -> Use:
        """What is done with areas of a class. A derived class, `Tumor: Positive`, is also its first part."""
        if _fits(name, self.unwanted):
            return Use.SUBTRACT
        if _fits(name, self.wanted):
            return Use.COUNT
        if _fits(name, SUBTRACTED):
            return Use.SUBTRACT
        return Use.LEAVE if self.wanted or name.endswith(IGNORED_ENDING) else Use.COUNT


def _fits(name: str, patterns: Sequence[str]) -> bool:
    names = {name.lower(), name.partition(":")[0].strip().lower()}
    return any(fnmatchcase(one, pattern.lower()) or one == pattern.lower() for one in names for pattern in patterns)


def object_type(feature: Mapping[str, Any]) -> str:
    """The type of a QuPath object; `annotation` where the file says nothing."""
    properties = feature.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    kind = known.get("objectType") or known.get("object_type") or _OLD_TYPES.get(str(feature.get("id")), "annotation")
    return str(kind).lower()


def class_name(feature: Mapping[str, Any]) -> str:
    """The QuPath class of a feature, empty if it has none. The names of a derived class are joined by `: `."""
    properties = feature.get("properties")
    kind = properties.get("classification") if isinstance(properties, Mapping) else None
    if not isinstance(kind, Mapping):
        return str(kind or "")
    return str(kind.get("name") or ": ".join(kind.get("names", ())))
