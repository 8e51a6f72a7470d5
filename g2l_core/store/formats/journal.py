"""Which files an output folder has whole already, and from what they were written."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2l_core.errors import StoreError, require_output_folder, writing
from g2l_core.store.provenance import digest

JOURNAL = ".g2l-export.jsonl"
"""In the output folder: a line for each slide that is written."""


def claim_export_folder(folder: Path) -> None:
    """Refuse a folder that holds other files, which an export could replace; mark any other by an empty journal.

    Raises:
        RunError: It holds files, and no export has written there.
        StoreError: It cannot be written to.
    """
    require_output_folder(folder, (JOURNAL,), "export of g2l")
    with writing(folder, StoreError):
        (folder / JOURNAL).touch()


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written of a slide."""

    files: tuple[Path, ...]
    patches: int
    unreadable: Mapping[str, int]
    """Patches that were left out, by reason."""


class Journal:
    """The slides that are written, each known by the digest of what decides its files."""

    def __init__(self, folder: Path, settings: str) -> None:
        """Read the journal of a folder.

        Args:
            folder: The output folder.
            settings: What decides the files of every slide.
        """
        self._folder, self._settings = folder, settings
        self._known: dict[str, Mapping[str, Any]] = {}
        with suppress(OSError, UnicodeDecodeError):
            lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):  # torn by a kill
                    entry = json.loads(line)
                    self._known[entry["content"]] = entry

    def _content(self, facts: Mapping[str, Any]) -> str:
        return digest({"settings": self._settings, "facts": facts})

    def entry(self, facts: Mapping[str, Any]) -> Written | None:
        """What was written of a slide, if all of it is there, whole, and made from these facts; else None."""
        entry = self._known.get(self._content(facts), {"files": {}})
        sizes = {self._folder / name: size for name, size in entry["files"].items()}
        if not sizes or not all(_size(path) == size for path, size in sizes.items()):
            return None
        return Written(files=tuple(sizes), patches=entry["patches"], unreadable=entry["unreadable"])

    def note(self, facts: Mapping[str, Any], written: Written) -> None:
        """Note that a slide is written.

        Raises:
            StoreError: The disk is full, or cannot be written to.
        """
        sizes = {path.relative_to(self._folder).as_posix(): _size(path) for path in written.files}
        counts = {"patches": written.patches, "unreadable": dict(written.unreadable)}
        line = json.dumps({"content": self._content(facts), **counts, "files": sizes})
        path = self._folder / JOURNAL
        with writing(path, StoreError), path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the first line feed ends a line that a kill has torn


def _size(path: Path) -> int | str | None:
    """The bytes of a file; a folder has none, and None is nothing."""
    if path.is_dir():
        return "folder"
    return path.stat().st_size if path.is_file() else None
