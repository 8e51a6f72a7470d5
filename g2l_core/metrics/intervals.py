"""95 % intervals and tests over patients: each patient is left out in turn, and nothing is drawn with replacement.

A `Figure` holds a value on all patients and without each of them. `estimate` gives its interval, `compare` that of the
difference of two encoders with a p-value. docs/intervals.md has the measurements by which the methods were chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan, sqrt

import numpy as np
from jaxtyping import Bool, Float64, Int64, Num, Shaped
from scipy.special import expit, logit, stdtr, stdtrit

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import cluster_codes, require_aligned
from g2l_core.results import FEWEST, Estimate
from g2l_core.rng import keyed_generator

MAX_GROUPS = 32
"""Of more patients, this many random groups are left out where each costs a pass over the rows."""
MAX_SUMMED_GROUPS = 128
"""The same where all that is needed are sums."""
_ALL_SWAPS = 10
"""Up to this many binary choices, all exchanges of two encoders are tried: 1,024."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where a value's error is near symmetric: intervals are made there and brought back, so they keep its bounds."""

    to_line: Callable[[float], float]
    from_line: Callable[[float], float]
    slope: Callable[[float], float]
    """The derivative of `to_line`."""
    bounds: tuple[float, float]
    """The values that `to_line` sends to minus and plus infinity."""


