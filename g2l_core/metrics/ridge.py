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
"""Default candidates, in mean variances of a feature."""


@dataclass(frozen=True, kw_only=True)
class RidgeMap:
    """A fitted linear map: y is predicted as mean_y + (x - mean_x) weights."""

    weights: Float64[np.ndarray, "dim_x dim_y"]
    mean_x: Float64[np.ndarray, " dim_x"]
    mean_y: Float64[np.ndarray, " dim_y"]
    penalty: float
    """The penalty that was chosen, in mean variances of a feature."""

    def predict(self, x: Float[np.ndarray, "row dim_x"]) -> Float64[np.ndarray, "row dim_y"]:
        """Return the (row, dim_y) predictions."""
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
    """Fit least squares with a ridge penalty: minimize |Y - X W|^2 + n v t |W|^2 of centered X and Y.

    n is the number of rows, v the mean variance of the columns of x, and t one of `penalties`. Of several penalties,
    the one with the least squared error over folds by group is taken, the greater of equals. Everything follows from
    second moments, so rows are read once and each fold costs one eigendecomposition.

    Args:
        x: (row, dim_x) features of the training rows.
        y: (row, dim_y) what to predict, such as the teacher's features of the same patches, or labels in one column.
        groups: (row,) slide or patient of each row; none is on both sides of a fold. Used for several penalties only.
        penalties: Candidates for t.
        folds: Number of folds.
        seed: Random seed that deals the groups into folds.

    Returns:
        The fitted map.

    Raises:
        TaskError: If lengths differ, a row holds NaN, x does not vary, a penalty is not positive, or there are fewer
            groups than folds.

    References:
        Hoerl & Kennard, Ridge Regression (1970), equation 2.1.

    Examples:
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> ridge = fit_ridge(x, 2 * x + 1, np.arange(4), penalties=[1e-6], seed=0)
        >>> ridge.predict(np.array([[4.0]])).round(3).tolist()
        [[9.0]]
    """
    require_aligned(x=len(x), y=len(y), groups=len(groups))
    if not penalties or min(penalties) <= 0:
        raise TaskError(f"penalties are positive; got {list(penalties)}")
    center = cka_center(x, y)
    if len(penalties) == 1:
        whole = cka_moments(x, y, center=center)
        return _solution(_decompose(whole), penalties[0])
    codes, count = cluster_codes(groups)
    if not 2 <= folds <= count:
        raise TaskError(
            f"a penalty is chosen on 2 folds at least, and as many groups; got {folds} folds, {count} groups"
        )
    fold = (np.random.default_rng(seed).permutation(count) % folds)[codes]
    parts = [cka_moments(x[fold == f], y[fold == f], center=center) for f in range(folds)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    candidates = sorted(penalties, reverse=True)
    errors = np.zeros(len(candidates))
    for part in parts:
        errors += _squared_errors(_decompose(whole - part), part, candidates)
    return _solution(_decompose(whole), candidates[int(np.argmin(errors))])


@dataclass(frozen=True)
class _Eigen:
    """X'X = V diag(values) V' of centered training rows, from which the map of every penalty follows."""

    values: Float64[np.ndarray, " dim_x"]
    vectors: Float64[np.ndarray, "dim_x dim_x"]
    cross: Float64[np.ndarray, "dim_x dim_y"]
    """V' X'Y."""
    mean: Float64[np.ndarray, " dim_x_and_y"]
    unit: float
    """What a penalty of 1 adds to the values: the number of rows times the mean variance of a column of x."""

    def shrunk(self, penalty: float) -> Float64[np.ndarray, " dim_x"]:
        """The inverse of the penalized values: the map is V diag(shrunk) V' X'Y."""
        return 1 / (np.maximum(self.values, 0.0) + self.unit * penalty)


def _decompose(moments: CkaMoments) -> _Eigen:
    x, y, n = moments.columns(0), moments.columns(1), moments.n
    centered = moments.gram[x] - np.outer(moments.total[x], moments.total) / n
    values, vectors = np.linalg.eigh(centered[:, x])
    unit = float(values.sum()) / len(values)
    if unit <= 0:
        raise TaskError(f"ridge regression needs features that vary; all {n:,} training rows are alike")
    mean = moments.center + moments.total / n
    return _Eigen(values=values, vectors=vectors, cross=vectors.T @ centered[:, y], mean=mean, unit=unit)


def _solution(of: _Eigen, penalty: float) -> RidgeMap:
    dim = len(of.values)
    weights = of.vectors @ (of.cross * of.shrunk(penalty)[:, None])
    return RidgeMap(weights=weights, mean_x=of.mean[:dim], mean_y=of.mean[dim:], penalty=penalty)


def _squared_errors(of: _Eigen, moments: CkaMoments, penalties: Sequence[float]) -> Float64[np.ndarray, " penalty"]:
    """Return the sum of squared errors of each penalty's map over other rows, of which the moments are known.

    With A = V diag(s) C for the map, and G the other rows' products about the map's means, tr (Y - XA)'(Y - XA) is
    tr G_yy - 2 tr A'G_xy + tr A'G_xx A = tr G_yy - 2 s'c + s'Ms, with c_i = C_i (V'G_xy)_i and M = V'G_xx V * CC'. So
    products of matrices are taken once and not for each penalty.
    """
    x, y = moments.columns(0), moments.columns(1)
    shift = of.mean - moments.center
    total = moments.total - moments.n * shift
    gram = moments.gram - np.outer(moments.total, shift) - np.outer(shift, total)
    linear = (of.cross * (of.vectors.T @ gram[x, y])).sum(axis=1)
    square = (of.vectors.T @ gram[x, x] @ of.vectors) * (of.cross @ of.cross.T)
    scales = np.stack([of.shrunk(penalty) for penalty in penalties])
    return np.trace(gram[y, y]) - 2 * scales @ linear + ((scales @ square) * scales).sum(axis=1)


def ridge_sums(
    ridge: RidgeMap, x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row_y dim_y"]
) -> Float64[np.ndarray, "row 4"]:
    """Compute what `explained_share` and `mean_cosine` need of each row; sums over clusters give intervals.

    Args:
        ridge: A map that was fitted on other rows, of other slides.
        x: (row, dim_x) features.
        y: (row, dim_y) what they should predict.

    Returns:
        (row, 4): squared error, squared deviation from the training rows' mean, cosine between prediction and truth
        (NaN where one is 0), 1.

    Raises:
        TaskError: If lengths or widths differ, or a row holds NaN.

    Examples:
        >>> ridge = RidgeMap(weights=np.array([[2.0]]), mean_x=np.zeros(1), mean_y=np.ones(1), penalty=0.1)
        >>> ridge_sums(ridge, np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])).tolist()
        [[0.0, 4.0, 1.0, 1.0], [1.0, 9.0, 1.0, 1.0]]
    """
    require_aligned(x=len(x), y=len(y))
    require_aligned(x_dim=x.shape[1], map_x_dim=len(ridge.mean_x))
    require_aligned(y_dim=y.shape[1], map_y_dim=len(ridge.mean_y))
    require_finite(x, "x")
    require_finite(y, "y")
    sums = np.ones((len(x), 4))
    for rows in row_blocks(len(x)):
        predicted, truth = ridge.predict(x[rows]), y[rows].astype(np.float64)
        sums[rows, 0] = ((predicted - truth) ** 2).sum(axis=1)
        sums[rows, 1] = ((truth - ridge.mean_y) ** 2).sum(axis=1)
        lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(truth, axis=1)
        products = np.einsum("ij,ij->i", predicted, truth)
        sums[rows, 2] = np.divide(products, lengths, out=np.full(len(products), np.nan), where=lengths > 0)
    return sums


def explained_share(sums: Float64[np.ndarray, "draw 4"]) -> Float64[np.ndarray, " draw"]:
    """Compute R^2 out of sample: 1 - sum |y - prediction|^2 / sum |y - training mean|^2.

    It is negative where the training mean predicts better. Columns of y count by their variance.

    Args:
        sums: (draw, 4) sums from `ridge_sums`, added up over the clusters of each draw.

    Returns:
        The (draw,) values; NaN where y does not differ from the training mean.

    References:
        Campbell & Thompson, Predicting Excess Stock Returns Out of Sample (2008), equation 1.

    Examples:
        >>> explained_share(np.array([[1.0, 13.0, 2.0, 2.0]])).round(4).tolist()
        [0.9231]
    """
    return 1 - np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)


