"""A cheap fingerprint of a slide that notices a changed file without reading gigabytes."""

import os
from pathlib import Path

import xxhash

from g2l_core.errors import ReadError
from g2l_core.slides.ome_zarr import METADATA_NAMES

SAMPLED_BYTES = 1 << 20


def fingerprint(path: Path) -> str:
    """Hexadecimal xxh3-128 over the file's size and its first, middle and last MiB.

    This is enough to notice another slide or a rewritten one. For a folder it is taken over the names and sizes of all
    files in it and over the content of Zarr's metadata.

    Raises:
        ReadError: The file cannot be read.
    """
    try:
        return _folder_fingerprint(path) if path.is_dir() else _file_fingerprint(path)
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from error


def file_state(path: Path) -> tuple[int, int] | None:
    """Bytes and modification time (ns) of a file; None for a folder, whose time says little about its content.

    Raises:
        ReadError: It is absent, or cannot be asked for.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror}") from error
    return None if path.is_dir() else (found.st_size, found.st_mtime_ns)


def _file_fingerprint(path: Path) -> str:
    size = path.stat().st_size
    state = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - SAMPLED_BYTES)):
            file.seek(offset)
            state.update(file.read(SAMPLED_BYTES))
    return state.hexdigest()


def _folder_fingerprint(folder: Path) -> str:
    state = xxhash.xxh3_128()
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    for relative, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        state.update(f"{relative}|{file.stat().st_size}\n".encode())
        if file.name in METADATA_NAMES:
            state.update(file.read_bytes())
    return state.hexdigest()
