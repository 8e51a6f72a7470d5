"""Survival: Harrell's concordance index, and Cox regression with a ridge penalty on pooled features.

One row is one patient. Pool several slides or patches of a patient first (`bags.mean_pool`): a patient with two rows
would count as two deaths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num
from sklearn.model_selection import StratifiedKFold

from g2l_core.errors import TaskError
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.statistics import require_aligned

_BLOCK_PAIRS = 1 << 22
"""Pairs held at a time: 32 MiB for each of two matrices."""


def require_survival(times: Num[np.ndarray, " row"], events: Bool[np.ndarray, " event_row"]) -> None:
    """Check that times and events can be evaluated.

    Args:
        times: (row,) time to the event or to the end of follow-up, in any unit.
        events: (row,) whether the event was observed; False is censored.

    Raises:
        TaskError: If the lengths differ, a time is negative or not finite, or no event was observed.

    Examples:
        >>> require_survival(np.array([1.0, 2.0]), np.array([True, False]))
    """
    require_aligned(times=len(times), events=len(events))
    bad = ~np.isfinite(times) | (times < 0)
    if bad.any():
        raise TaskError(
            f"survival times are finite and not negative; {int(bad.sum())} of {len(times):,} are not, "
            f"the first is {times[bad][0]}"
        )
    if not events.any():
        raise TaskError(f"none of {len(events):,} patients has an event, so their order in time is unknown")


def concordance_index(
    times: Num[np.ndarray, " row"],
    events: Bool[np.ndarray, " event_row"],
    risks: Float[np.ndarray, " risk_row"],
    weights: Int64[np.ndarray, "draw row"] | None = None,
) -> Float64[np.ndarray, " draw"]:
    """Compute Harrell's C: of all pairs known to differ in survival, the share in which the earlier has more risk.

    A pair is known to differ if one patient had the event at t and the other's time is later, or is t too
    but censored. Two events at the same time are no pair. Equal risks count one half. These are the rules of lifelines
    (whose scores have the opposite sign: `concordance_index(times, -risks, events)`).

    All pairs are counted in blocks, for all draws in one matrix product. Counts stay below 2^53 and are exact.

    Args:
        times: (row,) time to the event or to the end of follow-up.
        events: (row,) whether the event was observed.
        risks: (row,) any score that grows with the risk.
        weights: (draw, row) how often each patient counts; None is one draw of all. Copies of a patient are no pair.

    Returns:
        The (draw,) index, 1/2 by chance; NaN where a draw has no pair.

    Raises:
        TaskError: As `require_survival`, and if a risk is NaN or no pair is known to differ.

    References:
        Harrell et al., Multivariable prognostic models (1996), Statistics in Medicine 15, section 5.5.

    Examples:
        >>> times, events = np.array([1.0, 2.0, 3.0]), np.array([True, True, False])
        >>> concordance_index(times, events, risks=np.array([0.9, 0.2, 0.4])).round(4).tolist()
        [0.6667]
    """
    require_survival(times, events)
    require_aligned(times=len(times), risks=len(risks))
    require_finite(risks[:, None], "the risks")
    drawn = np.ones((1, len(times))) if weights is None else weights.astype(np.float64)
    right, pairs = np.zeros(len(drawn)), np.zeros(len(drawn))
    known = 0
    with_event = np.flatnonzero(events)
    step = max(1, _BLOCK_PAIRS // len(times))
    for start in range(0, len(with_event), step):
        first = with_event[start : start + step, None]
        later = (times > times[first]) | ((times == times[first]) & ~events)
        more = later * ((risks[first] > risks) + (risks[first] == risks) / 2)
        known += int(later.sum())
        pairs += ((drawn @ later.T.astype(np.float64)) * drawn[:, first[:, 0]]).sum(axis=1)
        right += ((drawn @ more.T) * drawn[:, first[:, 0]]).sum(axis=1)
    if not known:
        raise TaskError("no two patients are known to differ in survival: every event comes after all other times")
    return np.divide(right, pairs, out=np.full(len(drawn), np.nan), where=pairs > 0)


@dataclass(frozen=True, kw_only=True)
class CoxModel:
    """A fitted proportional-hazards model: log hazard = baseline(t) + risk(x)."""

    mean: Float64[np.ndarray, " dim"]
    scale: Float64[np.ndarray, " dim"]
    """Standard deviation (n - 1) of the training part; 1 where a feature is constant."""
    coefficients: Float64[np.ndarray, " dim"]
    """Coefficients of the standardized features."""
    penalty: float
    converged: bool
    """False where Newton's method did not reach its tolerance."""

    def risks(self, features: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, " row"]:
        """Return the (row,) log hazard relative to the training part's mean features."""
        return ((features.astype(np.float64) - self.mean) / self.scale) @ self.coefficients


