"""One writer at a time: locks of the operating system, freed by the kernel when their holder dies.

`flock` holds on one machine, and on shared disks whose servers keep it (NFS version 4, Lustre mounted with `flock`).
Where a disk refuses locks nothing is locked: let only one command at a time write into a store there.
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
"""Folder of a store that holds its lock files; nothing of them is part of the format."""

UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
POLL_S = 0.2


@contextmanager
def locked(path: Path, *, wait_s: float, holder: str) -> Iterator[None]:
    """Hold the lock file at `path`, which is made where it is missing and never deleted.

    Args:
        path: The file; its folder is made.
        wait_s: How long to wait for another holder.
        holder: Whom to suspect, for the message.

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
