"""Write stored features as other tools read them: TRIDENT's folder of HDF5 files.

Magnifications appear here and nowhere else: 10 um/px over the micrometers per pixel, 20x = 0.5, 40x = 0.25.
"""

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from g2l_core.errors import StoreError, writing
from g2l_core.files import replacing
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.locks import locked_output

POWERS = (1.25, 2.5, 5, 10, 20, 40, 80)
"""Objectives that have a name; a magnification within 5 % of one is called so, as a scanner's 0.243 um/px is 40x."""


def export_trident(store: FeatureStore, encoder: str, folder: Path, *, view: int = 0) -> list[Path]:
    """Write a cohort's features as TRIDENT's (and so CLAM's, Patho-Bench's, TITAN's) HDF5 files.

        folder/20x_256px_0px_overlap/patches/<slide_id>_patches.h5       coords
        folder/20x_256px_0px_overlap/features_<encoder>/<slide_id>.h5    features, coords

    features are float32 (n, dim), coords int64 (n, 2) in level-0 pixels, both in stored order without the
    unreadable patches. Files of the same names are replaced, each atomically.

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
        StoreError: The store holds sets of patch images, which have no coordinates, or the files cannot be written.
        RunError: Another command writes into the folder, or it cannot be made.
    """
    with locked_output(folder):
        return _export(store, encoder, folder, view)


def _export(store: FeatureStore, encoder: str, folder: Path, view: int) -> list[Path]:
    slides = store.complete_slides(encoder, view=view)
    for slide in slides:
        if slide.facts.kind != "slide":
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
    width, height = slide.facts.level0_size
    return {
        "patch_size": grid["patch_px"],
        "patch_size_level0": slide.facts.patch_px_level0,
        "overlap": 0,
        "target_magnification": magnification(grid["mpp"]),
        "level0_magnification": magnification(slide.facts.mpp) if slide.facts.mpp else nan,
        "level0_width": width,
        "level0_height": height,
        "name": name,
    }


def magnification(mpp: float) -> int | float:
    """The nominal magnification of micrometers per pixel: 10 / mpp, or the objective of `POWERS` that is near."""
    exact = 10 / mpp
    value = next((power for power in POWERS if abs(exact - power) <= 0.05 * power), round(exact, 2))
    return int(value) if value == int(value) else value


def _write_h5(path: Path, datasets: Mapping[str, tuple[np.ndarray, Mapping[str, Any]]]) -> None:
    """Write an HDF5 file of datasets with attributes, all of it or nothing."""
    # HDF5 cannot close a file that it could not write, so it writes into memory.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as hdf5:
        for name, (values, attributes) in datasets.items():
            hdf5.create_dataset(name, data=values).attrs.update(attributes)
        hdf5.flush()
        image = hdf5.id.get_file_image()
    try:
        with writing(path, StoreError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(image)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