@dataclass(frozen=True, kw_only=True)
class _Sorted:
    """Patients by ascending time, with what the partial likelihood needs to know about ties."""

    x: Float64[np.ndarray, "row component"]
    events: Bool[np.ndarray, " row"]
    start: Int64[np.ndarray, " row"]
    """The first row of the same time. The risk set is all rows from there on."""
    stop: Int64[np.ndarray, " row"]
    """One beyond the last row of the same time."""
    share: Float64[np.ndarray, " event"]
    """Of each event, l / d: the l-th of d events at its time, from 0 (Efron)."""


def _sorted(
    x: Float64[np.ndarray, "row component"], times: Num[np.ndarray, " row"], events: Bool[np.ndarray, " row"]
) -> _Sorted:
    order = np.argsort(times, kind="stable")
    times, events = times[order], events[order]
    start, stop = np.searchsorted(times, times, "left"), np.searchsorted(times, times, "right")
    before = np.concatenate([[0], np.cumsum(events)])
    tied = before[stop] - before[start]
    share = (before[:-1] - before[start])[events] / tied[events]
    return _Sorted(x=x[order], events=events, start=start, stop=stop, share=share)


def _partial_likelihood(
    data: _Sorted, beta: Float64[np.ndarray, " component"]
) -> tuple[float, Float64[np.ndarray, " component"], Float64[np.ndarray, "component component"]]:
    """Compute Efron's log partial likelihood, its gradient, and its negated Hessian.

    With weights w = exp(x beta), the event i at time t has the denominator D_i = sum of w over those at risk
    - share_i (sum of w over the events at t), and the mean m_i of x under those weights. Then
    l = sum x_i beta - log D_i; gradient sum x_i - m_i; Hessian - (X' diag(a) X - M' M), where a_j gathers the
    weight of row j over all events.
    """
    linear = data.x @ beta
    weights = np.exp(linear - linear.max())
    columns = np.column_stack([weights, weights[:, None] * data.x])
    start, stop = data.start[data.events], data.stop[data.events]
    to_here = np.concatenate([np.zeros((1, columns.shape[1])), np.cumsum(columns * data.events[:, None], axis=0)])
    at_risk = np.cumsum(columns[::-1], axis=0)[::-1][start]
    sums = at_risk - data.share[:, None] * (to_here[stop] - to_here[start])
    means = sums[:, 1:] / sums[:, :1]
    value = linear[data.events] - linear.max() - np.log(sums[:, 0])
    inverse = np.zeros((len(linear), 2))
    inverse[data.events] = np.column_stack([1 / sums[:, 0], data.share / sums[:, 0]])
    gathered = np.concatenate([np.zeros((1, 2)), np.cumsum(inverse, axis=0)])
    tied = data.events * (gathered[data.stop, 1] - gathered[data.start, 1])
    carried = weights * (gathered[data.stop, 0] - tied)
    curvature = data.x.T @ (carried[:, None] * data.x) - means.T @ means
    return float(value.sum()), (data.x[data.events] - means).sum(axis=0), curvature


def _newton(
    data: _Sorted, penalty: float, iterations: int = 100, tolerance: float = 1e-9
) -> tuple[Float64[np.ndarray, " component"], bool]:
    """Maximize l(beta) - n penalty |beta|^2 / 2, halving steps that do not improve; return whether it converged."""
    ridge = len(data.x) * penalty
    beta = np.zeros(data.x.shape[1])
    value, gradient, curvature = _partial_likelihood(data, beta)
    for _ in range(iterations):
        slope = gradient - ridge * beta
        step = np.linalg.solve(curvature + ridge * np.eye(len(beta)), slope)
        if slope @ step < tolerance * len(data.x):
            return beta + step, True
        for halving in range(30):
            moved = beta + step / 2**halving
            new = _partial_likelihood(data, moved)
            if new[0] - ridge * moved @ moved / 2 > value - ridge * beta @ beta / 2:
                break
        else:
            return beta, False
        beta, (value, gradient, curvature) = moved, new
    return beta, False


