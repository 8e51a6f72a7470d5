"""What a setting is called, what it does and which values it takes, said once: beside the dataclass field.

The command line, recipes, sweeps and the reference of all options are made from these fields.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_origin, get_type_hints

KEY = "option"
SLIDES, PATCHES, ENCODER, DATA, LOSS, OPTIMIZER, TRAINING, MACHINE, OUTPUT = PANELS = (
    "Slides", "Patches", "Encoder", "Data", "Loss", "Optimizer", "Training", "Machine", "Output",
)  # fmt: skip
"""The groups of options on help pages, in their order there."""

Spec = TypeVar("Spec")


@dataclass(frozen=True, kw_only=True)
class Option:
    """How users see a field."""

    help: str
    panel: str = ""
    """One of `PANELS`; empty for the first, unnamed one."""
    name: str = ""
    """The option's name, where it is not the field's."""
    aliases: tuple[str, ...] = ()
    """Former names. They still work and are not shown."""
    min: float | None = None
    """The smallest value that the command line takes."""
    parse: Callable[[str], Any] | None = None
    """Reads the value from one text, where it is no plain value."""
    recipe_only: bool = False
    """Whether it is left out of help pages, since recipes and sweeps alone should set it."""


class Entry(NamedTuple):
    """An option as one field of a spec declares it."""

    name: str
    kind: Any
    """The type of the field."""
    default: Any
    option: Option


def option(default: Any, **facts: Any) -> Any:
    """A dataclass field that users can set; `facts` are the fields of `Option`."""
    return field(default=default, metadata={KEY: Option(**facts)})


@cache
def _kinds(spec: type) -> Mapping[str, Any]:
    return get_type_hints(spec)


def entries(spec: type) -> Iterator[Entry]:
    """The options of a spec and of the specs in it, in the order of their fields."""
    for declared in fields(spec):
        kind, facts = _kinds(spec)[declared.name], declared.metadata.get(KEY)
        if facts:
            yield Entry(facts.name or declared.name, kind, declared.default, facts)
        elif is_dataclass(kind):
            yield from entries(kind)  # type: ignore[arg-type]


def build(spec: type[Spec], values: Mapping[str, Any]) -> Spec:
    """A spec, and the specs in it, from the values of options.

    Args:
        spec: The dataclass.
        values: By option name, of this and of other specs. What is absent or None has its default.

    Raises:
        UsageError: The spec refuses a value.
    """
    dataclass_type: type = spec
    arguments: dict[str, Any] = {}
    for declared in fields(dataclass_type):
        kind, facts = _kinds(dataclass_type)[declared.name], declared.metadata.get(KEY)
        value = values.get((facts and facts.name) or declared.name)
        if is_dataclass(kind):
            arguments[declared.name] = build(kind, values)  # type: ignore[arg-type]
        elif value is not None:
            if facts and facts.parse and isinstance(value, str):
                value = facts.parse(value)
            arguments[declared.name] = tuple(value) if get_origin(kind) is tuple else value
    return spec(**arguments)
