"""Intervals and tests by resampling whole clusters: patients, slides, or whatever is independent.

Rows of one patient are not independent, so patients are drawn, never rows. A draw evaluates no features again: a
statistic receives how often every cluster was drawn, and works from per-cluster sums (`of_sums`) or from row weights
(`of_weights`).
"""

from collections.abc import Callable, Iterator
from math import nan
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.results import Estimate

Statistic: TypeAlias = Callable[[Int64[np.ndarray, "draw cluster"]], Float64[np.ndarray, " draw"]]
"""Maps how often each cluster was drawn, in the order of their sorted names, to the metric value of each draw."""

_BLOCK = 1 << 22
"""Weights held at a time: 32 MiB."""


def require_aligned(**lengths: int) -> None:
    """Check that arrays which belong together are equally long.

    Args:
        **lengths: The length of each, by the name to print.

    Raises:
        TaskError: If they differ, or are 0.

    Examples:
        >>> require_aligned(features=3, labels=2)
        Traceback (most recent call last):
            ...
        g2l_core.errors.TaskError: these must have the same length, and not 0; got features 3, labels 2
    """
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise TaskError(f"these must have the same length, and not 0; got {listed}")


def cluster_codes(clusters: Shaped[np.ndarray, " row"]) -> tuple[Int64[np.ndarray, " row"], int]:
    """Number the clusters in the order of their sorted names.

    Args:
        clusters: (row,) patient or slide of each row, of any type that sorts.

    Returns:
        The (row,) number of each row's cluster, and how many clusters there are.

    Raises:
        TaskError: If there is no row.

    Examples:
        >>> codes, count = cluster_codes(np.array(["p2", "p1", "p2"]))
        >>> codes.tolist(), count
        ([1, 0, 1], 2)
    """
    require_aligned(clusters=len(clusters))
    names, codes = np.unique(clusters, return_inverse=True)
    return codes.astype(np.int64), len(names)


def cluster_sums(
    rows: Num[np.ndarray, "row column"], clusters: Shaped[np.ndarray, " cluster_row"]
) -> Num[np.ndarray, "cluster column"]:
    """Sum the rows of each cluster.

    Args:
        rows: (row, column) counts.
        clusters: (row,) cluster of each row.

    Returns:
        The (cluster, column) sums in the same dtype; clusters in the order of their sorted names.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> cluster_sums(np.array([[1, 0], [1, 1], [0, 1]]), np.array(["a", "b", "a"])).tolist()
        [[1, 1], [1, 1]]
    """
    require_aligned(rows=len(rows), clusters=len(clusters))
    codes, count = cluster_codes(clusters)
    sums = np.zeros((count, rows.shape[1]), rows.dtype)
    np.add.at(sums, codes, rows)
    return sums


def of_sums(
    score: Callable[[Num[np.ndarray, "draw *column"]], Float64[np.ndarray, " draw"]],
    sums: Num[np.ndarray, "cluster *column"],
) -> Statistic:
    """Return a statistic that follows from sums over rows: one matrix product for all draws.

    Args:
        score: Maps the (draw, ...) sums over all drawn rows to (draw,) metric values; NaN where undefined.
        sums: (cluster, ...) sums over each cluster, in the order of their sorted names.

    Examples:
        >>> accuracy = of_sums(lambda sums: sums[:, 0] / sums[:, 1], np.array([[1, 2], [3, 3]]))  # right, rows
        >>> accuracy(np.array([[1, 1], [0, 2]])).tolist()
        [0.8, 1.0]
    """
    exact = sums.astype(np.float64)  # counts below 2^53 are exact, and only floats go through BLAS
    return lambda drawn: score(np.tensordot(drawn.astype(np.float64), exact, axes=1))


