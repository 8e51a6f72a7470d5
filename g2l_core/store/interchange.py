"""Stored features as others want them: one Dask array over a cohort, TRIDENT's folder of HDF5 files.

Magnifications appear here and nowhere else: 10 um/px over the micrometres per pixel, 20x = 0.5, 40x = 0.25.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
from jaxtyping import Int64

from g2l_core.errors import StoreError, StoreMissingError, UnknownNameError
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.types import Features

POWERS = (1.25, 2.5, 5, 10, 20, 40, 80)
"""Objectives that have a name; a magnification within 5 % of one is called so, as a scanner's 0.243 um/px is 40x."""


@dataclass(frozen=True)
class CohortRows:
    """Which slide and which stored row each global row of a cohort's array is."""

    slide_ids: tuple[str, ...]
    """In the array's order: sorted."""
    starts: Int64[np.ndarray, " slide_and_end"]
    """The first global row of each slide; the last entry is the number of rows."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of(self, slide_id: str) -> slice:
        """The global rows of a slide.

        Raises:
            UnknownNameError: It has none.
        """
        if slide_id not in self.slide_ids:
            raise UnknownNameError("slide", slide_id, self.slide_ids)
        index = self.slide_ids.index(slide_id)
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def locate(self, row: int) -> tuple[str, int]:
        """The slide and the stored row of a global row.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self.starts.tolist(), row) - 1
        return self.slide_ids[index], row - int(self.starts[index])


def dask_rows(store: FeatureStore) -> CohortRows:
    """The row order of `dask_features`: slides sorted by id, each in its stored order, unreadable patches included."""
    slides = list(store.slides())
    starts = np.cumsum([0, *map(len, slides)], dtype=np.int64)
    return CohortRows(tuple(slide.slide_id for slide in slides), starts)


def dask_features(store: FeatureStore, encoder: str, *, view: int = 0) -> da.Array:
    """One view's features of the whole cohort, read only when computed.

    Args:
        store: Its path must be reachable wherever the array is computed.
        encoder: Key of the encoder.
        view: Which view; 0 is canonical.

    Returns:
        float16 (rows of `dask_rows`, dim); a chunk is a shard. Rows of unreadable patches are NaN. Computing
        raises StoreCorruptError where a shard is not what was written.

    Raises:
        UnknownNameError: The store does not know the encoder.
        StoreMissingError: A slide's features are not complete, or there is no slide.
    """
    slides = _complete_slides(store, encoder, view)
    jobs = [(slide, shard) for slide in slides for shard in slide.shards([view])]

    def read(block_id: tuple[int, int]) -> Features:
        slide, shard = jobs[block_id[0]]
        return slide.read_rows(encoder, shard.start, shard.stop, view=view)

    rows = tuple(shard.stop - shard.start for _, shard in jobs)
    dim = int(slides[0].features_array(encoder).shape[2])
    return da.map_blocks(read, chunks=(rows, (dim,)), dtype=np.float16, meta=np.empty((0, 0), np.float16))


def _complete_slides(store: FeatureStore, encoder: str, view: int) -> list[StoredSlide]:
    if encoder not in store.encoders:
        raise UnknownNameError("encoder", encoder, store.encoders, f"The store is {store.path}.")
    slides = list(store.slides())
    if not slides:
        raise StoreMissingError(f"{store.path} has no slide with patches")
    for slide in slides:
        if encoder not in slide.encoders:
            raise StoreMissingError(
                f"slide {slide.slide_id} has no features of {encoder} yet. Run the command that caches it again"
            )
        slide.require_complete(encoder, view)
    return slides


def export_trident(store: FeatureStore, encoder: str, folder: Path, *, view: int = 0) -> list[Path]:
    """Write a cohort's features as TRIDENT's (and so CLAM's, Patho-Bench's, TITAN's) HDF5 files.

    ::

        folder/20x_256px_0px_overlap/patches/<slide_id>_patches.h5       coords
        folder/20x_256px_0px_overlap/features_<encoder>/<slide_id>.h5    features, coords

    features are float32 (n, dim), coords int64 (n, 2) in level-0 pixels, both in stored order without the
    unreadable patches. Files of the same names are replaced, each at once.

    Args:
        store: All of its slides are written.
        encoder: Key of the encoder.
        folder: TRIDENT's job folder; made where it is missing.
        view: Which view; 0 is canonical.

    Returns:
        The feature files.

    Raises:
        UnknownNameError: The store does not know the encoder.
        StoreMissingError: A slide's features are not complete.
        StoreError: The store holds sets of patch images, which have no coordinates; or the files cannot be written.
    """
    slides = _complete_slides(store, encoder, view)
    for slide in slides:
        if slide.facts["kind"] != "slide":
            raise StoreError(f"{slide.slide_id} is a set of patch images: TRIDENT's files need coordinates on a slide")
    grid = store.grid
    job = folder / f"{magnification(grid['mpp'])}x_{grid['patch_px']}px_0px_overlap"
    return [_export_slide(slide, encoder, job, grid, view) for slide in slides]


def _export_slide(slide: StoredSlide, encoder: str, job: Path, grid: Mapping[str, Any], view: int) -> Path:
    good = slide.patch_status == schema.STATUS["ok"]
    name = slide.slide_id.rpartition("/")[2]
    coords = (slide.coords[good].astype(np.int64), _coords_attributes(slide, grid, name))
    features = (slide.features(encoder, view=view)[good].astype(np.float32), {"encoder": encoder, "name": name})
    _write_h5(job / "patches" / f"{slide.slide_id}_patches.h5", {"coords": coords})
    path = job / f"features_{encoder}" / f"{slide.slide_id}.h5"
    _write_h5(path, {"features": features, "coords": coords})
    return path


def _coords_attributes(slide: StoredSlide, grid: Mapping[str, Any], name: str) -> dict[str, Any]:
    width, height = slide.facts["level0_size"]
    return {
        "patch_size": grid["patch_px"],
        "patch_size_level0": slide.facts["patch_px_level0"],
        "overlap": 0,
        "target_magnification": magnification(grid["mpp"]),
        "level0_magnification": magnification(slide.facts["mpp"]),
        "level0_width": width,
        "level0_height": height,
        "name": name,
    }


def magnification(mpp: float) -> int | float:
    """The nominal magnification of micrometres per pixel: 10 / mpp, or the objective of `POWERS` that is near."""
    exact = 10 / mpp
    value = next((power for power in POWERS if abs(exact - power) <= 0.05 * power), round(exact, 2))
    return int(value) if value == int(value) else value


def _write_h5(path: Path, datasets: Mapping[str, tuple[np.ndarray, Mapping[str, Any]]]) -> None:
    """Write an HDF5 file of datasets with attributes, all of it or nothing."""
    temporary = path.with_name(f".{path.name}{schema.LEFTOVER}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            for name, (values, attributes) in datasets.items():
                file.create_dataset(name, data=values).attrs.update(attributes)
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
