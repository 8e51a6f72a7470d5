"""Write files so that nobody ever sees half of one, and read text that anybody may have written."""

import errno
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, which takes the place of `path` when the block ends without an error.

    The content is on the disk before the name is: a reader, and a machine that loses power, sees the old file or the
    whole new one. After an error the temporary file is gone and `path` is as before.

    Args:
        path: The file to write. Its folder must exist.
        mode: As for `open`; a writing one.
        options: Further arguments of `open`.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system lets a folder be waited for.

    Raises:
        OSError: The disk reports that it could not be written to.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:  # some network disks cannot
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Wait until everything below a folder is on the disk, itself included.

    Raises:
        OSError: The disk reports that it could not be written to.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file, all of it or nothing.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, all of it or nothing.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let a library write a file by its path, then put it in place, all of it or nothing.

    Args:
        path: The file to write.
        write: Called with the path of a temporary file in the same folder, of the same suffix.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".partial-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text says.

    Raises:
        ValueError: It is no TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_QUOTED = re.compile(r"'+[=+\-@\t\r]")


def csv_row(row: Iterable[object]) -> list[object]:
    """Cells for a CSV file. Text that a spreadsheet would run as a formula gets an apostrophe; numbers stay.

    `csv_value` gives such a text back as it was.
    """
    return [
        f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) and not _is_number(cell) else cell for cell in row
    ]


def csv_value(cell: str) -> str:
    """The text of a cell that `csv_row` made."""
    return cell[1:] if _QUOTED.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
