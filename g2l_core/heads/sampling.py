"""A slide's answer from some of its patches: which to encode, what they say of the whole slide, and how sure that is.

    strata          patches that look alike on the thumbnail (`appearance`), each cut at random into two halves
        |
    first_sizes     a first part of the budget; small, odd-looking strata get more than their share
        |
    further_sizes   the rest where the head's answers differ most; each half is told by the other half
        |
    estimate        means over patches, each weighted by how many it stands for, and their interval

A half's size never depends on its own patches, so that the mean over all patches is estimated without bias for every
size (Neyman allocation from a half's own values would take too few where the first values happen to agree).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from g2l_core.heads.appearance import groups_of
from g2l_core.heads.head import Head, SlidePrediction, answers, patch_terms
from g2l_core.rng import keyed_generator

LOOKS = (0.3, 0.5, 0.75, 1.0)
"""Shares of the budget after which it is asked whether the answer is settled."""
CONFIDENCE = 0.95
"""That all intervals of a slide hold together: each look has a fourth of the error (Bonferroni)."""
PATCHES_PER_STRATUM = 16
MOST_STRATA = 12
"""A stratum has at least so many patches of the budget, and so both halves at least two at the first look."""
PRIOR_PATCHES = 2
"""Of how many patches' worth the common deviation counts in that of a half: few equal values prove no agreement."""
STEP = 1e-4
"""Step of the derivative of the answer, relative to the distance from the mean to a patch."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """In which order the patches of a slide would be encoded, by cell: a half of a stratum."""

    rows: tuple[Int64[np.ndarray, "_"], ...]
    """The rows of each cell in random order."""
    half: Int64[np.ndarray, " cell"]
    twin: Int64[np.ndarray, " cell"]
    """The other half of the stratum; the cell itself where it has none."""
    most: int
    """How many patches may be encoded."""

    @property
    def sizes(self) -> Int64[np.ndarray, " cell"]:
        """How many patches each cell has."""
        return np.array([len(rows) for rows in self.rows], np.int64)

    def chosen(self, sizes: Int64[np.ndarray, " cell"]) -> Int64[np.ndarray, " chosen"]:
        """The rows that are encoded if cells have these sizes, cell by cell."""
        return np.concatenate([rows[:size] for rows, size in zip(self.rows, sizes.tolist(), strict=True)])


def plan_sample(looks: Float64[np.ndarray, "patch look"], most: int, *key: str | int) -> SamplePlan:
    """Plan in which order the patches of a slide are encoded.

    Args:
        looks: What is known of each patch, from `appearance`; no columns if nothing is.
        most: How many patches may be encoded, from 1 to all.
        key: What the draws are a function of.
    """
    count = max(1, min(MOST_STRATA, most // PATCHES_PER_STRATUM))
    stratum = groups_of(looks, count, *key) if looks.shape[1] else np.zeros(len(looks), np.int64)
    rng = keyed_generator("sample", *key)
    cells = list[tuple[np.ndarray, int, int]]()
    for s in range(stratum.max() + 1):
        rows = rng.permutation(np.flatnonzero(stratum == s))
        cut = len(rows) // 2 if most >= PATCHES_PER_STRATUM else 0
        halves = [(rows[:cut], 0), (rows[cut:], 1)] if cut else [(rows, s % 2)]
        first = len(cells)
        cells += [(own, half, first + len(halves) - 1 - i) for i, (own, half) in enumerate(halves)]
    return SamplePlan(
        rows=tuple(rows for rows, _, _ in cells),
        half=np.array([half for _, half, _ in cells]),
        twin=np.array([twin for _, _, twin in cells]),
        most=most,
    )


def first_sizes(plan: SamplePlan) -> Int64[np.ndarray, " cell"]:
    """How many patches of each cell are encoded first: as the root of its size, at least one.

    References:
        Bankier, Power allocations: determining sample sizes for subnational areas (1988).
    """
    at_least = np.minimum(1, plan.sizes)
    wanted = max(int(at_least.sum()), int(plan.most * LOOKS[0]))
    return at_least + _shared(wanted - int(at_least.sum()), np.sqrt(plan.sizes), plan.sizes - at_least)


def further_sizes(
    plan: SamplePlan,
    first: Int64[np.ndarray, " cell"],
    deviation: Float64[np.ndarray, " cell"],
    look: int,
) -> Int64[np.ndarray, " cell"]:
    """How many patches of each cell are encoded by a later look.

    Args:
        plan: The plan.
        first: From `first_sizes`.
        deviation: (cell,) of the head's answers in the first patches of each cell, from `deviations`.
        look: 1 to the last of `LOOKS`.

    References:
        Neyman, On the two different aspects of the representative method (1934).
    """
    more = max(0, int(plan.most * LOOKS[look]) - int(first.sum()))
    told = deviation[plan.twin]
    worth = plan.sizes * np.where(np.isfinite(told), np.maximum(told, 1e-12), 1.0)
    sizes = first.copy()
    room, own = plan.sizes - first, np.bincount(plan.half, weights=plan.sizes, minlength=2)
    parts = _shared(more, own, np.bincount(plan.half, weights=room, minlength=2).astype(np.int64))
    for half in (0, 1):  # each half has a budget of its own, or its sizes would depend on its values
        mine = plan.half == half
        sizes[mine] += _shared(int(parts[half]), worth[mine], room[mine])
    return sizes


def _shared(
    count: int, worth: Float64[np.ndarray, " cell"], room: Int64[np.ndarray, " cell"]
) -> Int64[np.ndarray, " cell"]:
    """Share a number by worth, no cell getting more than it has room for; largest remainders are rounded up."""
    given = np.zeros(len(worth), np.int64)
    while (left := min(count, int(room.sum())) - int(given.sum())) > 0:
        open_ = np.flatnonzero(given < room)
        weight = worth[open_] if worth[open_].sum() > 0 else np.ones(len(open_))
        exact = left * weight / weight.sum()
        whole = np.minimum(np.floor(exact).astype(np.int64), (room - given)[open_])
        if not whole.any():
            order = np.argsort(-exact, kind="stable")[:left]
            whole[order] = 1
        given[open_] += whole
    return given


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What some patches say of their slide."""

    found: SlidePrediction
    """Of the good patches that were encoded. Attention is that in the whole slide, where a patch stands for many."""
    weights: Float64[np.ndarray, " good"]
    """How many patches of the slide each stands for; they sum to the good patches of the slide, as estimated."""
    margin: Float64[np.ndarray, " class"]
    """Half the width of the interval of each value; infinite where it is not known."""
    lead: float
    """By how many of both margins the most probable class is ahead of the next."""
    deviation: Float64[np.ndarray, " cell"]

    def is_settled(self, tolerance: float) -> bool:
        """Whether all probabilities are known to the tolerance, and no other class can be the most probable one."""
        return bool((self.margin <= tolerance).all() and self.lead > 1)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A slide's answer from some of its patches."""

    rows: Int64[np.ndarray, " good"]
    """The good patches that were encoded, in the order of the estimate's."""
    encoded: int
    """How many patches were encoded, those that are not good included."""
    estimate: Estimate
    settled: bool
    """Whether it stopped because the answer was settled, or all patches were encoded."""


