"""Format version 1: names, dtypes, chunks and codecs of a store. docs/store-format.md mirrors this file."""

from collections.abc import Mapping
from math import nan

import zarr
from zarr.abc.codec import Codec
from zarr.codecs import Crc32cCodec, ZstdCodec

FORMAT = 1
ATTRIBUTE = "g2l"
"""The attribute of every group and array that holds G2L's facts."""

SHARD_ROWS = 4096
"""Rows of one view in one file: the unit of writing, of resuming and of checksums."""

CHUNK_ROWS = 256
"""Rows read together at least; 768 KiB at 1536 dimensions."""

STATUS: Mapping[str, int] = {"ok": 0, "unreadable": 1, "pen": 2, "black": 3, "blurred": 4}
"""Reason codes of `patch_status`; a store lists its own in its root attributes."""

LEFTOVER = ".partial"
"""Ending of the temporary files of Zarr's local store; a killed writer leaves them behind, and they mean nothing."""

UNKNOWN_HASH = 0
"""`pixel_hash` of a view that nobody has rendered yet."""


def create_coords(slide: zarr.Group, n: int) -> zarr.Array:
    """int32 (n, 2)."""
    return _table(slide, "coords", (n, 2), "int32", (SHARD_ROWS, 2))


def create_patch_status(slide: zarr.Group, n: int) -> zarr.Array:
    """uint8 (n,)."""
    return _table(slide, "patch_status", (n,), "uint8", (SHARD_ROWS,))


def create_view_params(slide: zarr.Group, n: int, n_views: int, columns: list[str]) -> zarr.Array:
    """float32 (n, views, parameters); one chunk a shard and view."""
    array = _table(slide, "view_params", (n, n_views, len(columns)), "float32", (SHARD_ROWS, 1, len(columns)))
    array.attrs["columns"] = columns
    return array


def create_pixel_hash(slide: zarr.Group, n: int, n_views: int) -> zarr.Array:
    """uint64 (n, views); one chunk a shard and view."""
    return _table(slide, "pixel_hash", (n, n_views), "uint64", (SHARD_ROWS, 1))


def create_patch_id(slide: zarr.Group, n: int) -> zarr.Array:
    """Text (n,): file names of patch images."""
    chunks = (max(1, min(n, SHARD_ROWS)),)
    return slide.create_array("patch_id", shape=(n,), dtype=str, chunks=chunks, compressors=_table_codecs())


def create_features(slide: zarr.Group, encoder: str, n: int, n_views: int, dim: int) -> zarr.Array:
    """float16 (n, views, dim), NaN where nothing is written; each chunk carries its crc32c.

    Features do not compress (zstd gains 1.08 x), so they are stored plain.
    """
    return slide.require_group("features").create_array(
        encoder,
        shape=(n, n_views, dim),
        dtype="float16",
        chunks=(CHUNK_ROWS, 1, dim),
        shards=(SHARD_ROWS, 1, dim),
        compressors=[Crc32cCodec()],
        fill_value=nan,
    )


def _table(slide: zarr.Group, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]) -> zarr.Array:
    return slide.create_array(name, shape=shape, dtype=dtype, chunks=chunks, compressors=_table_codecs(), fill_value=0)


def _table_codecs() -> list[Codec]:
    """Zstandard, then the checksum of what it gave: a changed bit is noticed before anything is unpacked."""
    return [ZstdCodec(level=3), Crc32cCodec()]
