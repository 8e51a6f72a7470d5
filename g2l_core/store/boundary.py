"""Where the errors of Zarr, its codecs and the operating system become errors of the store."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from g2l_core.errors import G2LError, StoreCorruptError, StoreError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Translate whatever Zarr, its codecs and the operating system raise about damaged files.

    There is no list of these: a changed byte of an array's metadata has raised eleven kinds of exceptions.

    Raises:
        StoreCorruptError: The block raised one of them.
    """
    try:
        yield
    except G2LError:
        raise
    except Exception as error:
        said = str(error) or type(error).__name__
        raise StoreCorruptError(f"{what} cannot be read: {said}. g2l store verify names the damaged files") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Translate the errors of the operating system about a full disk, or one that cannot be written to.

    Raises:
        StoreError: The block raised one of them.
        StoreCorruptError: A file that is written in part holds something that cannot be read.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise StoreCorruptError(
            f"cannot write {what}: a file of it is damaged ({error}). Run g2l store verify"
        ) from error
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise StoreError(
            f"cannot write {what}: {error.strerror or error}; {'free space' if full else 'make the store writable'} "
            "and run the same command again: what is recorded is kept"
        ) from error
