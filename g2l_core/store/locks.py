"""Locks that let one process write at a time. The kernel frees them when their holder dies.

`flock` holds on one machine, and on shared disks whose servers keep it (NFS version 4, Lustre mounted with `flock`).
A disk that has no locks locks nothing: let only one command at a time write into a store there.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from g2l_core.errors import StoreError

LOCKS = ".locks"
"""The folder of a store that holds its lock files, which are not part of the format."""

UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
"""Errors of disks that have no locks. The library filelock does not tell them from a lock that is held, or falls back
on files that outlive a killed process, so it is not used here."""

POLL_S = 0.2


@contextmanager
def locked(path: Path, *, wait_s: float, holder: str) -> Iterator[None]:
    """Hold the lock file at `path`. It is made if it is missing, and never deleted.

    Args:
        path: The file; its folder is made.
        wait_s: How long to wait for another holder.
        holder: Who probably holds it, for the error message.

    Raises:
        StoreError: Somebody else holds it for longer, or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the store writable") from error
    try:
        _acquire(file, path, wait_s, holder)
        yield
    finally:
        os.close(file)  # and with it the lock


def _acquire(file: int, path: Path, wait_s: float, holder: str) -> None:
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise StoreError(f"{path.parent.parent} is in use: {holder}. Wait for it, or end it") from error
            time.sleep(POLL_S)
            continue
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise StoreError(f"cannot lock {path}: {error.strerror}") from error
        return
