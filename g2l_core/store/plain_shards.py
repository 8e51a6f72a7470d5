"""Read features from the files of shards, past Zarr, where they are kept as G2L writes them.

Zarr reads a shard chunk by chunk through an event loop, which takes longer than reading and checking the bytes. Here a
file's index says where its chunks are, and the system reads all that are wanted straight into the result. The index
and every chunk are compared with their checksums, as Zarr does. Arrays of other codecs or places are left to Zarr.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C

from g2l_core.store.location import Location
from g2l_core.types import Features

CRC_BYTES = 4
ABSENT = 2**64 - 1
"""The offset and the length of a chunk that was not written, all of whose values are the fill value."""
_BYTES_AND_CHECKSUM = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))
"""How many pieces of memory one call reads into."""


@dataclass(frozen=True)
class _Layout:
    """How many rows a shard and a chunk have, and the width of a row."""

    shard_rows: int
    chunk_rows: int
    dim: int

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.dim * 2

    @property
    def chunks(self) -> int:
        return self.shard_rows // self.chunk_rows


def read_features(array: zarr.Array, place: Location, start: int, stop: int, view: int) -> Features:
    """Rows [start, stop) of one view of an array of features, float16 (rows, dim).

    Args:
        array: The array (n, views, dim).
        place: Where it is.
        start: The first row.
        stop: The row behind the last.
        view: Which view.

    Raises:
        ValueError: A file is not what was written; Zarr raises more kinds.
        OSError: A file cannot be read.
    """
    layout = _plain_layout(array) if isinstance(place, Path) else None
    if (
        layout is None
        or not isinstance(place, Path)
        or not 0 <= start < stop <= array.shape[0]
        or not (0 <= view < array.shape[1])
    ):
        return np.asarray(array[start:stop, view])
    features = np.empty((stop - start, layout.dim), np.float16)
    for first in range(start - start % layout.shard_rows, stop, layout.shard_rows):
        a, b = max(first, start), min(first + layout.shard_rows, stop)
        path = place / f"c.{first // layout.shard_rows}.{view}.0"
        _read_shard(path, layout, a - first, b - first, features[a - start : b - start])
    return features


def _plain_layout(array: zarr.Array) -> _Layout | None:
    """The layout of an array that is kept as G2L writes it, by its metadata document; None of another one."""
    match array.metadata.to_dict():
        case {
            "data_type": "float16",
            "fill_value": "NaN",
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"codecs": codecs, "index_codecs": index_codecs, "index_location": "end"},
                }
            ],
        } if list(codecs) == list(index_codecs) == _BYTES_AND_CHECKSUM and array.shards:
            (shard_rows, shard_views, dim), (chunk_rows, _, chunk_dim) = array.shards, array.chunks
            if shard_views == 1 and dim == chunk_dim == array.shape[2]:
                return _Layout(shard_rows, chunk_rows, dim)
    return None


def _read_shard(path: Path, layout: _Layout, start: int, stop: int, features: Features) -> None:
    """Read rows [start, stop) of a shard into an array of so many rows."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        features[:] = np.nan
        return
    try:
        offsets = _read_index(file, path, layout)
        _read_chunks(file, path, layout, offsets, start, stop, features)
    finally:
        os.close(file)


def _read_index(file: int, path: Path, layout: _Layout) -> list[tuple[int, int]]:
    """(Offset, bytes) of each chunk."""
    size = 16 * layout.chunks + CRC_BYTES
    end = os.fstat(file).st_size
    content = os.pread(file, size, max(0, end - size))
    if len(content) < size:
        raise ValueError(f"{path.name} has {end:,} bytes, too few for a shard")
    body, crc = content[:-CRC_BYTES], struct.unpack("<I", content[-CRC_BYTES:])[0]
    if CRC32C.checksum(body) != crc:
        raise ValueError(f"the index of {path.name} does not have the checksum that was written with it")
    numbers = struct.unpack(f"<{2 * layout.chunks}Q", body)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _read_chunks(
    file: int, path: Path, layout: _Layout, index: list[tuple[int, int]], start: int, stop: int, features: Features
) -> None:
    into, checks = dict[int, np.ndarray](), np.empty((layout.chunks, CRC_BYTES), np.uint8)
    partial = dict[int, np.ndarray]()
    numbers = range(start // layout.chunk_rows, -(-stop // layout.chunk_rows))
    for number in numbers:
        first = number * layout.chunk_rows
        if index[number] == (ABSENT, ABSENT):
            features[max(first, start) - start : min(first + layout.chunk_rows, stop) - start] = np.nan
        elif index[number][1] != layout.chunk_bytes + CRC_BYTES:
            raise ValueError(
                f"chunk {number} of {path.name} has {index[number][1]:,} bytes, not {layout.chunk_bytes + 4:,}"
            )
        elif start <= first and first + layout.chunk_rows <= stop:
            into[number] = features[first - start : first - start + layout.chunk_rows]
        else:  # the last rows of a slide, or some of a chunk: the rest is read aside
            into[number] = partial[number] = np.empty((layout.chunk_rows, layout.dim), np.float16)
    for together in _runs(sorted(into, key=lambda number: index[number][0]), index):
        _fill(file, path, index[together[0]][0], [b for n in together for b in (into[n], checks[n])])
    for number, rows in into.items():
        if CRC32C.checksum(rows) != int.from_bytes(checks[number].tobytes(), "little"):
            raise ValueError(f"chunk {number} of {path.name} does not have the checksum that was written with it")
    for number, rows in partial.items():
        first = number * layout.chunk_rows
        a, b = max(first, start), min(first + layout.chunk_rows, stop)
        features[a - start : b - start] = rows[a - first : b - first]


def _runs(numbers: list[int], index: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Chunks that lie behind each other in the file, so that one call reads them."""
    run = list[int]()
    for number in numbers:
        if run and (sum(index[run[-1]]) != index[number][0] or 2 * len(run) + 2 > BUFFERS):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _fill(file: int, path: Path, offset: int, buffers: list[np.ndarray]) -> None:
    """Read a part of a file into pieces of memory."""
    wanted = sum(buffer.nbytes for buffer in buffers)
    left = [memoryview(buffer).cast("B") for buffer in buffers]  # type: ignore[arg-type]
    got = 0
    while got < wanted:
        n = os.preadv(file, left, offset + got)
        if n == 0:
            raise ValueError(f"{path.name} ends before its chunks do")
        got += n
        while left and n >= len(left[0]):
            n -= len(left.pop(0))
        if n:
            left[0] = left[0][n:]
