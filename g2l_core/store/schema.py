"""Format version 2: names, dtypes, chunks and codecs of a store. docs/store-format.md mirrors this file."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

from zarr.abc.codec import Codec
from zarr.codecs import Crc32cCodec, ZstdCodec

FORMAT = 2
ATTRIBUTE = "g2l"
"""The attribute of a group that holds G2L's facts."""

SHARD_ROWS = 4096
"""Rows of one view in one file: the unit of writing, of resuming and of checksums."""

CHUNK_ROWS = 256
"""Rows of features that are read together at least; 768 KiB at 1536 dimensions."""

TABLE_FILE_BLOCKS, TABLE_FILE_VIEWS = 8, 8
"""How many blocks of `SHARD_ROWS` rows, and of how many views, one file of a table holds: most slides have one file a
table. A table's file is small and is replaced whole."""

REPLAY_ROWS = 64
"""Rows that distillation reads together: about a cell of the grid."""

STATUS: Mapping[str, int] = {"ok": 0, "unreadable": 1, "pen": 2, "black": 3, "blurred": 4, "absent": 5}
"""Reason codes of `patch_status`; a store lists its own in its root attributes."""

LEFTOVER = ".partial"
"""Ending of temporary files and folders; a killed writer leaves them behind, and they mean nothing."""

UNKNOWN_HASH = 0
"""`pixel_hash` of a view that nobody has rendered yet."""


@dataclass(frozen=True)
class TableSpec:
    """An array of a slide other than its features: one entry a patch, or one a patch and view."""

    dtype: str
    has_views: bool
    is_wide: bool
    """Whether an entry is a row of several values."""
    dimensions: tuple[str, ...]
    """The names of its axes, for readers such as xarray."""


TABLES: Mapping[str, TableSpec] = {
    "coords": TableSpec("int32", False, True, ("patch", "axis")),
    "patch_status": TableSpec("uint8", False, False, ("patch",)),
    "view_params": TableSpec("float32", True, True, ("patch", "view", "parameter")),
    "pixel_hash": TableSpec("uint64", True, False, ("patch", "view")),
}
"""The tables of every slide. Sets of patch images have `PATCH_ID` beside them: text (n,), their file names."""

PATCH_ID = "patch_id"
PATCH_LABELS = "patch_labels"
"""Text (n,), only where a manifest gives patch images values of their own: a JSON object of them, by column."""
COLUMNS = "columns"
"""The group of a slide that holds one array (n,) for each column that a user has added."""
FEATURES = "features"
"""The group of a slide that holds one array for each encoder."""

_KEYS = {"name": "default", "separator": "."}
"""Chunks are files `c.0.0` in the array's own folder, without a folder for each index."""


def table_layout(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of `zarr.create_array` for a table of a shape: (patch, view where there are views, value)."""
    spec = TABLES[name]
    width = shape[-1:] if spec.is_wide else ()
    return {
        "shape": shape,
        "dtype": spec.dtype,
        "chunks": (SHARD_ROWS, *((1,) if spec.has_views else ()), *width),
        "shards": (SHARD_ROWS * TABLE_FILE_BLOCKS, *((TABLE_FILE_VIEWS,) if spec.has_views else ()), *width),
        "compressors": _table_codecs(),
        "fill_value": 0,
        "chunk_key_encoding": _KEYS,
        "dimension_names": spec.dimensions,
    }


def text_layout(n: int) -> dict[str, Any]:
    """The arguments of `zarr.create_array` for a text a patch: the file names of patch images, or their labels."""
    return column_layout(n, str)


def column_layout(n: int, dtype: Any) -> dict[str, Any]:
    """The arguments of `zarr.create_array` for one value a patch."""
    return {
        "shape": (n,),
        "dtype": dtype,
        "chunks": (max(1, min(n, SHARD_ROWS)),),
        "compressors": _table_codecs(),
        "chunk_key_encoding": _KEYS,
        "dimension_names": ("patch",),
    }


def features_layout(n: int, n_views: int, dim: int) -> dict[str, Any]:
    """The arguments of `zarr.create_array` for an encoder's features.

    They are float16 (n, views, dim), NaN where nothing is written; each chunk carries its crc32c. Features do not
    compress (zstd gains 1.08 x), so they are stored plain.
    """
    return {
        "shape": (n, n_views, dim),
        "dtype": "float16",
        "chunks": (CHUNK_ROWS, 1, dim),
        "shards": (SHARD_ROWS, 1, dim),
        "compressors": [Crc32cCodec()],
        "fill_value": nan,
        "chunk_key_encoding": _KEYS,
        "dimension_names": ("patch", "view", "feature"),
    }


def _table_codecs() -> list[Codec]:
    """Zstandard, then the checksum of what it gave: a changed bit is noticed before anything is unpacked."""
    return [ZstdCodec(level=3), Crc32cCodec()]
