"""95 % intervals and tests over patients: each patient is left out in turn, and nothing is drawn with replacement.

A `Figure` holds a value on all patients and without each of them. `estimate` gives its interval, `compare` that of the
difference of two encoders with a p-value. docs/intervals.md has the measurements by which the methods were chosen.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot, isnan, nan, sqrt

import numpy as np
from jaxtyping import Float64, Num, Shaped
from scipy.special import stdtr, stdtrit

from g2l_core.errors import TaskError
from g2l_core.metrics.exchange import Exchangeable, OfSums, exchange_test
from g2l_core.metrics.patients import MAX_SUMMED_GROUPS, Design, effective_freedom, leave_out_groups
from g2l_core.metrics.scales import LINE, ORDER, POSITIVE, SHARE, SQUARED_ERROR, Scale
from g2l_core.metrics.statistics import require_aligned
from g2l_core.results import FEWEST, Estimate

_PRIOR = 2.0
"""As how many patients an expected variance counts."""


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
    pairs: Float64[np.ndarray, " pair"] | None = None
    """Of figures of pairs of patients: the value without what each two give to each other."""
    least_variance: float = 0.0
    """Added to the variance for what the patients cannot show, as all of a class agree."""
    expected_variance: float = 0.0
    """What the variance would be if a classifier's probabilities were true; pooled with that found, where larger."""
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
        >>> from g2l_core.metrics.patients import design_of
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
    with np.errstate(divide="ignore", invalid="ignore"):  # undefined without a group that alone has rows of a kind
        values = score(np.concatenate([whole, whole - exact]))
    return Figure(values=values, design=design, scale=scale, exchange=OfSums(score=score, sums=exact))


def of_neighbors(values: Float64[np.ndarray, " set"], design: Design, scale: Scale) -> Figure:
    """Return a figure of neighbors, given its values of the sets of `knn.leave_out.LeaveOutSums.totals`."""
    groups = len(design.counts)
    return Figure(values=values[: 1 + groups], pairs=values[1 + groups :], design=design, scale=scale)


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


