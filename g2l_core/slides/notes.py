"""What is not as expected about a slide that is read all the same."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Note:
    """One such thing."""

    text: str
    """The same for every slide that has it, so that a cohort's can be counted."""
    detail: str = ""
    """What it is on this slide."""
