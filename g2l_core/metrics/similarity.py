"""Linear CKA between the features of two encoders: exact in one pass, on all rows and without each cluster.

The bootstrap does not serve for CKA. It draws clusters several times over, and the debiased estimator is an average
over pairs of *different* rows: a row and its copy would count as such a pair, which puts back the products of rows with
themselves that debiasing removed. `intervals.estimate` only leaves clusters out.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.moments import CkaMoments, Side, cka_center, cka_moments
from g2l_core.metrics.patients import leave_out_groups
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.statistics import require_aligned

_DIGITS_LOST = 1e-11
"""A sum of squares smaller than this share of the terms it is the difference of has under five digits left."""


def _biased_hsic(moments: CkaMoments, left: Side, right: Side) -> float:
    """Return tr(KHLH) = |X'HY|^2, the biased HSIC without a factor that cancels in CKA."""
    p, q = moments.columns(left), moments.columns(right)
    cross = moments.gram[p, q] - np.outer(moments.total[p], moments.total[q]) / moments.n
    return float(np.vdot(cross, cross))


def _debiased_hsic(moments: CkaMoments, left: Side, right: Side) -> float:
    """Return HSIC1 of Song et al. (2012, equation 5) without the factor 1 / (n (n - 3)), which cancels in CKA.

    K and L have their diagonals k_i = |x_i|^2, l_i = |y_i|^2 set to zero, and with s = sum x, t = sum y:
    tr(KL) = |X'Y|^2 - sum k l;  1'K1 = s's - sum k;
    1'KL1 = sum_i (x_i's - k_i)(y_i't - l_i) = s'X'Yt - (sum k y)'t - (sum l x)'s + sum k l.
    """
    p, q, n = moments.columns(left), moments.columns(right), moments.n
    cross, s, t = moments.gram[p, q], moments.total[p], moments.total[q]
    diagonal = moments.norm_gram[left, right]
    trace = np.vdot(cross, cross) - diagonal
    ones = (s @ s - np.trace(moments.gram[p, p])) * (t @ t - np.trace(moments.gram[q, q]))
    mixed = s @ cross @ t - moments.norm_total[left, q] @ t - moments.norm_total[right, p] @ s + diagonal
    return float(trace + ones / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2))


def linear_cka(moments: CkaMoments, *, debiased: bool) -> float:
    """Compute linear centered kernel alignment of two encoders' features.

    CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)); biased, HSIC(X, Y) = |X'Y|_F^2 of centered X and Y.

    It is 1 where the features agree up to a rotation, a shift and one scale, and 0 where they are independent. The
    biased estimator does not fall to 0: for independent features it is 0.23 with 4,096 rows of 1,024 and
    1,536 dimensions, and 0.97 with 32 rows. The debiased one scatters about 0 and can be negative.

    Args:
        moments: From `moments.cka_moments`, of at least four rows.
        debiased: Whether to leave out each row's product with itself.

    Returns:
        The alignment.

    Raises:
        TaskError: If there are fewer than four rows, one encoder's features do not vary, or rounding has
            left fewer than five digits because the center is far from the mean.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited (2019), section 3;
        debiased: Song et al., Feature Selection via Dependence Maximization (2012), equation 5, as used by
        Nguyen et al., Do Wide and Deep Networks Learn the Same Things? (2021).

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((20, 3))
        >>> rotated = x[:, ::-1] * 5 + 1
        >>> round(linear_cka(cka_moments(x, rotated, center=cka_center(x, rotated)), debiased=True), 6)
        1.0
    """
    if moments.n < 4:
        raise TaskError(f"CKA needs at least 4 rows; got {moments.n}")
    hsic = _debiased_hsic if debiased else _biased_hsic
    own = hsic(moments, 0, 0), hsic(moments, 1, 1)
    for name, value, columns in zip("xy", own, (moments.columns(0), moments.columns(1)), strict=True):
        scale = float(np.linalg.norm(moments.gram[columns, columns])) ** 2
        if value <= _DIGITS_LOST * scale:
            raise TaskError(
                f"CKA is undefined: the {moments.n:,} rows of {name} are all alike but for rounding; "
                "if they are not, take the moments about their mean (cka_center)"
            )
    return hsic(moments, 0, 1) / (sqrt(own[0]) * sqrt(own[1]))