def _error(figure: Figure) -> tuple[float, float, float]:
    """The standard error of a figure in its own unit, its degrees of freedom, and its bias."""
    values, design = figure.values, figure.design
    without, count = values[1:], len(values) - 1
    factor, freedom = effective_freedom(design)
    variance = factor * (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    if figure.pairs is not None and variance > 0:
        of_pairs = count / (count - 1) * float(np.nansum((figure.pairs - values[0]) ** 2))
        variance *= max(0.5, 1 - 0.5 * factor * of_pairs / variance)
    elif figure.scale.counts and not figure.more and design.counts.sum() == design.clusters:
        freedom *= 2  # of single rows that are right or wrong, the variance follows from the share
    variance = max(variance, (freedom * variance + _PRIOR * figure.expected_variance) / (freedom + _PRIOR))
    parts = [(variance + figure.least_variance, freedom)]
    parts += [(source.variance, float(source.freedom)) for source in figure.more]
    total = sum(part for part, _ in parts)
    bias = (count - 1) * float(without.mean() - values[0]) if figure.exchange is not None else 0.0
    if total == 0:
        return 0.0, freedom, bias
    return sqrt(total), total**2 / sum(part**2 / of for part, of in parts), bias


def _value(figure: Figure) -> float:
    value = float(figure.values[0])
    if isnan(value):
        raise TaskError("the statistic is undefined (0 / 0) on the whole data, so it has no interval either")
    return value


def _method(figure: Figure, freedom: float) -> str:
    design, groups = figure.design, len(figure.design.counts)
    over = f"{design.clusters:,} {design.unit}" + (f" in {groups} groups" if groups < design.clusters else "")
    more = Counter(source.what for source in figure.more)  # of a difference, perhaps one of each encoder
    over = " and ".join([over, *(what if times == 1 else f"{what} of each" for what, times in more.items())])
    return f"jackknife over {over}, t with {freedom:.1f} degrees of freedom"


def estimate(figure: Figure, level: float = 0.95) -> Estimate:
    """Compute the interval of a figure.

    With G groups, values v_g without each and their mean m, the variance is f (G - 1) / G sum_g (v_g - m)^2, with the
    factor f and the t quantile's degrees of freedom from `effective_freedom`. The quantile times the error is the
    margin about the value less its bias (G - 1) (m - v), which the figure's scale makes a bound. Where each patient has
    one row that is right or wrong, the variance follows from the share, and the degrees of freedom are doubled: with
    the normal quantile F1 over ten slides with two of a class held in 0.82, without doubling shares held in 0.98 to 1.

    What two patients give to each other as neighbors, b_gh, is in the moves of both, and so twice in that variance,
    which is unbiased without sum b_gh^2 (Efron & Stein), but then varies more than its degrees of freedom say. Half of
    that sum is subtracted, and at most half of the variance.

    Among few patients there is often none whom a classifier gets badly wrong, and then errors vary too little. Its
    probabilities say how often that happens: with f degrees of freedom the variance V is pooled with that expected, V0,
    to (f V + 2 V0) / (f + 2) if this is larger, as if two further patients had varied as expected (Smyth).

    Where a share is 0 or 1 for every patient, the bound is that of as many patients as its smallest class has, of whom
    all succeed (Clopper & Pearson): 0.025^(1 / G), and of a Brier score of 0 likewise. Where what the patients cannot
    show is larger than half of what is left to the bound, its margin is added in the metric's own unit.

    Args:
        figure: The value on all patients, and without each.
        level: The share of intervals that are to hold the truth.

    Returns:
        The estimate. The bounds are NaN where there can be no interval, and `method` says why.

    Raises:
        TaskError: If the value on all patients is undefined.

    References:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), equation 11.5; Arvesen, Jackknifing U-Statistics
        (1969); Kott, The Delete-a-Group Jackknife (2001); Efron & Stein, The Jackknife Estimate of Variance (1981);
        Smyth, Linear Models and Empirical Bayes Methods for Assessing Differential Expression (2004), section 3.

    Examples:
        >>> from g2l_core.metrics.patients import design_of
        >>> figure = Figure(values=np.array([0.5, 0.4, 0.5, 0.6, 0.5]), design=design_of(np.arange(4), unit="slides"))
        >>> found = estimate(figure)
        >>> round(found.low, 3), round(found.high, 3), found.method
        (0.11, 0.89, 'jackknife over 4 slides, t with 3.0 degrees of freedom')
    """
    value, design = _value(figure), figure.design
    reason = _reason(figure)
    if reason:
        return Estimate(value=value, method=f"none: {reason}", clusters=design.clusters, unit=design.unit)
    least, most = figure.scale.ends
    if not least < value < most:
        low, high, freedom = _at_bound(figure, value, (1 - level) / 2)
    elif _unseen(figure) > (min(value - least, most - value) / 2) ** 2:
        low, high, freedom = _near_bound(figure, value, level)
    else:
        low, high, freedom = _inside(figure, value, level)
    return Estimate(
        value=value,
        low=low,
        high=high,
        method=_method(figure, freedom),
        clusters=design.clusters,
        unit=design.unit,
    )


def _inside(figure: Figure, value: float, level: float) -> tuple[float, float, float]:
    """The interval, and degrees of freedom, of a value between the ends of its scale."""
    error, freedom, bias = _error(figure)
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    low, high = (figure.scale.bound(value, margin) for margin in (-max(0.0, half + bias), max(0.0, half - bias)))
    return float(low), float(high), freedom


def _unseen(figure: Figure) -> float:
    """The variance that leaving patients out does not show, in the metric's own unit."""
    return figure.least_variance + sum(source.variance for source in figure.more)


def _near_bound(figure: Figure, value: float, level: float) -> tuple[float, float, float]:
    """As `_inside`, where the unseen error is larger than half of what is left to the bound.

    Its variance is in the metric's own unit, and the scale's slope there would take it to any width. So the squares of
    the two margins are added instead (Zou & Donner, Construction of Confidence Limits about Effect Measures, 2008).
    """
    low, high, _ = _inside(replace(figure, least_variance=0.0, more=()), value, level)
    _, freedom, _ = _error(replace(figure, scale=LINE))
    half = float(stdtrit(freedom, (1 + level) / 2)) * sqrt(_unseen(figure))
    least, most = figure.scale.ends
    return max(least, value - hypot(value - low, half)), min(most, value + hypot(high - value, half)), freedom


def _fewest(design: Design) -> int:
    """The groups of patients of the class that has fewest."""
    return int((design.counts > 0).sum(axis=0).min())


def _at_bound(figure: Figure, value: float, tail: float) -> tuple[float, float, float]:
    """The interval, and degrees of freedom, of a share of 0 or 1, or another value at the end of its scale."""
    groups, (least, most) = _fewest(figure.design), figure.scale.ends
    if figure.scale in (SHARE, ORDER, SQUARED_ERROR):  # each patient is at one end or the other
        bound = most * tail ** (1 / groups)
        return (bound, most, groups - 1.0) if value >= most else (0.0, most - bound, groups - 1.0)
    error, freedom, _ = _error(replace(figure, scale=LINE))
    half = float(stdtrit(freedom, 1 - tail)) * error
    return max(least, value - half), min(most, value + half), freedom


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
    pairs = [figure.pairs for figure in figures if figure.pairs is not None]
    more = [  # the training halves are the same of each repetition
        replace(kind, values=np.mean([of.values for f in figures for of in f.more if of.what == kind.what], axis=0))
        for kind in figures[0].more
    ]
    return replace(
        figures[0],
        values=values.mean(axis=0),
        pairs=np.mean(pairs, axis=0) if len(pairs) == len(figures) else None,
        exchange=None,
        least_variance=float(np.mean([figure.least_variance for figure in figures])),
        expected_variance=float(np.mean([figure.expected_variance for figure in figures])),
        more=(*more, source),
    )


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
        >>> from g2l_core.metrics.patients import design_of
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
        pairs=None if figure.pairs is None or reference.pairs is None else figure.pairs - reference.pairs,
        scale=LINE,
        exchange=None,
        least_variance=min(figure.least_variance, reference.least_variance),
        expected_variance=0.0,
        more=_of_difference(figure.more, reference.more),
        no_interval=figure.no_interval or reference.no_interval,
    )
    found, groups = estimate(both), len(figure.design.counts)
    if _reason(replace(both, no_interval="")):
        return Difference(estimate=found, p_value=nan, p_equivalent=nan)
    value, (error, freedom, _) = found.value, _error(both)
    if figure.exchange and reference.exchange and not both.more:
        p_value = exchange_test(figure.exchange, reference.exchange, groups, draws, seed)
    else:
        p_value = max(_tail(-abs(value), error, freedom) * 2, 2.0 ** (1 - groups))
    if both.no_interval:
        return Difference(estimate=found, p_value=min(1.0, p_value), p_equivalent=nan)
    if error == 0 and value == 0 and figure.scale in (SHARE, ORDER):  # no patient differs: as of a share of 0
        bound = 1 - 0.025 ** (1 / _fewest(both.design))
        found = replace(found, low=-bound, high=bound)
        equivalent = (1 - margin) ** _fewest(both.design)
    else:
        equivalent = _tail(abs(value) - margin, error, freedom)
    return Difference(estimate=found, p_value=min(1.0, p_value), p_equivalent=equivalent)


