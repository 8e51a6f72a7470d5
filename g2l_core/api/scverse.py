"""A cohort as AnnData, for scanpy and its kin, and a slide as SpatialData."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from g2l_core.api.arrays import feature_array
from g2l_core.api.frames import patch_frame
from g2l_core.api.optional import require
from g2l_core.api.selection import Part, whole_parts
from g2l_core.errors import UsageError
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore

if TYPE_CHECKING:
    import anndata
    import spatialdata


def annotated_data(
    store: FeatureStore,
    parts: Sequence[Part],
    encoders: Sequence[str],
    *,
    view: int,
    max_patches: int | None,
    seed: int,
) -> "anndata.AnnData":
    """The AnnData that `Cohort.anndata` describes."""
    module = require("anndata", "anndata", "store.anndata")
    if not encoders:
        raise UsageError("name at least one encoder")
    for encoder in encoders:
        whole_parts(parts, encoder, view)
    readable = [part.readable() for part in parts]
    drawn = _drawn(readable, max_patches, seed)
    frame = patch_frame(drawn)
    frame.index = [f"{slide_id}#{row}" for slide_id, row in zip(frame["slide_id"], frame["row"], strict=True)]
    first, *others = [
        feature_array(drawn, encoder, store.encoders[encoder].dim, view=view).astype(np.float32) for encoder in encoders
    ]
    facts: dict[str, Any] = {
        "encoders": list(encoders),
        "digests": {key: store.encoders[key].digest for key in encoders},
        "view": view,
        "mpp": store.grid["mpp"],
        "patch_px": store.grid["patch_px"],
        "patches_before_draw": sum(map(len, readable)),
    }
    cells = module.AnnData(X=first, obs=frame, uns={"g2l": facts})
    cells.obsm["spatial"] = frame[["x", "y"]].to_numpy()
    for encoder, features in zip(encoders[1:], others, strict=True):
        cells.obsm[f"X_{encoder}"] = features
    return cells


SQUARES = "patches"
"""The name of the squares in SpatialData."""


def spatial_data(cells: "anndata.AnnData", slides: pd.DataFrame) -> "spatialdata.SpatialData":
    """The SpatialData that `Cohort.spatialdata` describes.

    Args:
        cells: The patches of one slide.
        slides: The table of slides.

    Raises:
        UsageError: spatialdata is not installed, or the patches are images without coordinates.
    """
    module, models, frames, shapely, geopandas = (
        require(name, "spatialdata", "SpatialData")
        for name in ("spatialdata", "spatialdata.models", "spatialdata.transformations", "shapely", "geopandas")
    )
    slide = slides.set_index("slide_id").loc[cells.obs["slide_id"].iloc[0]]
    if slide["kind"] != "slide":
        raise UsageError(f"{slide.name} is a set of patch images: SpatialData needs coordinates on a slide")
    (left, top), side = np.asarray(cells.obsm["spatial"], float).T, float(slide["patch_px_level0"])
    squares = geopandas.GeoDataFrame(geometry=shapely.box(left, top, left + side, top + side), index=cells.obs_names)
    systems = {"global": frames.Identity()}
    if slide["mpp"] > 0:
        systems["um"] = frames.Scale([slide["mpp"], slide["mpp"]], axes=("x", "y"))
    cells.obs["region"] = pd.Categorical([SQUARES] * len(cells))
    cells.obs["patch"] = cells.obs_names.to_numpy()
    table = models.TableModel.parse(cells, region=SQUARES, region_key="region", instance_key="patch")
    shapes = models.ShapesModel.parse(squares, transformations=systems)
    return module.SpatialData(shapes={SQUARES: shapes}, tables={"features": table})


def _drawn(parts: Sequence[Part], limit: int | None, seed: int) -> list[Part]:
    """At most so many patches of all slides, each with the same chance."""
    total = sum(map(len, parts))
    if limit is None or total <= limit:
        return list(parts)
    drawn = np.sort(keyed_generator("anndata", seed).choice(total, limit, replace=False))
    edges = np.searchsorted(drawn, np.cumsum([0, *map(len, parts)]))
    starts = np.cumsum([0, *map(len, parts)])
    inside = [drawn[a:b] - start for a, b, start in zip(edges[:-1], edges[1:], starts[:-1], strict=True)]
    return [replace(p, chosen=p.rows[i]) for p, i in zip(parts, inside, strict=True) if len(i)]
