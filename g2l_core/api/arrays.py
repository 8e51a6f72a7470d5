"""The features of a cohort as one array: in memory, in a file, or lazily."""

from collections.abc import Sequence
from dataclasses import replace
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


def features_at(parts: Sequence[Part], encoder: str, dim: int, rows: Sequence[int], *, view: int) -> Features:
    """The features at some places of the table of patches, float16 (row, dim), in the given order.

    Raises:
        UsageError: There is no such place.
    """
    places, starts = np.asarray(rows, np.int64), np.cumsum([0, *map(len, parts)], dtype=np.int64)
    beyond = places[(places < 0) | (places >= starts[-1])]
    if len(beyond):
        raise UsageError(f"there is no row {beyond[0]}: the table of patches has {starts[-1]:,}")
    features = np.empty((len(places), dim), np.float16)
    owner = np.searchsorted(starts, places, side="right") - 1
    numbers = np.unique(owner).tolist()
    if numbers:
        whole_parts([parts[number] for number in numbers], encoder, view)
    for number in numbers:
        mine = np.flatnonzero(owner == number)
        asked, back = np.unique(places[mine] - starts[number], return_inverse=True)
        part = replace(parts[number], chosen=parts[number].rows[asked])
        features[mine] = part.features(encoder, view)[back]
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