def mean_cosine(sums: Float64[np.ndarray, "draw 4"]) -> Float64[np.ndarray, " draw"]:
    """Compute the mean over rows of the cosine between prediction and truth; arguments as of `explained_share`.

    Examples:
        >>> mean_cosine(np.array([[1.0, 13.0, 1.5, 2.0]])).tolist()
        [0.75]
    """
    return sums[:, 2] / sums[:, 3]


def correlation_sums(
    predicted: Float64[np.ndarray, " row"], truth: Float[np.ndarray, " truth_row"]
) -> Float64[np.ndarray, "row 6"]:
    """Compute what `pearson` needs of each row, about the mean of the truth, which is the same for every encoder.

    Args:
        predicted: (row,) predictions.
        truth: (row,) true values.

    Returns:
        (row, 6): p, t, p^2, t^2, p t, 1.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> correlation_sums(np.array([1.0, 3.0]), np.array([2.0, 6.0])).tolist()
        [[-3.0, -2.0, 9.0, 4.0, 6.0, 1.0], [-1.0, 2.0, 1.0, 4.0, -2.0, 1.0]]
    """
    require_aligned(predicted=len(predicted), truth=len(truth))
    p, t = predicted - truth.mean(), truth - truth.mean()
    return np.stack([p, t, p * p, t * t, p * t, np.ones(len(p))], axis=1)


def pearson(sums: Float64[np.ndarray, "draw 6"]) -> Float64[np.ndarray, " draw"]:
    """Compute Pearson's correlation: cov(p, t) / sqrt(var(p) var(t)).

    Args:
        sums: (draw, 6) sums from `correlation_sums`, added up over the clusters of each draw.

    Returns:
        The (draw,) correlations; NaN where one side does not vary.

    Examples:
        >>> sums = correlation_sums(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        >>> pearson(sums.sum(axis=0, keepdims=True)).round(6).tolist()
        [1.0]
    """
    p, t, pp, tt, pt, n = sums.T
    spread = (pp - p * p / n) * (tt - t * t / n)
    return np.divide(pt - p * t / n, np.sqrt(np.maximum(spread, 0)), out=np.full(len(n), np.nan), where=spread > 0)
