"""Options of `g2l distill` by name: from the command line, a recipe, or a sweep; unknown ones are refused."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2l_core.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from pipeline.distill import DistillSettings

RECIPES = Path(__file__).parent / "configs"

_RENAMED = {"early_stop": "early_stop_patience"}
"""Options whose name is not that of the setting."""

_LENGTH = ("steps", "epochs")
EPOCHS = 10
NAMES = ("teacher", "student", "weights")
"""Who is distilled from whom: options, but no settings."""


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def find_recipe(given: str, folder: str = "") -> Path:
    """A file, or a shipped recipe by its name.

    Raises:
        UnknownNameError: It is neither.
    """
    shipped = {path.stem: path for path in sorted((RECIPES / folder).glob("*.toml"))}
    if given in shipped:
        return shipped[given]
    if Path(given).is_file():
        return Path(given)
    raise UnknownNameError("recipe", given, shipped, "Or give a TOML file.")


def read_recipe(given: str) -> dict[str, Any]:
    """The options that a recipe sets, by name.

    Raises:
        UsageError: It cannot be read, or sets something that is no option.
    """
    path = find_recipe(given)
    options = read_toml(path)
    require_known(options, path)
    return options


def require_known(options: Mapping[str, Any], path: Path) -> None:
    """Refuse what is no option of `g2l distill`.

    Raises:
        UnknownNameError: Names it, and the nearest.
    """
    for name in options:
        if name not in option_names():
            raise UnknownNameError(f"option in {path}", name, option_names())


def option_names() -> list[str]:
    """Every option that decides a student."""
    from g2l_core.distillation.spec import ObjectiveSpec, OptimSpec, TrainSettings
    from pipeline.distill import DistillSettings

    back = {theirs: ours for ours, theirs in _RENAMED.items()}
    parts = {"objective", "optim", "train", "steps"}
    kinds = (ObjectiveSpec, OptimSpec, TrainSettings, DistillSettings)
    found = [back.get(f.name, f.name) for kind in kinds for f in fields(kind) if f.name not in parts]
    return [*NAMES, *found, *_LENGTH]


def settings_of(options: Mapping[str, Any]) -> "tuple[DistillSettings, int | None]":
    """The settings that options mean, and the epochs where no number of steps is given.

    Args:
        options: By name; those that are None or absent have their defaults.

    Raises:
        UsageError: A value cannot be used.
    """
    from g2l_core.distillation.spec import ObjectiveSpec, OptimSpec, TrainSettings
    from pipeline.distill import DistillSettings

    given = {_RENAMED.get(name, name): value for name, value in options.items() if value is not None}
    if "where" in given:
        given["where"] = tuple(given["where"])

    def of(kind: type) -> dict[str, Any]:
        return {f.name: given[f.name] for f in fields(kind) if f.name in given}

    steps = given.pop("steps", None)
    try:
        train = TrainSettings(
            **of(TrainSettings),
            steps=steps or 1,
            objective=ObjectiveSpec(**of(ObjectiveSpec)),
            optim=OptimSpec(**of(OptimSpec)),
        )
        settings = DistillSettings(**of(DistillSettings), train=train)
    except TypeError as error:
        raise UsageError(f"an option has a value of the wrong kind: {error}") from error
    return settings, None if steps else given.get("epochs", EPOCHS)
