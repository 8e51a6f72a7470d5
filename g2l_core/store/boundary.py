"""Where the errors of Zarr, its codecs and the operating system become errors of the store."""

from collections.abc import Iterator
from contextlib import contextmanager

from g2l_core.errors import (
    MACHINE_FAULTS,
    G2LError,
    StoreCorruptError,
    StoreError,
    machine_fault,
    refuse_unread,
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Translate whatever Zarr, its codecs and the operating system raise about damaged files.

    There is no list of these: a changed byte of an array's metadata has raised eleven kinds of exceptions.

    Raises:
        StoreCorruptError: The block raised one of them.
        StoreError: Too many files are open, so that nobody knows whether it is damaged.
        StoreUnreadError: It may not be read, or the disk fails.
    """
    try:
        yield
    except G2LError:
        raise
    except Exception as error:
        refuse_unread(error, what)
        said = str(error) or type(error).__name__
        raise StoreCorruptError(f"{what} cannot be read: {said}. g2l store verify names the damaged files") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Translate the errors of the operating system about a full disk, one that cannot be written to, or a limit.

    Raises:
        StoreError: The block raised one of them.
        StoreCorruptError: A file that is written in part holds something that cannot be read.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        fault = machine_fault(error)
        if fault is None and not isinstance(error, OSError):
            raise StoreCorruptError(
                f"cannot write {what}: a file of it is damaged ({error}). Run g2l store verify"
            ) from error
        said = (fault.strerror if fault else getattr(error, "strerror", None)) or error
        remedy = MACHINE_FAULTS[fault.errno or 0] if fault else "make the store writable"
        raise StoreError(
            f"cannot write {what}: {said}; {remedy} and run the same command again: what is recorded is kept"
        ) from error
