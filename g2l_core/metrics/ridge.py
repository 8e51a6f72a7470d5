"""Ridge regression from features to another encoder's features or to continuous labels, scored on other rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.moments import CkaMoments, cka_center, cka_moments
from g2l_core.metrics.rows import require_finite, row_blocks
from g2l_core.metrics.statistics import cluster_codes, require_aligned

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""In mean variances of a feature."""


@dataclass(frozen=True, kw_only=True)
class RidgeMap:
    """y is predicted as mean_y + (x - mean_x) weights."""

    weights: Float64[np.ndarray, "dim_x dim_y"]
    mean_x: Float64[np.ndarray, " dim_x"]
    mean_y: Float64[np.ndarray, " dim_y"]
    penalty: float
    """The one chosen, in mean variances of a feature."""

    def predict(self, x: Float[np.ndarray, "row dim_x"]) -> Float64[np.ndarray, "row dim_y"]:
        """The predictions of rows."""
        return (x - self.mean_x) @ self.weights + self.mean_y


def fit_ridge(
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row_y dim_y"],
    groups: Shaped[np.ndarray, " group_row"],
    *,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int,
) -> RidgeMap:
    """Least squares with the penalty n v t |W|^2: n rows, v the mean variance of the columns of x, t from `penalties`.

    Of several penalties, the one with the least squared error over folds by group is taken, the greater of equals.
    Everything follows from second moments, so rows are read once and each fold costs one eigendecomposition.

    Args:
        x: Features of the training rows.
        y: What to predict, e.g. the teacher's features of the same patches, or labels in one column.
        groups: The slide or patient of each row; none is on both sides of a fold. Used for several penalties only.
        penalties: To choose from.
        folds: Number of folds.
        seed: Deals the groups into folds.

    Raises:
        TaskError: If lengths differ, a row holds NaN, x does not vary, a penalty is not positive, or there are fewer
            groups than folds.

    References:
        Hoerl & Kennard, Ridge Regression (1970), equation 2.1.
    """
    require_aligned(x=len(x), y=len(y), groups=len(groups))
    if not penalties or min(penalties) <= 0:
        raise TaskError(f"penalties are positive; got {list(penalties)}")
    center = cka_center(x, y)
    if len(penalties) == 1:
        whole = cka_moments(x, y, center=center)
        return _solve(whole, penalties)[0]
    codes, count = cluster_codes(groups)
    if count < folds:
        raise TaskError(f"there are {count} groups, fewer than the {folds} folds; use fewer")
    fold = (np.random.default_rng(seed).permutation(count) % folds)[codes]
    parts = [cka_moments(x[fold == f], y[fold == f], center=center) for f in range(folds)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    candidates = sorted(penalties, reverse=True)
    errors = np.zeros(len(candidates))
    for part in parts:
        errors += [_squared_error(found, part) for found in _solve(whole - part, candidates)]
    return _solve(whole, [candidates[int(np.argmin(errors))]])[0]


def _solve(moments: CkaMoments, penalties: Sequence[float]) -> list[RidgeMap]:
    """The maps for several penalties, from one eigendecomposition of X'X."""
    x, y, n = moments.columns(0), moments.columns(1), moments.n
    centered = moments.gram[x] - np.outer(moments.total[x], moments.total) / n
    values, vectors = np.linalg.eigh(centered[:, x])
    variance = float(values.sum()) / (n * len(values))
    if variance <= 0:
        raise TaskError(f"ridge regression needs features that vary; all {n:,} training rows are alike")
    rotated = vectors.T @ centered[:, y]
    mean = moments.center + moments.total / n
    return [
        RidgeMap(
            weights=vectors @ (rotated / (np.maximum(values, 0.0) + n * variance * penalty)[:, None]),
            mean_x=mean[x],
            mean_y=mean[y],
            penalty=penalty,
        )
        for penalty in penalties
    ]


def _squared_error(found: RidgeMap, moments: CkaMoments) -> float:
    """The sum of squared errors on the rows of some moments: of z = [x | y] (-W over I), moved to the map's means."""
    x, y = moments.columns(0), moments.columns(1)
    shift = np.concatenate([found.mean_x, found.mean_y]) - moments.center
    total = moments.total - moments.n * shift
    gram = moments.gram - np.outer(moments.total, shift) - np.outer(shift, total)
    cross = float(np.vdot(found.weights, gram[x, y]))
    fitted = float(np.vdot(found.weights, gram[x, x] @ found.weights))
    return float(np.trace(gram[y, y])) - 2 * cross + fitted


def ridge_sums(
    found: RidgeMap, x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row_y dim_y"]
) -> Float64[np.ndarray, "row 4"]:
    """What `explained_share` and `mean_cosine` need of each row; their sums over clusters can be bootstrapped.

    Args:
        found: A map that was fitted on other rows, of other slides.
        x: Features.
        y: What they should predict.

    Returns:
        Squared error, squared deviation from the training rows' mean, cosine between prediction and truth (NaN
        where one is 0), 1.

    Raises:
        TaskError: If lengths or widths differ, or a row holds NaN.
    """
    require_aligned(x=len(x), y=len(y))
    require_aligned(x_dim=x.shape[1], map_x_dim=len(found.mean_x))
    require_aligned(y_dim=y.shape[1], map_y_dim=len(found.mean_y))
    require_finite(x, "x")
    require_finite(y, "y")
    sums = np.ones((len(x), 4))
    for rows in row_blocks(len(x)):
        predicted, truth = found.predict(x[rows]), y[rows].astype(np.float64)
        sums[rows, 0] = ((predicted - truth) ** 2).sum(axis=1)
        sums[rows, 1] = ((truth - found.mean_y) ** 2).sum(axis=1)
        lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(truth, axis=1)
        products = np.einsum("ij,ij->i", predicted, truth)
        sums[rows, 2] = np.divide(products, lengths, out=np.full(len(products), np.nan), where=lengths > 0)
    return sums


def explained_share(sums: Float64[np.ndarray, "draw 4"]) -> Float64[np.ndarray, " draw"]:
    """R^2 out of sample: 1 - squared error / squared deviation from the training mean; below 0 where that does better.

    Columns of y count by their variance.

    References:
        Campbell & Thompson, Predicting Excess Stock Returns Out of Sample (2008), equation 1.
    """
    return 1 - np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)


def mean_cosine(sums: Float64[np.ndarray, "draw 4"]) -> Float64[np.ndarray, " draw"]:
    """The mean over rows of the cosine between the projected features and the truth."""
    return sums[:, 2] / sums[:, 3]


def correlation_sums(
    predicted: Float64[np.ndarray, " row"], truth: Float[np.ndarray, " truth_row"]
) -> Float64[np.ndarray, "row 6"]:
    """What `pearson` needs of each row, about the means of all: p, t, p^2, t^2, p t, 1.

    Raises:
        TaskError: If the lengths differ.
    """
    require_aligned(predicted=len(predicted), truth=len(truth))
    p, t = predicted - predicted.mean(), truth - truth.mean()
    return np.stack([p, t, p * p, t * t, p * t, np.ones(len(p))], axis=1)


def pearson(sums: Float64[np.ndarray, "draw 6"]) -> Float64[np.ndarray, " draw"]:
    """Pearson's correlation; NaN where one side does not vary."""
    p, t, pp, tt, pt, n = sums.T
    spread = (pp - p * p / n) * (tt - t * t / n)
    return np.divide(pt - p * t / n, np.sqrt(np.maximum(spread, 0)), out=np.full(len(n), np.nan), where=spread > 0)