def ratio(figure: Figure, reference: Figure) -> Figure:
    """Return an encoder's figure over a reference encoder's on the same patients, such as a student's retained share.

    Patients are left out of both at once, so what the two share cancels. The interval is made on the logarithm of the
    ratio r = a / b, to first order in each left-out value. Of what patients cannot show, the larger of the two relative
    variances is kept. Sources that are paired give the ratio of each repetition; the others add up, those of b
    times -r / b.

    Args:
        figure: The encoder's.
        reference: The reference encoder's, with the same design, above 0.

    Returns:
        The figure of the ratio, for `estimate`.

    Raises:
        TaskError: If the reference is not above 0, or the encoder is below it, so that there is no share.

    Examples:
        >>> from g2l_core.metrics.patients import design_of
        >>> design = design_of(np.arange(4), unit="slides")
        >>> student = Figure(values=np.array([0.6, 0.5, 0.6, 0.7, 0.6]), design=design)
        >>> teacher = Figure(values=np.array([0.8, 0.7, 0.8, 0.9, 0.8]), design=design)
        >>> found = estimate(ratio(student, teacher))
        >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
        (0.75, 0.636, 0.885)
    """
    a, b = _value(figure), _value(reference)
    if b <= 0 or a < 0:
        raise TaskError(f"a share of the reference needs figures above 0; got {a:.3g} over {b:.3g}")
    theirs = {source.what: source for source in reference.more if source.paired}
    more = []
    for source in figure.more:
        other = theirs.pop(source.what, None) if source.paired else None
        over = b if other is None else other.values
        more.append(replace(source, values=source.values / over))
    others = [source for source in reference.more if not source.paired or source.what in theirs]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = figure.values / reference.values
        both = figure.pairs is not None and reference.pairs is not None
        pairs = figure.pairs / reference.pairs if both else None  # type: ignore[operator]
    return replace(
        figure,
        values=values,
        pairs=pairs,
        scale=POSITIVE,
        exchange=None,
        least_variance=max(figure.least_variance, reference.least_variance * (a / b) ** 2) / b**2,
        expected_variance=0.0,
        more=(*more, *(replace(source, values=source.values * a / b**2) for source in others)),
        no_interval=figure.no_interval or reference.no_interval,
    )


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