Take = Callable[[Int64[np.ndarray, " row"]], tuple[Float[np.ndarray, "row dim"], Bool[np.ndarray, " row"]]]
"""Gives the features of rows, and which of them are good."""


def settle(head: Head, plan: SamplePlan, take: Take, tolerance: float) -> Sampled | None:
    """Take features in the order of a plan until the answer is settled or the plan's most is reached.

    A number has no scale on which differences are small, so a regression takes all that it may.

    Args:
        head: The head.
        plan: The plan.
        take: Is asked for each row once.
        tolerance: Half the width of an interval that is narrow enough.

    Returns:
        The answer; None if no patch that was taken is good.
    """
    first = sizes = first_sizes(plan)
    told, sampled = np.ones(len(first)), None
    place = np.full(int(plan.sizes.sum()), -1)
    features, good = list[np.ndarray](), np.zeros(0, bool)
    for look in range(len(LOOKS)):
        sizes = further_sizes(plan, first, told, look) if look else first
        rows = plan.chosen(sizes)
        new = rows[place[rows] < 0]
        if len(new):
            of_new, good_of_new = take(new)
            place[new] = len(good) + np.arange(len(new))
            features, good = [*features, of_new], np.concatenate([good, good_of_new])
        is_good = good[place[rows]]
        if not is_good.any():
            continue
        found = estimate(head, plan, sizes, np.concatenate(features)[place[rows]], is_good)
        told = found.deviation if look == 0 else told
        narrow = head.facts.kind != "regression" and found.is_settled(tolerance)
        settled = narrow or bool((sizes == plan.sizes).all())
        sampled = Sampled(rows=rows[is_good], encoded=len(rows), estimate=found, settled=settled)
        if settled:
            break
    return sampled


