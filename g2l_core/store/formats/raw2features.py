"""The Zarr layout of raw2features: one group a slide, with a grid and an array an encoder.

Its format 0.1 asks for facts that a store may not have, such as the license of an encoder of somebody's own; these are
empty or null.
"""

import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import g2l_core
from g2l_core.errors import StoreError, writing
from g2l_core.files import sync_tree
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.formats.item import ExportCohort, ExportItem
from g2l_core.store.provenance import digest

HEADER, VERSION, ENDING = "raw2features", "0.1", ".embeddings.zarr"
CHUNK_ROWS = 4096


def grid_key(cohort: ExportCohort) -> str:
    """The name of the grid: its um/px and the side of a patch."""
    return f"mpp{cohort.mpp:g}_px{cohort.patch_px}"


def write_raw2features(item: ExportItem, cohort: ExportCohort, folder: Path) -> Iterator[Path]:
    """A slide's group: folder/<slide_id>.embeddings.zarr/grids/<grid>/{coords, grid_index, features/<encoder>}.

    coords are int32 (n, 2) in level-0 pixels, grid_index int32 (n, 2) row and column, features float16 (n, dim).

    Raises:
        StoreError: It cannot be written.
    """
    path = folder / f"{item.slide_id}{ENDING}"
    aside = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, StoreError):
            shutil.rmtree(aside, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_group(aside, item, cohort)
            sync_tree(aside)
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    yield path


def _write_group(path: Path, item: ExportItem, cohort: ExportCohort) -> None:
    key, header = grid_key(cohort), _header(item, cohort)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    shared = {name: header[name] for name in ("schema_version", "source", "provenance")}
    of_grid = {name: header["patching"][name] for name in ("target_mpp", "achieved_mpp", "patch_px", "level0_patch")}
    of_grid |= {"n_patches": len(item), "models": list(item.features), "grid_hash": header["grid_hash"]}
    root.attrs[HEADER] = {**shared, "grids": {key: of_grid}}
    grid = root.create_group(f"grids/{key}")
    grid.attrs[HEADER] = header
    index = item.coords[:, ::-1] // max(1, item.facts.patch_px_level0)
    _put(grid, "coords", item.coords, role="coords", units="level0_px")
    _put(grid, "grid_index", index.astype(np.int32), role="grid_index")
    for encoder, features in item.features.items():
        _put(grid, f"features/{encoder}", features, role="features", model=encoder)


def _put(grid: Any, name: str, values: np.ndarray, **attributes: str) -> None:
    chunks = (max(1, min(len(values), CHUNK_ROWS)), *values.shape[1:])
    array = grid.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, attributes=attributes)
    array[:] = values


def _header(item: ExportItem, cohort: ExportCohort) -> dict[str, Any]:
    side, mpp = item.facts.patch_px_level0, item.facts.mpp
    corners = item.coords // max(1, side)
    columns, rows = (int(corners[:, axis].max(initial=-1)) + 1 for axis in (0, 1))
    patching = {
        "target_mpp": cohort.mpp,
        "achieved_mpp": side * mpp / cohort.patch_px if mpp else cohort.mpp,
        "patch_px": cohort.patch_px,
        "level0_patch": side,
        "level0_step": side,
        "read_level": 0,
        "step_out_px": cohort.patch_px,
        "n_patches": len(item),
        "grid_shape": [rows, columns],
        "coords_convention": "level0_xy",
    }
    source = {
        "uri": item.facts.source,
        "slide_id": item.slide_id,
        "mpp_level0": mpp,
        "ngff_version": None,
        "reader": "g2l",
        "level_dimensions": [list(item.facts.level0_size)],
        "level_downsamples": [1.0],
    }
    return {
        "schema_version": VERSION,
        "source": source,
        "patching": patching,
        "models": {encoder: _model(cohort.encoders[encoder]) for encoder in item.features},
        "grid_hash": digest({"patching": patching, "coords": item.coords.tolist()}),
        "provenance": _provenance(),
        "g2l": cohort.attributes(item),
    }


def _model(facts: EncoderFacts) -> dict[str, Any]:
    spec: Mapping[str, Any] = facts.extra
    return {
        "source": facts.weights,
        "embedding_dim": facts.dim,
        "input_size": spec.get("input_px", 0),
        "pooling": facts.pooling,
        "mean": list(spec.get("mean", ())),
        "std": list(spec.get("std", ())),
        "interpolation": spec.get("interpolation", ""),
        "transform_source_url": "",
        "license": spec.get("licence", ""),
        "gated": bool(spec.get("gated", False)),
        "weights_sha256": facts.weights_digest or None,
        "weights_revision": None,
        "doi": None,
        "encoder_digest": facts.digest,
    }


def _provenance() -> dict[str, str | None]:
    """Nothing of the machine or the day is in it, so that equal stores give equal files."""
    nothing = dict.fromkeys(("created_utc", "cli", "git_sha", "host", "arch", "platform"))
    return {"raw2features_version": f"g2l {g2l_core.__version__}", "python": platform.python_version(), **nothing}
