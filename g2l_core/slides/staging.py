"""The next slides copied ahead from a slow disk to a fast one, and deleted after use; bounded, and safe to kill.

Every process has a folder of its own under the staging folder, with a lock that the kernel frees when it dies; the next
process to start deletes the folders of the dead. (`flock`: on one machine's local disk, which is what staging is for.)
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
    """Local copies of slides, made ahead in the order in which they will be asked for. Use it in a `with`.

    `path_of` waits for a copy under way. A slide is read in place where it is larger than the bound, where there is no
    room when its turn comes, or where the copy fails; a failed copy is told once through `warn`.
    """

    def __init__(self, folder: Path, max_bytes: int, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
        self._paths, self._max_bytes, self._warn = list(dict.fromkeys(paths)), max_bytes, warn
        self._changed = threading.Condition()
        self._decided: dict[Path, Path] = {}
        self._sizes: dict[Path, int] = {}
        self._stalled = False
        """Whether the copier waits for room: whoever asks then must not wait for the copier."""
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
        """Bytes of the copies that exist or are being made; never more than the bound."""
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
        """Wait until the slide fits beside the copies that there are; False where it is read in place."""
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
    """What must be copied for a slide: itself, and what lies beside it in formats of several files."""
    match path.suffix.lower():
        case ".mrxs":
            return [path, path.with_suffix("")]
        case ".dcm":
            return sorted(path.parent.glob("*.dcm"))
        case _:
            return [path]


def remove_dead(folder: Path) -> list[Path]:
    """Delete what processes that are gone have left in a staging folder; return their sub-folders."""
    dead = []
    for lock in sorted(folder.glob(f"{PREFIX}*/{LOCK}")):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
            dead.append(lock.parent)
    return dead


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """A new sub-folder, and the open file that locks it; the lock gets its name only once it is held."""
    own = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    own.mkdir()
    lock = os.open(own / f"{LOCK}.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (own / f"{LOCK}.new").rename(own / LOCK)
    return own, lock


def _copy(path: Path, folder: Path) -> Path:
    """Copy a slide's files under a temporary name, then rename: what has the final name is whole."""
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
    """Bytes of a file or of everything in a folder; 0 for what is not there."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0