def fit_cox(
    features: Float[np.ndarray, "row dim"],
    times: Num[np.ndarray, " time_row"],
    events: Bool[np.ndarray, " event_row"],
    *,
    penalty: float,
    components: int | None = None,
) -> CoxModel:
    """Fit Cox regression on standardized features: the maximum of l(beta) - n penalty |beta|^2 / 2.

    l is the log partial likelihood with Efron's treatment of ties, and n the number of patients, as in lifelines'
    `CoxPHFitter(penalizer=penalty)`. Newton's method runs in the space that the rows span, which holds the ridge
    solution, so that 1,536 features of 300 patients cost 300 dimensions.

    Args:
        features: (row, dim) features, one row a patient; cast to float64.
        times: (row,) time to the event or to the end of follow-up.
        events: (row,) whether the event was observed.
        penalty: Above 0.
        components: Number of principal components of the standardized features to keep; None keeps all.

    Returns:
        The fitted model.

    Raises:
        TaskError: As `require_survival`, and if a feature is not finite, the penalty is not above 0, or all
            rows are alike.

    References:
        Cox (1972), Regression models and life-tables; ties: Efron (1977), The efficiency of Cox's likelihood
        function for censored data; ridge: Verweij & van Houwelingen (1994), Penalized likelihood in Cox
        regression.

    Examples:
        >>> times, events = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, True, False])
        >>> model = fit_cox(np.array([[3.0], [1.0], [2.0], [0.0]]), times, events, penalty=0.1)
        >>> model.coefficients.round(3).tolist(), model.converged
        ([1.015], True)
    """
    require_survival(times, events)
    require_aligned(features=len(features), times=len(times))
    require_finite(features, "the features")
    if penalty <= 0 or (components is not None and components < 1):
        raise TaskError(f"Cox regression needs a penalty above 0 and a component; got {penalty} and {components}")
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    scale = x.std(axis=0, ddof=1) if len(x) > 1 else np.ones_like(mean)
    scale = np.where(scale > 1e-12 * np.abs(x).max(axis=0), scale, 1.0)  # rounding makes a constant's deviation tiny
    left, sizes, axes = np.linalg.svd((x - mean) / scale, full_matrices=False)
    rank = int((sizes > sizes[0] * max(x.shape) * np.finfo(float).eps).sum()) if sizes[0] > 1e-9 else 0
    if not rank:
        raise TaskError(f"the features of all {len(x):,} patients are alike, so they tell no risk")
    kept = slice(min(rank, components or rank))
    beta, converged = _newton(_sorted(left[:, kept] * sizes[kept], times, events), penalty)
    return CoxModel(mean=mean, scale=scale, coefficients=axes[kept].T @ beta, penalty=penalty, converged=converged)


def choose_cox_penalty(
    features: Float[np.ndarray, "row dim"],
    times: Num[np.ndarray, " time_row"],
    events: Bool[np.ndarray, " event_row"],
    *,
    penalties: Sequence[float],
    components: int | None = None,
    folds: int = 5,
    seed: int,
) -> float:
    """Choose the penalty with the greatest cross-validated partial likelihood, the larger of equals.

    With b fitted without a fold, the fold adds l(b) on all patients - l(b) on the patients outside it, which is defined
    for folds of any size. These are summed over folds.

    Args:
        features: (row, dim) features, one row a patient.
        times: (row,) time to the event or to the end of follow-up.
        events: (row,) whether the event was observed.
        penalties: Candidates.
        components: As in `fit_cox`.
        folds: Number of folds, over which patients with and without event are dealt evenly.
        seed: Random seed that deals the patients.

    Returns:
        The penalty.

    Raises:
        TaskError: As `fit_cox`, and if there are fewer patients, or fewer events, than folds.

    References:
        Verweij & van Houwelingen, Cross-validation in survival analysis (1993), equation 3.

    Examples:
        >>> times, events = np.arange(1.0, 9.0), np.ones(8, bool)
        >>> choose_cox_penalty(-times[:, None], times, events, penalties=[0.01, 100.0], folds=2, seed=0)
        0.01
    """
    require_survival(times, events)
    if folds < 2 or len(times) < folds or events.sum() < folds:
        raise TaskError(
            f"{folds} folds need at least 2 folds, and as many patients and as many events; "
            f"got {len(times)} patients, {int(events.sum())} events (use fewer folds or one penalty)"
        )
    # Of a single censored patient scikit-learn would warn; whether censored are spread matters little.
    strata = events if (~events).sum() >= folds else np.zeros(len(events), np.int64)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    parts = [fit for fit, _ in splitter.split(np.empty((len(times), 0)), strata)]
    gains = dict.fromkeys(sorted(penalties, reverse=True), 0.0)
    for penalty, fit in ((penalty, fit) for penalty in gains for fit in parts):
        model = fit_cox(features[fit], times[fit], events[fit], penalty=penalty, components=components)
        risks = model.risks(features)[:, None]
        one = np.ones(1)
        whole = _partial_likelihood(_sorted(risks, times, events), one)[0]
        gains[penalty] += whole - _partial_likelihood(_sorted(risks[fit], times[fit], events[fit]), one)[0]
    return max(gains, key=lambda penalty: gains[penalty])
