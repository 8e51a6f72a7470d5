"""The run folder of `g2l distill`: made once, continued only by the same settings, described by run.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.errors import RunError
from g2l_core.store.provenance import differences

ABOUT = "about"
"""The part of a record that may differ when a run is resumed: versions, and where the store lies."""


def open_run(folder: Path, record: Mapping[str, Any], *, resume: bool) -> None:
    """Make a run folder, or check that the one there is the same run.

    Args:
        folder: Where.
        record: What identifies the run: settings, teacher, student, split.
        resume: Whether the user wants to go on with a run that is there.

    Raises:
        RunError: The folder holds another run or something else.
    """
    there = folder / RUN_RECORD
    if there.is_file():
        if not resume:
            raise RunError(f"{folder} holds a run already: --resume continues it, or give another --out")
        stored = json.loads(there.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {ours!r}, now {theirs!r}"
            for name, ours, theirs in differences({key: stored.get(key) for key in record}, record)
            if not name.startswith(ABOUT)
        ]
        if changed:
            raise RunError(f"{folder} was begun with other settings: {'; '.join(changed)}. Use them, or another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is no run of g2l distill; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    write_record(folder, record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace run.json atomically."""
    temporary = folder / f"{RUN_RECORD}.partial"
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / RUN_RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json's content."""
    content: dict[str, Any] = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
    return content
