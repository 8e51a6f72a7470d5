"""The HDF5 layouts: TRIDENT, CLAM, STAMP and AtlasPatch.

All have one file a slide. Beside what each tool writes, the file itself has the attributes of
`ExportCohort.attributes`, which none of them reads.
"""

from collections.abc import Iterator, Mapping
from math import nan
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from g2l_core.store.formats.item import ExportCohort, ExportItem, magnification, whole_file, write_tensor

Dataset = tuple[np.ndarray, Mapping[str, Any]]
"""Values, and the attributes that stand beside them."""

STAMP_VERSION = "2.0.0"
"""STAMP refuses files of a newer version than its own; this one is the first whose coordinates are micrometers."""


def write_trident(item: ExportItem, cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """TRIDENT's job folder, which Patho-Bench and TITAN read too.

        folder/20x_256px_0px_overlap/patches/<slide_id>_patches.h5       coords
        folder/20x_256px_0px_overlap/features_<encoder>/<slide_id>.h5    features, coords

    features are float32 (n, dim), coords int64 (n, 2) in level-0 pixels.
    """
    job = folder / f"{magnification(cohort.mpp)}x_{cohort.patch_px}px_0px_overlap"
    coords = (item.coords.astype(np.int64), _trident_attributes(item, cohort))
    for encoder, features in item.features.items():
        described = (features.astype(np.float32), {"encoder": encoder, "name": item.name})
        path = job / f"features_{encoder}" / f"{item.slide_id}.h5"
        write_h5(path, {"features": described, "coords": coords}, cohort.attributes(item, encoder))
        yield path
    patches = job / "patches" / f"{item.slide_id}_patches.h5"
    write_h5(patches, {"coords": coords}, cohort.attributes(item))
    yield patches


def _trident_attributes(item: ExportItem, cohort: ExportCohort) -> dict[str, Any]:
    width, height = item.facts.level0_size
    return {
        "patch_size": cohort.patch_px,
        "patch_size_level0": item.facts.patch_px_level0,
        "overlap": 0,
        "target_magnification": magnification(cohort.mpp),
        "level0_magnification": magnification(item.facts.mpp) if item.facts.mpp else nan,
        "level0_width": width,
        "level0_height": height,
        "name": item.name,
    }


def write_clam(item: ExportItem, cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """CLAM's folders, which its `Generic_MIL_Dataset` and most MIL code read.

        folder/patches/<slide_id>.h5                      coords, int32 (n, 2)
        folder/features_<encoder>/h5_files/<slide_id>.h5  features, float32 (n, dim); coords
        folder/features_<encoder>/pt_files/<slide_id>.pt  float32 (n, dim)

    Coordinates are level-0 pixels, and so is patch_size: CLAM's own is in pixels of patch_level, here 0.
    """
    width_height = np.array(item.facts.level0_size)
    attributes = {
        "patch_size": item.facts.patch_px_level0,
        "patch_level": 0,
        "downsample": np.array([1.0, 1.0]),
        "downsampled_level_dim": width_height,
        "level_dim": width_height,
        "name": item.name,
        "save_path": "patches",
    }
    coords = (item.coords, attributes)
    for encoder, features in item.features.items():
        place = folder / f"features_{encoder}"
        path = place / "h5_files" / f"{item.slide_id}.h5"
        write_h5(
            path, {"features": (features.astype(np.float32), {}), "coords": coords}, cohort.attributes(item, encoder)
        )
        write_tensor(tensor := place / "pt_files" / f"{item.slide_id}.pt", features)
        yield from (path, tensor)
    patches = folder / "patches" / f"{item.slide_id}.h5"
    write_h5(patches, {"coords": coords}, cohort.attributes(item))
    yield patches


def write_stamp(item: ExportItem, cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """STAMP's feature folders: folder/<encoder>/<slide_id>.h5 with feats, float16 (n, dim), and coords in um."""
    assert item.facts.mpp is not None  # the export leaves out slides without it
    coords: Dataset = (item.coords * float(item.facts.mpp), {})
    for encoder, features in item.features.items():
        attributes = {
            **cohort.attributes(item, encoder),
            "stamp_version": STAMP_VERSION,
            "extractor": encoder,
            "unit": "um",
            "tile_size_um": cohort.patch_px * cohort.mpp,
            "tile_size_px": cohort.patch_px,
            "code_hash": cohort.encoders[encoder].digest[:8],
            "feat_type": "tile",
        }
        path = folder / encoder / f"{item.slide_id}.h5"
        write_h5(path, {"feats": (features, {}), "coords": coords}, attributes)
        yield path


def write_atlaspatch(item: ExportItem, cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """AtlasPatch's file a slide with all encoders: folder/patches/<slide_id>.h5.

    coords are int32 (n, 5): x, y, read_w, read_h, level, here all of level 0; features/<encoder> are float32.
    """
    side = item.facts.patch_px_level0
    attributes = {**_trident_attributes(item, cohort), **cohort.attributes(item), "wsi_path": item.facts.source}
    attributes["target_magnification"] = round(magnification(cohort.mpp))
    rest = np.broadcast_to(np.array([side, side, 0], np.int32), (len(item), 3))
    datasets: dict[str, Dataset] = {"coords": (np.hstack([item.coords, rest]), {})}
    for encoder, features in item.features.items():
        digest = {"encoder": encoder, "encoder_digest": cohort.encoders[encoder].digest}
        datasets[f"features/{encoder.lower()}"] = (features.astype(np.float32), digest)
    path = folder / "patches" / f"{item.slide_id}.h5"
    write_h5(path, datasets, attributes)
    yield path


def write_h5(path: Path, datasets: Mapping[str, Dataset], attributes: Mapping[str, Any]) -> None:
    """Write an HDF5 file of datasets with attributes, all of it or nothing.

    Raises:
        StoreError: It cannot be written.
    """
    # HDF5 cannot close a file that it could not write, so it writes into memory.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as hdf5:
        hdf5.attrs.update(attributes)
        for name, (values, of_values) in datasets.items():
            hdf5.create_dataset(name, data=values).attrs.update(of_values)
        hdf5.flush()
        image = hdf5.id.get_file_image()
    with whole_file(path) as file:
        file.write(image)
