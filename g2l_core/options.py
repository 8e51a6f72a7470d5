"""What a setting is called, what it does and which values it takes, said once: beside the dataclass field.

The command line, recipes, sweeps and the reference of all options are made from these fields.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any

KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """How users see a field."""

    help: str
    panel: str = ""
    """The group that the option stands in on help pages."""
    name: str = ""
    """The option's name, where it is not the field's."""
    aliases: tuple[str, ...] = ()
    """Former names, which still work and are not shown."""
    min: float | None = None
    """The smallest value that the command line takes."""
    parse: Callable[[str], Any] | None = None
    """Reads the value from one text, where a field is no plain value."""
    recipe_only: bool = False
    """Recipes and sweeps can set it; the command line has no option for it."""


def option(default: Any = MISSING, **facts: Any) -> Any:
    """A dataclass field that users can set; `facts` are the fields of `Option`."""
    return field(default=default, metadata={KEY: Option(**facts)})
