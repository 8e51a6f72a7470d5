"""Marks of the slides that a process reads, by which the next one knows what was read when a process ended.

A library that aborts takes the whole process with it, and no exception says which slide it was. So a file names each
slide while it is opened or decoded. Its lock is an `flock`, which the kernel frees when the process dies. A mark
without a lock makes a slide a suspect and no more, for a lost power line leaves the same mark: whoever finds it reads
the slide alone in a process of its own, and blames it only if that process ends too.

The marks are beside the store, in `.<store name>.under-way`, for slides are opened before there is a store.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

_OWN = set[Path]()
"""The marks of this process."""


class UnderWay:
    """The marks beside one store. Where they cannot be written, there are none, and everything else goes on."""

    def __init__(self, store: Path) -> None:
        store = store.resolve()
        self.folder = store.with_name(f".{store.name}.under-way")
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, int, Path]] = {}
        """By slide id: how many blocks hold the mark, the open file, its path."""

    @contextmanager
    def reading(self, slide_id: str) -> Iterator[None]:
        """Mark a slide while the block runs; several threads may read one slide."""
        with self._lock:
            count, file, path = self._held.get(slide_id) or (0, *self._mark(slide_id))
            self._held[slide_id] = count + 1, file, path
        try:
            yield
        finally:
            with self._lock:
                count, file, path = self._held.pop(slide_id)
                if count > 1:
                    self._held[slide_id] = count - 1, file, path
                else:
                    _unmark(file, path)

    def _mark(self, slide_id: str) -> tuple[int, Path]:
        path = self.folder / f"{_name(slide_id)}.{os.getpid()}.slide"
        new = path.with_suffix(".new")
        file = -1
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            file = os.open(new, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(file, json.dumps(slide_id).encode())
            new.rename(path)
            _OWN.add(path)
        return file, path

    def suspects(self) -> list[str]:
        """The slides that were under way in a process that has ended."""
        found = set[str]()
        for path in sorted(self.folder.glob("*.slide")):
            with suppress(OSError, ValueError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.add(str(json.loads(file.read())))
        return sorted(found)

    def blamed(self) -> dict[str, str]:
        """Why slides are not read any more, by id."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.blamed")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                facts = json.loads(path.read_bytes())
                found[str(facts["slide_id"])] = str(facts["reason"])
        return found

    def blame(self, slide_id: str, reason: str) -> None:
        """Keep that a slide ends processes; its marks go."""
        self.acquit(slide_id)
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            text = json.dumps({"slide_id": slide_id, "reason": reason})
            (self.folder / f"{_name(slide_id)}.blamed").write_text(text, encoding="utf-8")

    def acquit(self, slide_id: str) -> None:
        """Remove everything that is kept against a slide, and the folder with the last of it."""
        for path in self.folder.glob(f"{_name(slide_id)}.*"):
            path.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove the folder if nothing is in it."""
        with suppress(OSError):
            self.folder.rmdir()


def forget_own() -> None:
    """Remove the marks of this process, which the user ends. It takes no lock, so that a signal handler can call it."""
    for path in list(_OWN):
        with suppress(OSError):
            path.unlink()


def _unmark(file: int, path: Path) -> None:
    _OWN.discard(path)
    if file >= 0:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _name(slide_id: str) -> str:
    return sha256(slide_id.encode("utf-8", "surrogateescape")).hexdigest()[:16]
