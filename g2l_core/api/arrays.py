"""The features of a cohort as one array: in memory, in a file, or lazily."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.format import open_memmap

from g2l_core.api.optional import require
from g2l_core.api.selection import Part, whole_parts
from g2l_core.errors import UsageError, writing
from g2l_core.files import write_with
from g2l_core.store.location import SHARD_REQUESTS, read_ahead
from g2l_core.types import Features

if TYPE_CHECKING:
    import dask.array
    import xarray


def feature_array(parts: Sequence[Part], encoder: str, dim: int, *, view: int) -> Features:
    """The features of all rows in memory, float16 (row, dim)."""
    whole_parts(parts, encoder, view)
    features = np.empty((sum(map(len, parts)), dim), np.float16)
    _fill(features, parts, encoder, view)
    return features


def write_features(parts: Sequence[Part], encoder: str, dim: int, path: Path, *, view: int) -> None:
    """Write the features of all rows as a NumPy file, slide by slide, so that memory holds one slide.

    Raises:
        UsageError: The file is not called .npy.
        RunError: It cannot be written.
    """
    if path.suffix != ".npy":
        raise UsageError(f"{path} must end in .npy: that is what it will hold")
    whole_parts(parts, encoder, view)

    def write(temporary: Path) -> None:
        shape = (sum(map(len, parts)), dim)
        features = open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        _fill(features, parts, encoder, view)
        features.flush()

    with writing(path):
        write_with(path, write)


def _fill(features: np.ndarray, parts: Sequence[Part], encoder: str, view: int) -> None:
    start = 0
    if not parts:
        return

    def read(part: Part) -> Features:
        return part.features(encoder, view)

    place = parts[0].slide.folder
    for part, values in zip(parts, read_ahead(read, parts, place, at_once=SHARD_REQUESTS), strict=True):
        features[start : start + len(part)] = values
        start += len(part)


def dask_array(parts: Sequence[Part], encoder: str, dim: int, *, view: int) -> "dask.array.Array":
    """The features of all rows, read when they are computed; a chunk is what is taken of a shard."""
    from g2l_core.store.arrays import lazy_features

    whole_parts(parts, encoder, view)
    return lazy_features([(part.slide, part.chosen) for part in parts], encoder, view, dim)


def data_array(parts: Sequence[Part], encoder: str, dim: int, *, view: int) -> "xarray.DataArray":
    """As `dask_array`, with the table of patches as coordinates of the dimension `patch`."""
    xarray = require("xarray", "xarray", "store.xarray")
    from g2l_core.api.frames import patch_frame

    frame = patch_frame(parts)
    coordinates = {name: ("patch", frame[name].to_numpy()) for name in frame}
    return xarray.DataArray(
        dask_array(parts, encoder, dim, view=view),
        dims=("patch", "feature"),
        coords=coordinates,
        name=encoder,
        attrs={"view": view},
    )
