"""What a report plots, as arrays: CKA of all pairs, principal components, cells of a slide in color."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from sklearn.decomposition import PCA

from g2l_core.errors import TaskError
from g2l_core.metrics.moments import cka_center, cka_moments
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.similarity import linear_cka
from g2l_core.metrics.statistics import require_aligned
from g2l_core.rng import keyed_generator

_LOWEST, _HIGHEST = 0.01, 0.99
"""Quantiles of a component that are drawn darkest and brightest, so that a few odd patches do not dim the rest."""
_FLAT = 1e-12
_UMAP_NEIGHBORS = 15


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Patches of a slide put together in square cells of a grid."""

    columns: Int64[np.ndarray, " cell"]
    rows: Int64[np.ndarray, " cell"]
    of_patch: Int64[np.ndarray, " patch"]
    """The cell that each patch is in."""
    side: int
    """The side of a cell in level-0 pixels."""


def chosen_rows(rows: int, max_rows: int, seed: int) -> Int64[np.ndarray, " chosen"]:
    """All rows, or `max_rows` of them drawn by the seed, in ascending order."""
    if rows <= max_rows:
        return np.arange(rows)
    return np.sort(keyed_generator("pictured rows", seed, rows).permutation(rows)[:max_rows])


def cka_matrix(features: Mapping[str, Float[np.ndarray, "_ _"]]) -> Float64[np.ndarray, "encoder encoder"]:
    """Debiased linear CKA of every pair of encoders, from the exact moments of `similarity.cka_moments`.

    Args:
        features: By encoder, of any width, of the same patches in the same order.

    Returns:
        A row and a column an encoder in the mapping's order; NaN where the CKA of a pair is undefined.

    Raises:
        TaskError: If the lengths differ, there are fewer than four rows, or one holds NaN or infinity.
    """
    names = list(features)
    require_aligned(**{f"rows of {name}": len(features[name]) for name in names})
    for name in names:
        require_finite(features[name], name)
        if len(features[name]) < 4:
            raise TaskError(f"CKA needs at least 4 rows; got {len(features[name])}")
    matrix = np.eye(len(names))
    for i, j in combinations(range(len(names)), 2):
        matrix[i, j] = matrix[j, i] = _pair_cka(features[names[i]], features[names[j]])
    flat = [i for i, name in enumerate(names) if _is_flat(features[name])]
    matrix[flat, flat] = np.nan
    return matrix


def _is_flat(features: Float[np.ndarray, "row dim"]) -> bool:
    return bool((features == features[0]).all())


def _pair_cka(x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row dim_y"]) -> float:
    try:
        return linear_cka(cka_moments(x, y, center=cka_center(x, y)), debiased=True)
    except TaskError:  # one of the two does not vary; the other pairs still have a value
        return float("nan")


def principal_components(features: Float[np.ndarray, "row dim"], count: int) -> PCA:
    """The first principal components of features, exact to rounding.

    ARPACK finds a few components of some thousand rows about as fast as an eigensolver for just these, and several
    times faster than the solver of all components.

    Args:
        features: Of any float type; cast to float64.
        count: How many components to find.

    Returns:
        A fitted `sklearn.decomposition.PCA`, which makes the largest entry of each component positive.

    Raises:
        TaskError: If a row holds NaN or infinity, or the features vary along fewer directions than `count`.
    """
    require_finite(features, "the features")
    rows, fewest = len(features), min(features.shape)
    if fewest >= count and not _is_flat(features):
        solver = "arpack" if count < fewest else "full"
        fitted = PCA(count, svd_solver=solver, random_state=0).fit(features.astype(np.float64))
        if fitted.explained_variance_ratio_[-1] > _FLAT:
            return fitted
    raise TaskError(f"{rows:,} rows vary along fewer than {count} directions; more rows or wider features are needed")


def umap_plane(features: Float[np.ndarray, "row dim"], seed: int) -> Float64[np.ndarray, "row 2"] | None:
    """UMAP of features in the plane, with umap-learn's defaults.

    Returns:
        None where that package is not installed, or the rows are no more than its 15 neighbors.

    References:
        McInnes, Healy & Melville, UMAP: Uniform Manifold Approximation and Projection (2018).
    """
    if len(features) <= _UMAP_NEIGHBORS or not _has_umap():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of a part that needs TensorFlow
        from umap import UMAP
    return np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(features.astype(np.float32)), np.float64)


def _has_umap() -> bool:
    """Whether umap-learn is installed. Its name on the index is asked, as another package is imported as `umap` too."""
    try:
        version("umap-learn")
    except PackageNotFoundError:
        return False
    return True


def within_unit(points: Float64[np.ndarray, "row 2"]) -> Float64[np.ndarray, "row 2"]:
    """Points minus their mean, scaled by one factor so that the furthest coordinate is 1 or -1."""
    centered = points - points.mean(axis=0)
    furthest = np.abs(centered).max()
    return centered / furthest if furthest else centered


def coded(names: Shaped[np.ndarray, " row"]) -> tuple[tuple[str, ...], Int64[np.ndarray, " row"]]:
    """The sorted names, and each row's place among them."""
    unique, codes = np.unique(names, return_inverse=True)
    return tuple(map(str, unique)), codes


def cells_of(coords: Shaped[np.ndarray, "patch 2"], side: int, max_cells: int) -> Cells:
    """Put patches into cells as small as their own side, or the smallest multiple of it that gives few enough cells.

    Args:
        coords: x and y of top-left corners in level-0 pixels; any integer type.
        side: The side of a patch in level-0 pixels.
        max_cells: Maximum number of cells.
    """
    corners = coords.astype(np.int64) - coords.min(axis=0)
    times = 1
    while True:
        places, of_patch = np.unique(corners // (side * times), axis=0, return_inverse=True)
        if len(places) <= max_cells:
            return Cells(columns=places[:, 0], rows=places[:, 1], of_patch=of_patch.reshape(-1), side=side * times)
        times += 1


def means_of_cells(
    scores: Float64[np.ndarray, "patch component"], of_patch: Int64[np.ndarray, " patch"]
) -> Float64[np.ndarray, "cell component"]:
    """The mean of each cell's patches."""
    require_aligned(scores=len(scores), cells=len(of_patch))
    totals = np.zeros((of_patch.max() + 1, scores.shape[1]))
    np.add.at(totals, of_patch, scores)
    return totals / np.bincount(of_patch)[:, None]


def component_colors(scores: Float64[np.ndarray, "cell 3"]) -> list[str]:
    """Three components as red, green and blue, one hexadecimal digit each: 0 at the 1st percentile, f at the 99th."""
    low, high = np.quantile(scores, [_LOWEST, _HIGHEST], axis=0)
    shares = (scores - low) / np.where(high > low, high - low, 1.0)
    digits = np.rint(np.clip(shares, 0, 1) * 15).astype(int)
    return ["".join(f"{digit:x}" for digit in cell) for cell in digits.tolist()]
