"""What is true of each command after Ctrl-C, where its work does not say more (`pipeline.interruption`)."""

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from types import FrameType
from typing import Any

from pipeline.cli import EXIT_INTERRUPTED
from pipeline.cli.printing import show
from pipeline.interruption import what_is_left

NOTHING = "nothing was written"
BEGINS_AGAIN = f"{NOTHING}; the same command begins again"
WHOLE_OR_NOT = "what it was to write is not there; the same command begins again"

LEFT: Mapping[str, str] = {
    "": NOTHING,
    "cache-teacher": "slides whose patches were found are kept; the same command goes on from there",
    "embed": "slides whose patches were found are kept; the same command goes on from there",
    "distill": "training had not begun; the same command begins again",
    "baseline": "training had not begun; the same command begins again",
    "measure": NOTHING,
    "doctor": NOTHING,
    "sweep": "finished runs are kept, of the one under way its last checkpoint; the same command goes on from there",
    "bench": "no report was written; the same command begins again",
    "plan": BEGINS_AGAIN,
    "models": NOTHING,
    "datasets": "no manifest was written; the same command begins again",
    "export-student": WHOLE_OR_NOT,
    "publish": "a folder that was made is whole, and the hub has all of it or nothing; the folder can be sent again",
    "fit-head": "no head was written; the same command begins again",
    "predict": "features that are recorded are kept; the same command goes on from there",
    "view": WHOLE_OR_NOT,
    "run": "steps that are done are kept; the same command goes on from there",
    "init": f"{NOTHING}; the same command begins again",
    "demo": "the demo does not go on from here: remove its folder, or give another --out",
    "store ls": NOTHING,
    "store info": NOTHING,
    "store du": NOTHING,
    "store verify": f"{NOTHING}; the same command reads everything again",
    "store relocate": "the store is whole, and some slides may be known by their new places; the same command does the "
    "rest",
    "store upgrade": "the store is as it was; the same command begins again",
    "store export": "files that are written are whole and stay; the same command writes all of them again",
    "store import": "slides that are imported are kept; the same command goes on from there",
    "store label": "some slides may have their new labels; the same command gives all of them theirs",
    "store rm": "some of the slides are deleted; g2l store ls lists those that are left",
    "store subset": WHOLE_OR_NOT,
    "store merge": WHOLE_OR_NOT,
    "store pack": "the store is whole, with the pack that it had before; the same command begins again",
    "store compact": WHOLE_OR_NOT,
    "store publish": WHOLE_OR_NOT,
    "store upload": "files that are sent are kept; the same command goes on from there",
}
"""By the words of the command."""


def left_by(words: str, given: Mapping[str, Any]) -> str:
    """What an interrupted command leaves, and what the same command does then.

    Args:
        words: The command without the program, as `store verify`.
        given: Its options.
    """
    if given.get("dry_run"):
        return BEGINS_AGAIN
    if told := what_is_left():
        return told.replace("command goes", "command without --restart goes") if given.get("restart") else told
    if given.get("repair"):
        return "what is repaired stays so; the same command does the rest"
    return LEFT.get(words, LEFT[""])


def _command_under_way() -> tuple[str, Mapping[str, Any]]:
    """Its words and options, as the parser knows them."""
    words, given = list[str](), dict[str, Any]()
    context: Any = _current_context()
    while context is not None and context.parent is not None:
        given = given or dict(context.params)
        words.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(words), given


def _current_context() -> Any:
    try:
        click = import_module("typer._click.globals")
    except ImportError:  # earlier versions of typer have no click of their own
        click = import_module("click.globals")
    return click.get_current_context(silent=True)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave on Ctrl-C at once, with the exit code that says so.

    As after `kill -9`, what is recorded is kept; an orderly shutdown would wait for batches under way in other
    threads, or tear Zarr's event loop from under them.
    """
    if marks := sys.modules.get("g2l_core.slides.under_way"):
        marks.forget_own()
    show(f"\ninterrupted; {left_by(*_command_under_way())}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
