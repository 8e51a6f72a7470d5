"""Recipes and sweeps: TOML files of the options of `g2l distill`, checked against the specs that declare them."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from g2l_core.encoders.resolve import normalized
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.files import parse_toml
from g2l_core.options import Entry, build, entries
from pipeline.settings import DistillSettings, Recipe

RECIPES = Path(__file__).parent / "configs"
NAMES = ("teacher", "student", "weights")
"""Who is distilled from whom: options that a recipe can set and a sweep cannot."""

OPTIONS: Mapping[str, Entry] = {entry.name: entry for entry in entries(Recipe)}
"""What decides a student."""

_WORDS = {
    str: ("text", "text"), int: ("a whole number", "whole numbers"), float: ("a number", "numbers"),
    Path: ("a path", "paths"), bool: ("true or false", "true or false"),
}  # fmt: skip
"""The word for a value, and for several."""


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def find_recipe(name: str, folder: str = "") -> Path:
    """A file, or a shipped recipe by its name.

    Raises:
        UnknownNameError: It is neither.
    """
    shipped = {path.stem: path for path in sorted((RECIPES / folder).glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError("recipe", name, shipped, "Or give a TOML file.")


def read_recipe(name: str) -> dict[str, Any]:
    """The options that a recipe sets, by name.

    Raises:
        UsageError: It cannot be read, sets something that is no option, or has a value of the wrong kind.
    """
    path = find_recipe(name)
    return {key: check_option(key, value, path) for key, value in read_toml(path).items()}


def check_option(name: str, value: object, path: Path) -> Any:
    """The value of an option of `g2l distill` as its spec declares it.

    Raises:
        UnknownNameError: There is no such option; the message names the nearest.
        UsageError: The value is of another kind.
    """
    if name not in (*NAMES, *OPTIONS):
        raise UnknownNameError(f"option in {path}", name, (*NAMES, *OPTIONS))
    kind = OPTIONS[name].kind if name in OPTIONS else str
    if name == "teacher" and isinstance(value, list):  # several, in a recipe or as a set in a sweep
        kind = tuple[str, ...]
    return check_kind(f"{path}: {name}", value, kind)


def check_kind(where: str, value: object, kind: Any) -> Any:
    """A value of TOML as an option of this kind holds it: a list as a tuple, hold_out = 0.1 as a text.

    Raises:
        UsageError: The value is of another kind; `where` begins the message.
    """
    from pydantic import TypeAdapter, ValidationError

    plain = tuple(value) if isinstance(value, list) else value
    if kind is str and type(value) in {int, float}:
        plain = str(value)
    try:
        return TypeAdapter(kind).validate_python(plain, strict=Path not in {kind, *get_args(kind)})
    except ValidationError:
        raise UsageError(f"{where} must be {describe_kind(kind)}, not {value!r}") from None


def weights_by_encoder(names: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """The weights that a user gives encoders: ENCODER=WEIGHTS for each, or WEIGHTS alone where there is one encoder.

    Args:
        names: The encoders as the user names them.
        texts: What stands in place of their own weights.

    Raises:
        UsageError: A text names no encoder of these, or two are for one encoder.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, weights = text.partition("=")
        meant = [known for known in names if normalized(known) == normalized(name)] if weights else []
        if not meant and len(names) != 1:
            raise UsageError(
                f"--weights {text}: expected ENCODER=WEIGHTS, as there are several encoders: {', '.join(names)}"
            )
        encoder, weights = (meant[0], weights) if meant else (names[0], text)
        if encoder in found:
            raise UsageError(f"--weights gives {encoder} two: leave one out")
        found[encoder] = weights
    return found


def describe_kind(kind: Any) -> str:
    """A type as the word for its values in TOML: `tuple[int, ...]` is a list of whole numbers."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(str(choice.value) for choice in kind)
    if get_origin(kind) in {tuple, list}:
        return f"a list of {_WORDS[get_args(kind)[0]][1]}"
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    return _WORDS[kind][0] if kind in _WORDS else " or ".join(map(describe_kind, choices))


def settings_of(options: Mapping[str, Any]) -> tuple[DistillSettings, int | None]:
    """The settings that options mean, and the epochs where no number of steps is given.

    Args:
        options: By name; those that are None or absent have their defaults.

    Raises:
        UsageError: A value cannot be used.
    """
    recipe = build(Recipe, {**options, "steps": options.get("steps") or 1})
    return recipe.settings, None if options.get("steps") else recipe.epochs
