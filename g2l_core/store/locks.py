"""Locks that let one process write at a time. The kernel frees them when their holder dies.

`flock` holds on one machine, and on shared disks whose servers keep it (NFS version 4, Lustre mounted with `flock`).
A disk that has no locks locks nothing, which is said once: let only one command at a time write into a folder there.
"""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from g2l_core.errors import G2LError, RunError, StoreError, machine_fault, machine_fault_text, refuse_address

LOCKS = ".locks"
"""The folder of a store, or of another output, that holds its lock files, which are not part of its format."""

UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
"""Errors of disks that have no locks. The library filelock does not tell them from a lock that is held, or falls back
on files that outlive a killed process, so it is not used here."""

POLL_S = 0.2
_warned = False


@contextmanager
def locked(path: Path, *, wait_s: float, holder: str, refusal: type[G2LError] = StoreError) -> Iterator[None]:
    """Hold the lock file at `path`, which is made if it is missing.

    Who makes its folders removes them in the end, where nothing else is in them.

    Args:
        path: The file, in a folder `LOCKS`; its folders are made.
        wait_s: How long to wait for another holder.
        holder: Who probably holds it, for the error message.
        refusal: The kind of error to raise.

    Raises:
        G2LError: Somebody else holds it for longer, or the file cannot be made.
    """
    refuse_address(path.parent.parent, refusal)
    folder = path.parent.parent
    made = [made for made in (path.parent, folder) if not made.is_dir()]
    until = time.monotonic() + wait_s
    while (file := _try(path, refusal)) is None:
        if time.monotonic() >= until:
            raise refusal(f"{folder} is in use: {holder}. Wait for it, or end it")
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if made:
            _tidy(path, made)
        os.close(file)  # and with it the lock


@contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Hold an output folder, so that no second command writes into it.

    Raises:
        RunError: Another command writes into it, or it cannot be made.
    """
    holder = "another g2l command writes into it"
    with locked(folder / LOCKS / "writer", wait_s=0, holder=holder, refusal=RunError):
        yield


def holds_only_locks(folder: Path) -> bool:
    """Whether a folder holds nothing but its lock files."""
    return all(path.name == LOCKS for path in folder.iterdir())


def _try(path: Path, refusal: type[G2LError]) -> int | None:
    """The open file that holds the lock; None where somebody else holds it, or has just removed it."""
    file = _opened(path, refusal)
    if file is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(file)
            raise refusal(f"cannot lock {path}: {error.strerror}") from error
        _warn_once(path, error)
    if _is_still_there(file, path):
        return file
    os.close(file)
    return None


def _opened(path: Path, refusal: type[G2LError]) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # its last holder has removed the folder in between
        return None
    except (FileExistsError, NotADirectoryError) as error:
        raise refusal(f"cannot write into {path.parent.parent}: it is no folder") from error
    except OSError as error:
        fault = machine_fault(error)
        words = machine_fault_text(fault) if fault else f"cannot write {path}: {error.strerror}"
        raise refusal(words) from error


def _warn_once(path: Path, error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        sys.stderr.write(
            f"warning  the disk of {path.parent.parent} has no locks ({error.strerror}): "
            "let only one command at a time write there\n"
        )


def _is_still_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _tidy(path: Path, made: Sequence[Path]) -> None:
    """Remove the lock and the folders that were made for it, as far as nothing else is in them."""
    with suppress(OSError):
        path.unlink()
        for folder in made:
            folder.rmdir()