def leave_out_each(
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row_y dim_y"],
    clusters: Shaped[np.ndarray, " cluster_row"],
    debiased: bool,
    device: str = "cpu",
) -> Float64[np.ndarray, " whole_and_group"]:
    """Compute linear CKA of all rows, and without each group of clusters, for `intervals.Figure`.

    Args:
        x: (row, dim_x) features of one encoder; any float type.
        y: (row, dim_y) features of the other on the same patches.
        clusters: (row,) patient or slide of each row.
        debiased: See `linear_cka`.
        device: Where sums over rows are taken (see `moments.cka_moments`). Kernels of few rows, which cost little, stay
            on the CPU.

    Returns:
        The value, then the values without each group of `patients.leave_out_groups`; none where there is one cluster.

    Raises:
        TaskError: As `cka_moments` and `linear_cka`, which must hold without any one group too.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((60, 4))
        >>> patients = np.repeat(np.arange(6), 10)
        >>> leave_out_each(x, x + 1, patients, debiased=True).round(6).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if len(x) > x.shape[1] + y.shape[1]:  # whichever matrices are the smaller
        return leave_out_moments(partial(linear_cka, debiased=debiased), x, y, clusters, device)
    require_aligned(x=len(x), y=len(y), clusters=len(clusters))
    require_finite(x, "x")
    require_finite(y, "y")
    kernels = [_kernel(features) for features in (x, y)]
    kept = (np.flatnonzero(keep) for keep in _without_each(clusters))
    without = [kernel_cka(*(k[np.ix_(rows, rows)] for k in kernels), debiased=debiased) for rows in kept]
    return np.array([kernel_cka(kernels[0], kernels[1], debiased=debiased), *without])


def leave_out_moments(
    measure: Callable[[CkaMoments], float],
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row_y dim_y"],
    clusters: Shaped[np.ndarray, " cluster_row"],
    device: str = "cpu",
) -> Float64[np.ndarray, " whole_and_group"]:
    """Compute a measure that follows from moments for all rows, and without each group of clusters.

    The moments of a group are subtracted from those of all rows; those of one group at a time are held.

    Args:
        measure: Such as `linear_cka` or `alignment.procrustes_similarity`.
        x: (row, dim_x) features of one encoder.
        y: (row, dim_y) features of the other on the same patches.
        clusters: (row,) patient or slide of each row.
        device: See `moments.cka_moments`.

    Returns:
        As `leave_out_each`.

    Raises:
        TaskError: As `cka_moments` and the measure.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((40, 3))
        >>> leave_out_moments(partial(linear_cka, debiased=False), x, x + 1, np.repeat([1, 2], 20)).round(6).tolist()
        [1.0, 1.0, 1.0]
    """
    require_aligned(x=len(x), y=len(y), clusters=len(clusters))
    moments = partial(cka_moments, center=cka_center(x, y), device=device)
    whole = moments(x, y)
    without = [measure(whole - moments(x[~keep], y[~keep])) for keep in _without_each(clusters)]
    return np.array([measure(whole), *without])


def _without_each(clusters: Shaped[np.ndarray, " row"]) -> Iterator[Bool[np.ndarray, " row"]]:
    """Yield for each group of clusters which rows are outside it; nothing where there is one."""
    groups, count = leave_out_groups(clusters)
    return (groups != group for group in range(count if count > 1 else 0))


def _kernel(features: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, "row row"]:
    centered = features - features.mean(axis=0, dtype=np.float64)  # CKA does not see the shift, rounding does
    return centered @ centered.T


def kernel_cka(k: Float64[np.ndarray, "row row"], other: Float64[np.ndarray, "row row"], *, debiased: bool) -> float:
    """Compute centered kernel alignment of two kernels. With XX' and YY' it equals `linear_cka`.

    Args:
        k: (row, row) kernel of one encoder.
        other: (row, row) kernel of the other, of the same rows.
        debiased: See `linear_cka`.

    Returns:
        The alignment.

    Raises:
        TaskError: If there are fewer than four rows, or a kernel is constant but for rounding.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((20, 3))
        >>> round(kernel_cka(x @ x.T, 9 * x @ x.T, debiased=True), 6)
        1.0
    """
    n = len(k)
    if n < 4:
        raise TaskError(f"CKA needs at least 4 rows; got {n}")
    prepare, hsic = (_hollow, _hollow_hsic) if debiased else (_double_centered, np.vdot)
    left, right = prepare(k), prepare(other)
    own = float(hsic(left, left)), float(hsic(right, right))
    for name, value, kernel in zip("xy", own, (k, other), strict=True):
        if value <= _DIGITS_LOST * float(np.vdot(kernel, kernel)):
            raise TaskError(f"CKA is undefined: the {n:,} rows of {name} are all alike but for rounding")
    return float(hsic(left, right)) / (sqrt(own[0]) * sqrt(own[1]))


def _hollow(kernel: Float64[np.ndarray, "row row"]) -> Float64[np.ndarray, "row row"]:
    hollow = kernel.copy()
    np.fill_diagonal(hollow, 0.0)
    return hollow


def _double_centered(kernel: Float64[np.ndarray, "row row"]) -> Float64[np.ndarray, "row row"]:
    means = kernel.mean(axis=0)
    return kernel - means - means[:, None] + means.mean()


def _hollow_hsic(k: Float64[np.ndarray, "row row"], other: Float64[np.ndarray, "row row"]) -> float:
    """HSIC1 of Song et al. (2012, equation 5) of kernels with zero diagonals, but for its factor 1 / (n (n - 3))."""
    n, sums, other_sums = len(k), k.sum(axis=0), other.sum(axis=0)
    correction = sums.sum() * other_sums.sum() / ((n - 1) * (n - 2)) - 2 * (sums @ other_sums) / (n - 2)
    return float(np.vdot(k, other) + correction)
