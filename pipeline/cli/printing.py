"""What commands print: for people, broken between words on a terminal, or as JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from pipeline.tables import at_words

SHOWN = 20
"""What is left out that is named line by line."""


def show(text: str, *, err: bool = False) -> None:
    """Print text for people on stdout or stderr."""
    typer.echo(at_words(text, sys.stderr if err else sys.stdout), err=err)


def tell(text: str, facts: Mapping[str, Any], *, as_json: bool, dry_run: bool | None = None, then: str = "") -> None:
    """Print what a command did: for people, or as JSON.

    Args:
        text: For people.
        facts: For programs.
        as_json: Which of them is printed.
        dry_run: Whether nothing was changed; None for commands that cannot be asked for that.
        then: The command that most people call next.
    """
    if as_json:
        facts = facts if dry_run is None else {**facts, "dry_run": dry_run}
        typer.echo(json.dumps(facts, indent=1, default=str))
        return
    show(text + ("; nothing is changed, as --dry-run asks" if dry_run else ""))
    if then and not dry_run:
        show_next(then)


def show_next(command: str) -> None:
    """The last line of a command: the one that most people call next."""
    show(f"next: {command}")


def list_left_out(left_out: Mapping[str, str]) -> None:
    """Name on stderr what was left out, with the reason."""
    lines: Sequence[str] = [f"left out  {name}: {reason}" for name, reason in left_out.items()]
    for line in lines[:SHOWN]:
        show(line, err=True)
    if len(lines) > SHOWN:
        show(f"left out  and {len(lines) - SHOWN:,} more", err=True)