def of_weights(
    score: Callable[[Int64[np.ndarray, "draw row"]], Float64[np.ndarray, " draw"]],
    clusters: Shaped[np.ndarray, " row"],
) -> Statistic:
    """Return a statistic that needs the weight of every row, such as the area under the ROC curve.

    Args:
        score: Maps (draw, row) integer weights to (draw,) metric values; NaN where undefined.
        clusters: (row,) cluster of each row.

    Examples:
        >>> values, patients = np.array([1.0, 2.0, 6.0]), np.array(["a", "a", "b"])
        >>> mean = of_weights(lambda weights: weights @ values / weights.sum(axis=1), patients)
        >>> mean(np.array([[1, 1], [0, 2]])).tolist()
        [3.0, 6.0]
    """
    codes, _ = cluster_codes(clusters)
    step = max(1, _BLOCK // len(codes))

    def statistic(drawn: Int64[np.ndarray, "draw cluster"]) -> Float64[np.ndarray, " draw"]:
        starts = range(0, len(drawn), step)
        return np.concatenate([score(drawn[start : start + step, codes]) for start in starts])

    return statistic


def _multiplicities(count: int, draws: int, seed: int) -> Iterator[Int64[np.ndarray, "draw cluster"]]:
    """Yield, in blocks of draws, how often each cluster is drawn by `count` picks with replacement."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // count)
    for start in range(0, draws, step):
        block = min(step, draws - start)
        picks = rng.integers(count, size=(block, count)) + count * np.arange(block)[:, None]
        yield np.bincount(picks.ravel(), minlength=block * count).reshape(block, count)


def _resample(statistic: Statistic, count: int, draws: int, seed: int) -> Float64[np.ndarray, " draw"]:
    return np.concatenate([statistic(drawn) for drawn in _multiplicities(count, draws, seed)])


def _value(statistic: Statistic, count: int) -> float:
    value = float(statistic(np.ones((1, count), np.int64))[0])
    if np.isnan(value):
        raise TaskError("the statistic is undefined (0 / 0) on the whole data, so it has no interval either")
    return value


def _percentile_interval(value: float, drawn: Float64[np.ndarray, " draw"], over: str) -> Estimate:
    defined = drawn[np.isfinite(drawn)]
    method = f"bootstrap over {over}, {len(drawn):,} draws"
    if len(defined) < len(drawn):
        method += f" ({len(drawn) - len(defined):,} undefined ones left out)"
    if not len(defined):
        return Estimate(value=value, method=method)
    low, high = np.percentile(defined, (2.5, 97.5))
    return Estimate(value=value, low=float(low), high=float(high), method=method)


def cluster_bootstrap(
    statistic: Statistic,
    clusters: Shaped[np.ndarray, " row"],
    *,
    unit: str = "clusters",
    draws: int = 1000,
    seed: int,
) -> Estimate:
    """Compute the 95 % percentile interval of a statistic when whole clusters are drawn with replacement.

    The interval reaches from the 2.5th to the 97.5th percentile of the values over draws. Percentile intervals are too
    narrow with few clusters (with ten, some 90 % hold the truth), so the method's text states their number.

    Args:
        statistic: From `of_sums` or `of_weights`, over the same clusters.
        clusters: (row,) cluster of each row.
        unit: What a cluster is, in the plural, for the method's text: "patients".
        draws: Number of resamples.
        seed: Random seed.

    Returns:
        The statistic on the data as it is, with its interval. The bounds are NaN where there is one cluster. Draws in
        which the statistic is undefined are left out, and the method's text counts them.

    Raises:
        TaskError: If there is no row, or the statistic is undefined on the whole data.

    References:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters: Davison &
        Hinkley, Bootstrap Methods (1997), section 3.8.

    Examples:
        >>> patients, right = np.array(["a", "a", "b", "c"]), np.array([1, 1, 0, 1])
        >>> sums = cluster_sums(np.stack([right, np.ones(4)], axis=1), patients)
        >>> accuracy = of_sums(lambda sums: sums[:, 0] / sums[:, 1], sums)
        >>> cluster_bootstrap(accuracy, patients, unit="patients", draws=200, seed=0)
        Estimate(value=0.75, low=0.0, high=1.0, method='bootstrap over 3 patients, 200 draws')
    """
    _, count = cluster_codes(clusters)
    value = _value(statistic, count)
    if count == 1:
        return Estimate(value=value, method=f"none: all rows are of one cluster ({unit})")
    return _percentile_interval(value, _resample(statistic, count, draws, seed), f"{count} {unit}")


def paired_bootstrap(
    statistic: Statistic,
    reference: Statistic,
    clusters: Shaped[np.ndarray, " row"],
    *,
    unit: str = "clusters",
    draws: int = 1000,
    seed: int,
) -> tuple[Estimate, float]:
    """Compare two encoders: the difference of their statistics, both taken on the same draws.

    Args:
        statistic: The encoder's; from `of_sums` or `of_weights`.
        reference: The reference encoder's, over the same rows.
        clusters: (row,) cluster of each row.
        unit: What a cluster is, in the plural.
        draws: Number of resamples.
        seed: Random seed.

    Returns:
        The difference (statistic - reference) with its 95 % percentile interval, and the two-sided p-value
        2 min(P(difference <= 0), P(difference >= 0)), each share counted as (1 + hits) / (1 + draws) so
        that it is never 0 (Davison & Hinkley 1997, equation 4.11). NaN where there is one cluster.

    Raises:
        TaskError: If there is no row, or a statistic is undefined on the whole data.

    Examples:
        >>> patients = np.array(["a", "b", "c"])
        >>> right = {"student": np.array([[3], [2], [3]]), "teacher": np.array([[1], [1], [3]])}  # of 3 rows each
        >>> student, teacher = (of_sums(lambda sums: sums[:, 0] / 9, right[name]) for name in right)
        >>> difference, p_value = paired_bootstrap(student, teacher, patients, draws=200, seed=0)
        >>> round(difference.value, 6), p_value < 0.1
        (0.333333, True)
    """

    def difference(drawn: Int64[np.ndarray, "draw cluster"]) -> Float64[np.ndarray, " draw"]:
        return statistic(drawn) - reference(drawn)

    _, count = cluster_codes(clusters)
    value = _value(difference, count)
    if count == 1:
        return Estimate(value=value, method=f"none: all rows are of one cluster ({unit})"), nan
    drawn = _resample(difference, count, draws, seed)
    defined = drawn[np.isfinite(drawn)]
    fewer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    p_value = min(1.0, 2 * (1 + fewer) / (1 + len(defined))) if len(defined) else nan
    return _percentile_interval(value, drawn, f"{count} {unit}"), p_value


def holm(p_values: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """Adjust p-values for multiple tests, by Holm's step-down method.

    Of m p-values in ascending order, the i-th becomes the maximum over j <= i of min(1, (m - j + 1) p_j).

    Args:
        p_values: (test,) p-values. NaN marks a test that could not be made; it stays NaN and does not count.

    Returns:
        The (test,) adjusted p-values. Where they are below 0.05, the tests hold at 5 % all together.

    Raises:
        TaskError: If a p-value is outside [0, 1].

    References:
        Holm, A simple sequentially rejective multiple test procedure (1979).

    Examples:
        >>> holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist()
        [0.03, 0.06, nan, 0.06]
    """
    made = np.flatnonzero(~np.isnan(p_values))
    if ((p_values[made] < 0) | (p_values[made] > 1)).any():
        raise TaskError(f"p-values lie in [0, 1]; got {p_values.tolist()}")
    order = made[np.argsort(p_values[made], kind="stable")]
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.full_like(p_values, nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