def estimate(
    head: Head,
    plan: SamplePlan,
    sizes: Int64[np.ndarray, " cell"],
    features: Float[np.ndarray, "chosen dim"],
    good: Bool[np.ndarray, " chosen"],
) -> Estimate:
    """Estimate what the head would say of the whole slide.

    A probe's and a regression's answer is a mean over patches, which has no bias. That of a slide probe is a function
    of the mean feature, and ABMIL's one of the quotient of two means: their bias falls with the number of patches. The
    interval is that of stratified sampling without replacement, for the derivative of the answer; of its log-odds
    where those are what the head is linear in. To that of a probability it adds what a kind of patch may have that was
    not seen: if its share were more than -log(error) / n, n patches would have met it.

    Args:
        head: The head.
        plan: The plan.
        sizes: How many patches of each cell were chosen.
        features: (chosen, dim) in the order of `plan.chosen`; those of patches that are not good are not read.
        good: (chosen,) patches that count: not unreadable and no artifact. At least one.

    References:
        Cochran, Sampling Techniques (1977), sections 5.3 and 6.10; Särndal et al., Model Assisted Survey Sampling
        (1992), section 5.5, for the derivative.
    """
    cell = np.repeat(np.arange(len(sizes)), sizes)
    weights = (plan.sizes / np.maximum(sizes, 1))[cell][good]
    terms = patch_terms(head, features[good])
    mean = (weights @ terms / weights.sum())[None]
    values = answers(head, mean)[0]
    scale = _Scale(is_odds=head.facts.kind in {"slide_probe", "abmil"}, is_number=head.facts.kind == "regression")
    near = scale.of(answers(head, mean + STEP * (terms - mean)))
    spread = np.zeros((len(cell), len(values)))
    spread[good] = (near - scale.of(values)) / STEP * (plan.sizes.sum() / weights.sum())
    deviation = deviations(spread, cell, len(sizes))
    unseen = 0.0 if scale.is_number or (sizes == plan.sizes).all() else -np.log(_error()) / len(cell)
    margin = scale.margin(values, _margins(plan.sizes, sizes, deviation)) + unseen
    top, second = np.argsort(-values, kind="stable")[:2] if len(values) > 1 else (0, 0)
    apart = margin[top] + margin[second]
    lead = (values[top] - values[second]) / apart if apart > 0 else np.inf
    found = head.apply(features[good])
    if found.attention is not None:
        attention = terms[:, -1] / (terms[:, -1] @ weights)
        found = SlidePrediction(values=values, patches=found.patches, attention=attention)
    return Estimate(
        found=SlidePrediction(values=values, patches=found.patches, attention=found.attention),
        weights=weights, margin=margin, lead=float(lead), deviation=np.sqrt(np.square(deviation).sum(axis=1)),
    )  # fmt: skip


def deviations(
    spread: Float64[np.ndarray, "chosen class"], cell: Int64[np.ndarray, " chosen"], cells: int
) -> Float64[np.ndarray, "cell class"]:
    """The deviation of the values of each cell, drawn towards the common one of all cells as `PRIOR_PATCHES` says.

    It is infinite if no cell has two patches.
    """
    count = np.bincount(cell, minlength=cells)
    sums = np.stack([np.bincount(cell, weights=column, minlength=cells) for column in spread.T], axis=1)
    means = sums / np.maximum(count, 1)[:, None]
    squares = np.stack(
        [np.bincount(cell, weights=column, minlength=cells) for column in np.square(spread - means[cell]).T], axis=1
    )
    free = np.maximum(count - 1, 0)
    if not free.sum():
        return np.full(means.shape, np.inf)
    common = squares.sum(axis=0) / free.sum()
    return np.sqrt((PRIOR_PATCHES * common + squares) / (PRIOR_PATCHES + free)[:, None])


def _margins(
    sizes: Int64[np.ndarray, " cell"], taken: Int64[np.ndarray, " cell"], deviation: Float64[np.ndarray, "cell class"]
) -> Float64[np.ndarray, " class"]:
    rest = np.where(taken < sizes, (sizes / sizes.sum()) ** 2 * (1 - taken / sizes) / np.maximum(taken, 1), 0.0)
    known = rest > 0
    return NormalDist().inv_cdf(1 - _error() / 2) * np.sqrt(
        (rest[known, None] * np.square(deviation[known])).sum(axis=0)
    )


def _error() -> float:
    """The error of one look's intervals."""
    return (1 - CONFIDENCE) / len(LOOKS)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The scale on which an answer is nearly a mean over patches: log-odds where the head is linear in log-odds."""

    is_odds: bool
    is_number: bool

    def of(self, values: Float64[np.ndarray, "*slide class"]) -> Float64[np.ndarray, "*slide class"]:
        """Values on this scale."""
        if not self.is_odds:
            return values
        inside = np.clip(values, 1e-12, 1 - 1e-12)
        return np.log(inside) - np.log1p(-inside)

    def margin(self, values: Float64[np.ndarray, " class"], margins: Float64[np.ndarray, " class"]) -> np.ndarray:
        """Margins on this scale as the larger ones of the values themselves."""
        if not self.is_odds:
            return margins
        at = self.of(values)
        ends = [1 / (1 + np.exp(-np.clip(at + sign * margins, -700, 700))) for sign in (-1, 1)]
        return np.where(np.isfinite(margins), np.maximum(values - ends[0], ends[1] - values), np.inf)
