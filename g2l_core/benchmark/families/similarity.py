"""`cka` and `similarity`: how much an encoder's features are like the teacher's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Shaped

from g2l_core.benchmark.families.figures import Drawn, Figure, LeftOut, Settings, TaskInput, chosen_in_words
from g2l_core.errors import TaskError
from g2l_core.metrics.alignment import central_rows, effective_rank, mutual_neighbors, procrustes_similarity, rbf_cka
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.ridge import RidgeMap, explained_share, fit_ridge, mean_cosine, ridge_sums
from g2l_core.metrics.similarity import jackknife_groups, jackknife_unit, leave_out_each, leave_out_moments
from g2l_core.metrics.statistics import cluster_codes, cluster_sums, of_sums
from g2l_core.rng import keyed_generator
from g2l_core.types import Features


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """An encoder and the teacher on rows that nothing was trained on."""

    x: Features
    y: Float16[np.ndarray, "patch dim_y"]
    clusters: Shaped[np.ndarray, " row"]
    unit: str
    """What is left out at a time."""
    settings: Settings
    device: str
    """Where sums over rows are taken."""

    @property
    def groups(self) -> Int64[np.ndarray, " row"]:
        """What the jackknife leaves out together; of all rows, so that encoders whose rows are trimmed agree."""
        return jackknife_groups(self.clusters)[0]

    def drawn(self, most: int, seed: int) -> "_Pair":
        """At most so many of the rows, the same ones for every encoder."""
        if len(self.x) <= most:
            return self
        rows = np.sort(keyed_generator("similarity rows", seed).choice(len(self.x), most, replace=False))
        settings = {**self.settings, "rows_drawn": most}
        return replace(self, x=self.x[rows], y=self.y[rows], clusters=self.clusters[rows], settings=settings)


def _pair(given: TaskInput) -> _Pair | None:
    """None for the teacher itself, and where the teacher has failed."""
    if given.reference is None:
        return None
    own = _with_itself(given)
    return replace(own, y=given.reference[given.test_rows], settings={"to": given.teacher, **own.settings})


def _with_itself(given: TaskInput) -> _Pair:
    chosen = given.test_rows
    clusters = given.rows.cluster[chosen]
    return _Pair(
        x=given.features[chosen],
        y=given.features[chosen],
        clusters=clusters,
        unit=jackknife_unit(clusters, given.rows.cluster_unit),
        settings={"rows": given.rows_in_words},
        device=given.device,
    )


def cka(given: TaskInput) -> list[Figure]:
    """Linear CKA, debiased and biased."""
    pair = _pair(given)
    return [] if pair is None else [_linear(f"cka_{kind}", pair, kind == "debiased") for kind in ("debiased", "biased")]


def _linear(metric: str, pair: _Pair, debiased: bool) -> Figure:
    value, without = leave_out_each(pair.x, pair.y, pair.groups, debiased, pair.device)
    return _left_out(metric, value, without, pair, pair.settings)


def _left_out(
    metric: str, value: float, without: Float64[np.ndarray, " group"], pair: _Pair, settings: Settings
) -> Figure:
    interval = LeftOut(value=value, without=without, unit=pair.unit)
    return Figure(metric=metric, interval=interval, n=len(pair.x), settings=settings)


def _without_each(figure: Callable[[Bool[np.ndarray, " row"]], float], pair: _Pair) -> Float64[np.ndarray, " group"]:
    """A figure of some rows, without each group; none where there is one group."""
    groups = pair.groups
    names = np.unique(groups)
    return np.array([figure(groups != name) for name in names] if len(names) > 1 else [])


def similarity(given: TaskInput) -> list[Figure]:
    """All other figures of likeness; of the teacher, its effective rank alone."""
    most, pair = given.spec.similarity.rows, _pair(given)
    if pair is None:
        return [_effective_rank(_with_itself(given).drawn(most, given.seed))]
    drawn = pair.drawn(most, given.seed)
    return [
        _rbf(drawn, given),
        _trimmed(pair, given),
        *_mutual(drawn, given),
        _procrustes(pair),
        *_ridge(given),
        _effective_rank(drawn),
    ]


def _rbf(pair: _Pair, given: TaskInput) -> Figure:
    bandwidth = given.spec.similarity.bandwidth
    measure = partial(rbf_cka, debiased=True, bandwidth=bandwidth, max_rows=len(pair.x), seed=given.seed)
    settings = {**pair.settings, "bandwidth": bandwidth, "debiased": True}
    without = _without_each(lambda kept: measure(pair.x[kept], pair.y[kept]), pair)
    return _left_out("similarity_rbf_cka", measure(pair.x, pair.y), without, pair, settings)


def _trimmed(pair: _Pair, given: TaskInput) -> Figure:
    share = given.spec.similarity.trim
    kept = central_rows(pair.x, pair.y, share=share)
    groups = pair.groups
    if len(np.unique(groups[kept])) < len(np.unique(groups)):
        raise TaskError(f"a share of {share} of all rows is all of a patient's; lower similarity_trim")
    value, without = leave_out_each(pair.x[kept], pair.y[kept], groups[kept], True, pair.device)
    settings = {**pair.settings, "trimmed_share": share, "rows_left_out": int((~kept).sum()), "debiased": True}
    return _left_out("similarity_trimmed_cka", value, without, pair, settings)


def _mutual(pair: _Pair, given: TaskInput) -> list[Figure]:
    """Shares of common neighbors: sums over rows, so they are bootstrapped; the neighbors stay those of all rows."""
    ks = given.spec.similarity.k
    graphs = [nearest(features, None, max(ks)) for features in (pair.x, pair.y)]
    shared = mutual_neighbors(graphs[0], graphs[1], ks)
    return [
        Figure(
            metric=f"similarity_mutual_knn_k{k}",
            interval=_mean_share(shared[:, column], k, pair.clusters),
            n=len(pair.x),
            settings={**pair.settings, "k": k, "distance": "cosine", "chance": round(k / (len(pair.x) - 1), 4)},
        )
        for column, k in enumerate(ks)
    ]


def _mean_share(shared: Int64[np.ndarray, " row"], k: int, clusters: Shaped[np.ndarray, " row"]) -> Drawn:
    sums = cluster_sums(np.stack([shared, np.full(len(shared), k)], axis=1), clusters)
    return Drawn(statistic=of_sums(lambda totals: totals[:, 0] / totals[:, 1], sums), clusters=clusters)


def _procrustes(pair: _Pair) -> Figure:
    value, without = leave_out_moments(procrustes_similarity, pair.x, pair.y, pair.clusters, pair.device)
    return _left_out("similarity_procrustes", value, without, pair, pair.settings)


def _effective_rank(pair: _Pair) -> Figure:
    without = _without_each(lambda kept: effective_rank(pair.x[kept]), pair)
    settings = {name: value for name, value in pair.settings.items() if name != "to"}
    figure = _left_out("similarity_effective_rank", effective_rank(pair.x), without, pair, settings)
    return replace(figure, better="neither")


def _ridge(given: TaskInput) -> list[Figure]:
    """How well a linear map from the encoder predicts the teacher on slides that it was not fitted on."""
    sums, tested, penalties = [], [], []
    for train, test in _ridge_parts(given):
        found = _fit(given, train)
        assert given.reference is not None
        sums.append(ridge_sums(found, given.features[test], given.reference[test]))
        tested.append(test)
        penalties.append(found.penalty)
    rows = np.concatenate(tested)
    clusters = given.rows.cluster[rows]
    totals = cluster_sums(np.concatenate(sums), clusters)
    settings = {"to": given.teacher, "penalty": chosen_in_words(penalties)}
    scores = {"ridge_r2": explained_share, "projected_cosine": mean_cosine}
    return [
        Figure(
            metric=f"similarity_{name}",
            interval=Drawn(statistic=of_sums(score, totals), clusters=clusters),
            n=len(rows),
            settings={**settings, "fitted_on": f"other {given.rows.cluster_unit}"},
        )
        for name, score in scores.items()
    ]


def _ridge_parts(given: TaskInput) -> Iterator[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]:
    """The fixed split, or folds of whole clusters, which need no class."""
    if given.spec.has_fixed_split:
        yield np.flatnonzero(given.rows.part == "train"), np.flatnonzero(given.rows.part == "test")
        return
    codes, count = cluster_codes(given.rows.cluster)
    if count < 2:
        raise TaskError(f"a ridge map needs {given.rows.cluster_unit} to fit on and others to test on; there is one")
    folds = min(given.spec.folds or given.spec.similarity.folds, count)
    fold = (keyed_generator("ridge folds", given.seed).permutation(count) % folds)[codes]
    for number in range(folds):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def _fit(given: TaskInput, train: Int64[np.ndarray, " train"]) -> RidgeMap:
    assert given.reference is not None
    groups = given.rows.cluster[train]
    folds = min(given.spec.similarity.folds, len(np.unique(groups)))
    return fit_ridge(given.features[train], given.reference[train], groups, folds=folds, seed=given.seed)
