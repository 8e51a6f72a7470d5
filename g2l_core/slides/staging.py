"""Copy the next slides from a slow disk to a fast one before they are read, and delete them after use.

The copies never take more than a given number of bytes. Every process has a folder of its own under the staging folder,
with a lock that the kernel frees when the process dies, and the next process to start deletes the folders of dead ones.
The lock is an `flock`, which works on a local disk. Staging is for local disks only.
"""

import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PREFIX = "g2l-stage-"
LOCK = "lock"
MULTI_FILE = frozenset({".vms", ".vmu"})
"""Formats whose further files only the vendor's index names: they are read in place."""


class Stage:
    """Local copies of slides, made in the order in which they will be asked for. Use it in a `with`.

    `path_of` waits for a copy that is being made. A slide is read in place if it is larger than the bound, if there is
    no room when its turn comes, or if the copy fails. `warn` is called once for every copy that fails.
    """

    def __init__(self, folder: Path, max_bytes: int, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
        self._paths, self._max_bytes, self._warn = list(dict.fromkeys(paths)), max_bytes, warn
        self._changed = threading.Condition()
        self._decided: dict[Path, Path] = {}
        self._sizes: dict[Path, int] = {}
        self._stalled = False
        """Whether the copying thread waits for room. Callers must then not wait for it."""
        self._stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead(folder)
        self.folder, self._lock = _locked_folder(folder)
        self._thread = threading.Thread(target=self._copy_all, name="g2l-stage", daemon=True)

    def __enter__(self) -> "Stage":
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the copies that exist or are being made. They are never more than the bound."""
        return sum(self._sizes.values())

    def path_of(self, path: Path) -> Path:
        """Where to read the slide at `path`: its copy, or itself."""
        with self._changed:
            while path not in self._decided:
                if path not in self._paths or self._stalled or self._stopped:
                    self._decided[path] = path
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return self._decided[path]

    def release(self, path: Path) -> None:
        """Delete the copy of a slide that is not needed any more."""
        with self._changed:
            copied = self._decided.get(path, path) != path
        if copied:
            shutil.rmtree(self._folder_of(path), ignore_errors=True)
        with self._changed:
            self._sizes.pop(path, None)
            self._stalled = False  # until the copying thread has looked again: callers wait for that
            self._changed.notify_all()

    def _folder_of(self, path: Path) -> Path:
        return self.folder / str(self._paths.index(path))

    def _copy_all(self) -> None:
        for path in self._paths:
            if not self._take_room(path):
                continue
            copy: Path | None = None
            try:
                copy = _copy(path, self._folder_of(path))
            except OSError as error:
                shutil.rmtree(self._folder_of(path), ignore_errors=True)
                self._warn(f"{path} is read in place: it cannot be staged ({error.strerror or error})")
            with self._changed:
                if copy is None:
                    self._sizes.pop(path, None)
                self._decided[path] = copy or path
                self._changed.notify_all()

    def _must_wait(self, path: Path, size: int) -> bool:
        fits_alone, fits_now = size <= self._max_bytes, self.staged_bytes + size <= self._max_bytes
        return fits_alone and not fits_now and not self._stopped and path not in self._decided

    def _take_room(self, path: Path) -> bool:
        """Wait until the slide fits beside the present copies; False if it is to be read in place."""
        size = sum(map(_size, files_of(path))) if path.suffix.lower() not in MULTI_FILE else self._max_bytes + 1
        with self._changed:
            while self._must_wait(path, size):
                self._stalled = True
                self._changed.notify_all()
                self._changed.wait()
            self._stalled = False
            if path in self._decided or self._stopped:
                return False
            if size > self._max_bytes:
                self._decided[path] = path
                self._changed.notify_all()
                return False
            self._sizes[path] = size
            return True


def files_of(path: Path) -> list[Path]:
    """The files and folders of a slide: itself, and those beside it in formats of several files."""
    match path.suffix.lower():
        case ".mrxs":
            return [path, path.with_suffix("")]
        case ".dcm":
            return sorted(path.parent.glob("*.dcm"))
        case _:
            return [path]


def remove_dead(folder: Path) -> list[Path]:
    """Delete what dead processes have left in a staging folder, and return their sub-folders."""
    dead = []
    for lock in sorted(folder.glob(f"{PREFIX}*/{LOCK}")):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
            dead.append(lock.parent)
    return dead


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """A new sub-folder, and the open file that locks it. The lock gets its final name only once it is held."""
    own = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    own.mkdir()
    lock = os.open(own / f"{LOCK}.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (own / f"{LOCK}.new").rename(own / LOCK)
    return own, lock


def _copy(path: Path, folder: Path) -> Path:
    """Copy a slide's files under a temporary name, then rename, so that a folder of the final name is complete."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    unfinished.mkdir()
    try:
        for file in files_of(path):
            if file.is_dir():
                shutil.copytree(file, unfinished / file.name)
            else:
                shutil.copyfile(file, unfinished / file.name)
        unfinished.rename(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder / path.name


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is none."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0