LINE = Scale(to_line=float, from_line=float, slope=lambda value: 1.0, bounds=(-np.inf, np.inf))
SHARE = Scale(to_line=logit, from_line=expit, slope=lambda value: 1 / (value * (1 - value)), bounds=(0.0, 1.0))
POSITIVE = Scale(to_line=np.log, from_line=np.exp, slope=lambda value: 1 / value, bounds=(0.0, np.inf))
CORRELATION = Scale(to_line=np.arctanh, from_line=np.tanh, slope=lambda value: 1 / (1 - value**2), bounds=(-1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Design:
    """How the rows of a figure fall to the patients."""

    counts: Float64[np.ndarray, "group stratum"]
    """Rows of each group in each stratum: a figure that is a mean over classes has a stratum for each class."""
    strata: tuple[str, ...]
    """What each stratum is, for people: "class tumor"."""
    unit: str
    """What a cluster is, in the plural: "patients"."""
    clusters: int
    """How many there are; more than groups where they are many."""


def leave_out_groups(
    clusters: Shaped[np.ndarray, " row"], most: int = MAX_GROUPS
) -> tuple[Int64[np.ndarray, " row"], int]:
    """Number the clusters, or, where they are many, equal random groups of whole clusters.

    Args:
        clusters: (row,) patient or slide of each row.
        most: How many groups at most.

    Returns:
        The (row,) group of each row, and the number of groups.

    Examples:
        >>> groups, count = leave_out_groups(np.array(["b", "a", "b"]))
        >>> groups.tolist(), count
        ([1, 0, 1], 2)
    """
    codes, count = cluster_codes(clusters)
    if count <= most:
        return codes, count
    group_of = keyed_generator("jackknife groups", count).permutation(count) % most
    return group_of[codes], most


def design_of(
    clusters: Shaped[np.ndarray, " row"],
    strata: Shaped[np.ndarray, " stratum_row"] | None = None,
    *,
    unit: str,
    stratum: str = "class",
    most: int = MAX_SUMMED_GROUPS,
) -> Design:
    """Count the rows of each group of patients, by stratum.

    Args:
        clusters: (row,) patient or slide of each row.
        strata: (row,) class of each row, for figures that are means over classes; None for means over rows.
        unit: What a cluster is, in the plural.
        stratum: What a stratum is.
        most: How many groups at most; the same as for the figure's values.

    Returns:
        The design.

    Examples:
        >>> design_of(np.array(["p2", "p1", "p2"]), np.array([0, 1, 1]), unit="patients").counts.tolist()
        [[0.0, 1.0], [1.0, 1.0]]
    """
    strata = np.zeros(len(clusters), np.int64) if strata is None else strata
    require_aligned(clusters=len(clusters), strata=len(strata))
    codes, count = leave_out_groups(clusters, most)
    names, columns = np.unique(strata, return_inverse=True)
    counts = np.bincount(codes * len(names) + columns, minlength=count * len(names)).reshape(count, len(names))
    _, clusters_count = cluster_codes(clusters)
    return Design(
        counts=counts.astype(np.float64),
        strata=tuple(f"{stratum} {name}" for name in names.tolist()) if len(names) > 1 else ("row",),
        unit=unit,
        clusters=clusters_count,
    )


class Exchangeable(ABC):
    """What two encoders predict of the same patients, which can be exchanged patient by patient."""

    @abstractmethod
    def differences(
        self, other: "Exchangeable", exchanged: Bool[np.ndarray, "draw group"]
    ) -> Float64[np.ndarray, " draw"]:
        """The value of one encoder minus that of the other, after the two were exchanged for some patients."""


@dataclass(frozen=True, kw_only=True)
class OfSums(Exchangeable):
    """A value that follows from sums over the rows of each group."""

    score: Callable[[Num[np.ndarray, "draw *column"]], Float64[np.ndarray, " draw"]]
    sums: Num[np.ndarray, "group *column"]

    def differences(
        self, other: Exchangeable, exchanged: Bool[np.ndarray, "draw group"]
    ) -> Float64[np.ndarray, " draw"]:
        """See `Exchangeable.differences`."""
        assert isinstance(other, OfSums)
        own, others = (self.sums.astype(np.float64), other.sums.astype(np.float64))
        moved = np.tensordot(exchanged.astype(np.float64), others - own, axes=1)
        return self.score(own.sum(axis=0) + moved) - self.score(others.sum(axis=0) - moved)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of variation beside the patients tested: the value over its repetitions."""

    what: str
    """In words: "5 seeds"."""
    values: Float64[np.ndarray, " repetition"]
    share: float
    """The variance of the figure over that of one repetition: 1 / R where the figure is the mean of R."""
    paired: bool
    """Whether the same repetition of another encoder varies with it, as where both train on the same patients."""

    @property
    def variance(self) -> float:
        """Of the figure."""
        return float(self.values.var(ddof=1)) * self.share

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the variance."""
        return len(self.values) - 1

    def minus(self, other: "Source") -> "Source":
        """That of the difference of two encoders."""
        return replace(self, values=self.values - other.values)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric value of one encoder, on all patients and without each of them."""

    values: Float64[np.ndarray, " whole_and_group"]
    """The value on all rows; then, for each group of patients, the value without it."""
    design: Design
    scale: Scale = LINE
    exchange: Exchangeable | None = None
    """None where nothing can be exchanged, as for figures of pairs of patients."""
    more: tuple[Source, ...] = ()
    """Further sources of variation."""
    no_interval: str = ""
    """Why this kind of figure has no interval."""


def of_sums(
    score: Callable[[Num[np.ndarray, "draw *column"]], Float64[np.ndarray, " draw"]],
    rows: Num[np.ndarray, "row *column"],
    clusters: Shaped[np.ndarray, " row"],
    design: Design,
    scale: Scale = LINE,
) -> Figure:
    """Return the figure that follows from sums over rows, such as an accuracy.

    Args:
        score: Maps (draw, ...) sums over rows to (draw,) values; NaN where undefined.
        rows: (row, ...) what is summed.
        clusters: (row,) patient or slide of each row.
        design: Of the same clusters, with at most `MAX_SUMMED_GROUPS` groups.
        scale: On which the interval is made.

    Returns:
        The figure, whose encoders can be exchanged.

    Examples:
        >>> right, patients = np.array([1.0, 1.0, 0.0, 1.0]), np.array(["a", "a", "b", "c"])
        >>> rows = np.stack([right, np.ones(4)], axis=1)
        >>> figure = of_sums(lambda s: s[:, 0] / s[:, 1], rows, patients, design_of(patients, unit="patients"), SHARE)
        >>> figure.values.round(3).tolist()
        [0.75, 0.5, 1.0, 0.667]
    """
    require_aligned(rows=len(rows), clusters=len(clusters))
    codes, count = leave_out_groups(clusters, MAX_SUMMED_GROUPS)
    sums = np.zeros((count, *rows.shape[1:]), np.float64)
    np.add.at(sums, codes, rows)
    return of_group_sums(score, sums, design, scale)


def of_group_sums(
    score: Callable[[Num[np.ndarray, "draw *column"]], Float64[np.ndarray, " draw"]],
    sums: Num[np.ndarray, "group *column"],
    design: Design,
    scale: Scale = LINE,
) -> Figure:
    """Return the figure that follows from the (group, ...) sums over each group's rows. See `of_sums`."""
    require_aligned(sums=len(sums), groups=len(design.counts))
    exact = sums.astype(np.float64)  # counts below 2^53 are exact
    whole = exact.sum(axis=0, keepdims=True)
    values = score(np.concatenate([whole, whole - exact]))
    return Figure(values=values, design=design, scale=scale, exchange=OfSums(score=score, sums=exact))


def effective_freedom(design: Design) -> tuple[float, float]:
    """Compute by how much unequal patients mislead the jackknife, and its degrees of freedom.

    The mean of stratum s is sum_g a_gs y_gs with the share a_gs of group g in its rows. Without group h it moves by
    a_hs / (1 - a_hs) (y_hs - mean). Under a working model in which all y_gs have one variance and are independent,
    these moves are B y with a matrix B, the expectation of the jackknife's variance is (G - 1) / G tr(B B'), and its
    degrees of freedom are tr(B B')^2 / tr(B B' B B') (Satterthwaite). Patients of equal size give 1 and G - 1.

    Args:
        design: The rows of each group in each stratum.

    Returns:
        What the jackknife's variance is multiplied with to be unbiased under the working model; and the degrees of
        freedom, at least 1.

    References:
        Bell & McCaffrey, Bias Reduction in Standard Errors for Linear Regression with Multi-Stage Samples (2002);
        Satterthwaite, An Approximate Distribution of Estimates of Variance Components (1946).

    Examples:
        >>> effective_freedom(design_of(np.arange(10), unit="patients"))
        (1.0, 9.0)
    """
    shares = design.counts / design.counts.sum(axis=0)
    count = len(shares)
    moves = np.zeros((count, count))
    for share in shares.T:
        weight = share / np.maximum(1 - share, 1e-9)
        matrix = weight[:, None] * (np.eye(count) - share)
        moves += matrix @ matrix.T
    expected = float(np.trace(moves))
    freedom = expected**2 / float((moves**2).sum())
    return round(float((shares**2).sum()) / (expected * (count - 1) / count), 12), max(1.0, round(freedom, 12))


def _reason(figure: Figure) -> str:
    """Why a figure can have no interval; empty where it has one."""
    design = figure.design
    if figure.no_interval:
        return figure.no_interval
    if design.clusters < FEWEST:
        return f"{design.clusters} {design.unit}, and an interval needs {FEWEST}"
    held = (design.counts > 0).sum(axis=0)
    alone = [name for name, groups in zip(design.strata, held.tolist(), strict=True) if groups < 2]
    if alone:
        return f"all rows of {alone[0]} are of one of the {design.unit}"
    if not np.isfinite(figure.values).all():
        return f"undefined without one of the {design.unit}"
    return ""


def _error(figure: Figure) -> tuple[float, float]:
    """The standard error of a figure on its own axis, and its degrees of freedom."""
    without = figure.values[1:]
    factor, freedom = effective_freedom(figure.design)
    variance = factor * (len(without) - 1) / len(without) * float(((without - without.mean()) ** 2).sum())
    parts = [(variance, freedom), *((source.variance, float(source.freedom)) for source in figure.more)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0, freedom
    return sqrt(total), total**2 / sum(part**2 / of for part, of in parts)


def _value(figure: Figure) -> float:
    value = float(figure.values[0])
    if isnan(value):
        raise TaskError("the statistic is undefined (0 / 0) on the whole data, so it has no interval either")
    return value


def _method(figure: Figure, freedom: float) -> str:
    design, groups = figure.design, len(figure.design.counts)
    over = f"{design.clusters:,} {design.unit}" + (f" in {groups} groups" if groups < design.clusters else "")
    over = " and ".join([over, *(source.what for source in figure.more)])
    return f"jackknife over {over}, t with {freedom:.1f} degrees of freedom"


def estimate(figure: Figure, level: float = 0.95) -> Estimate:
    """Compute the interval of a figure.

    With G groups, values v_g without each and their mean m, the variance is f (G - 1) / G sum_g (v_g - m)^2, with the
    factor f and the t quantile's degrees of freedom from `effective_freedom`. On the figure's scale, such as the logit
    of a share, the interval is symmetric. Where a share is 0 or 1 for every patient, the bound is that of as many
    patients of whom all succeed (Clopper & Pearson): 0.025^(1 / G).

    Args:
        figure: The value on all patients, and without each.
        level: The share of intervals that are to hold the truth.

    Returns:
        The estimate. The bounds are NaN where there can be no interval, and `method` says why.

    Raises:
        TaskError: If the value on all patients is undefined.

    References:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), equation 11.5; Arvesen, Jackknifing U-Statistics
        (1969); Kott, The Delete-a-Group Jackknife (2001).

    Examples:
        >>> figure = Figure(values=np.array([0.5, 0.4, 0.5, 0.6, 0.5]), design=design_of(np.arange(4), unit="slides"))
        >>> found = estimate(figure)
        >>> round(found.low, 3), round(found.high, 3), found.method
        (0.11, 0.89, 'jackknife over 4 slides, t with 3.0 degrees of freedom')
    """
    value, design = _value(figure), figure.design
    reason = _reason(figure)
    if reason:
        return Estimate(value=value, method=f"none: {reason}", clusters=design.clusters, unit=design.unit)
    error, freedom = _error(figure)
    low, high = _bounds(figure, value, float(stdtrit(freedom, (1 + level) / 2)) * error, (1 - level) / 2)
    return Estimate(
        value=value,
        low=low,
        high=high,
        method=_method(figure, freedom),
        clusters=design.clusters,
        unit=design.unit,
    )


def _bounds(figure: Figure, value: float, half: float, tail: float) -> tuple[float, float]:
    scale, (least, most) = figure.scale, figure.scale.bounds
    if least < value < most:
        middle, reach = scale.to_line(value), half * scale.slope(value)
        return float(scale.from_line(middle - reach)), float(scale.from_line(middle + reach))
    if scale is not SHARE:
        return value - half, value + half
    bound = tail ** (1 / len(figure.design.counts))
    return (bound, 1.0) if value >= 1 else (0.0, 1 - bound)


def averaged(figures: Sequence[Figure], what: str) -> Figure:
    """Return the mean of a metric over repetitions, such as students that differ in their seed.

    A two-level model: the patients are those of all repetitions, so the mean is left out patient by patient; and the
    repetitions' own variance s^2 / R is added, with R - 1 degrees of freedom.

    Args:
        figures: The repetitions' figures on the same rows, two at least.
        what: What a repetition is, in the plural: "seeds".

    Returns:
        The figure of the mean.

    Raises:
        TaskError: If there are fewer than two.
    """
    if len(figures) < 2:
        raise TaskError(f"a mean over {what} needs two at least; got {len(figures)}")
    values = np.stack([figure.values for figure in figures])
    source = Source(what=f"{len(figures)} {what}", values=values[:, 0], share=1 / len(figures), paired=False)
    return replace(figures[0], values=values.mean(axis=0), exchange=None, more=(*figures[0].more, source))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two encoders differ in one metric."""

    estimate: Estimate
    p_value: float
    """Two-sided, of the hypothesis that the two are equal; NaN where there can be none."""
    p_equivalent: float
    """Of the hypothesis that they differ by the margin or more; NaN where there can be none."""


def compare(figure: Figure, reference: Figure, *, draws: int = 1000, seed: int, margin: float) -> Difference:
    """Compare two encoders by the difference of their figures on the same patients.

    The interval is `estimate`'s, of the differences without each patient: what the two share cancels. The p-value comes
    from exchanging the two encoders for some patients, all 2^(G - 1) ways or, of more, `draws` random ones. Where
    nothing can be exchanged it is that of the t test, but never below 2^(1 - G), the least that exchanging G patients
    could give.

    Two one-sided t tests judge equivalence: `p_equivalent` is the larger p-value of "lower by the margin or more" and
    "higher by the margin or more".

    Args:
        figure: The encoder's.
        reference: The reference encoder's, with the same design.
        draws: Number of random exchanges.
        seed: Random seed of them.
        margin: By how much two encoders may differ and still count as equally good, in the metric's own unit.

    Returns:
        The difference, figure minus reference.

    Raises:
        TaskError: If a figure is undefined on all patients.

    References:
        Good, Permutation, Parametric, and Bootstrap Tests of Hypotheses (2005), section 7.3; Schuirmann, A Comparison
        of the Two One-Sided Tests Procedure (1987).

    Examples:
        >>> design = design_of(np.arange(5), unit="patients")
        >>> mean = lambda sums: sums[:, 0] / 5
        >>> student, teacher = (of_group_sums(mean, np.array([sums]).T, design) for sums in ([3, 2, 3, 3, 2], [1] * 5))
        >>> found = compare(student, teacher, seed=0, margin=0.1)
        >>> round(found.estimate.value, 3), found.p_value
        (1.6, 0.0625)
    """
    both = replace(
        figure,
        values=figure.values - reference.values,
        scale=LINE,
        more=_of_difference(figure.more, reference.more),
        no_interval=figure.no_interval or reference.no_interval,
    )
    found = estimate(both)
    comparable = not _reason(replace(both, no_interval=""))
    if not comparable:
        return Difference(estimate=found, p_value=nan, p_equivalent=nan)
    value, (error, freedom) = found.value, _error(both)
    if figure.exchange and reference.exchange and not both.more:
        p_value = _exchange_test(figure.exchange, reference.exchange, len(figure.design.counts), draws, seed)
    else:
        p_value = max(_tail(-abs(value), error, freedom) * 2, 2.0 ** (1 - len(figure.design.counts)))
    equivalent = nan if both.no_interval else _tail(abs(value) - margin, error, freedom)
    return Difference(estimate=found, p_value=min(1.0, p_value), p_equivalent=equivalent)


def _of_difference(more: Sequence[Source], other: Sequence[Source]) -> tuple[Source, ...]:
    """The sources of a difference: what is paired is subtracted, all else adds up."""
    theirs = {source.what: source for source in other if source.paired}
    own = [
        source.minus(theirs.pop(source.what)) if source.paired and source.what in theirs else source for source in more
    ]
    return (*own, *(source for source in other if not source.paired), *theirs.values())


def _tail(distance: float, error: float, freedom: float) -> float:
    """P(T <= distance / error)."""
    return float(stdtr(freedom, distance / error)) if error else float(distance >= 0) if distance else 0.5


def _exchange_test(first: Exchangeable, second: Exchangeable, groups: int, draws: int, seed: int) -> float:
    """The share of exchanges whose difference is as large as that found. Undefined ones count as large."""
    if groups - 1 <= _ALL_SWAPS:
        exchanged = (np.arange(2 ** (groups - 1))[:, None] >> np.arange(groups) & 1).astype(bool)
    else:
        exchanged = keyed_generator("exchanges", seed, groups).integers(2, size=(1 + draws, groups)).astype(bool)
        exchanged[0] = False
    differences = np.abs(first.differences(second, exchanged))
    return float((~(differences < differences[0] * (1 - 1e-9) - 1e-12)).mean())
