"""Metric groups `cka` and `similarity`: how similar an encoder's features are to the teacher's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Shaped

from g2l_core.benchmark.metric_groups.values import (
    Jackknifed,
    MetricValue,
    Settings,
    TaskInput,
    bootstrapped_values,
    describe_choices,
    mean_statistic,
)
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
    """The features of an encoder and of the teacher on rows that nothing is trained on."""

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
        """What the jackknife leaves out together. All rows count, so that encoders whose rows are trimmed agree."""
        return jackknife_groups(self.clusters)[0]

    def drawn(self, max_rows: int, seed: int) -> "_Pair":
        """At most so many of the rows, the same ones for every encoder."""
        if len(self.x) <= max_rows:
            return self
        rows = np.sort(keyed_generator("similarity rows", seed).choice(len(self.x), max_rows, replace=False))
        settings = {**self.settings, "rows_drawn": max_rows}
        return replace(self, x=self.x[rows], y=self.y[rows], clusters=self.clusters[rows], settings=settings)


def _pair(task: TaskInput) -> _Pair | None:
    """None for the teacher itself, and where the teacher has failed."""
    if task.reference is None:
        return None
    own = _with_itself(task)
    return replace(own, y=task.reference[task.test_rows], settings={"to": task.teacher, **own.settings})


def _with_itself(task: TaskInput) -> _Pair:
    chosen = task.test_rows
    clusters = task.rows.cluster[chosen]
    return _Pair(
        x=task.features[chosen],
        y=task.features[chosen],
        clusters=clusters,
        unit=jackknife_unit(clusters, task.rows.cluster_unit),
        settings={"rows": task.test_rows_name},
        device=task.device,
    )


def cka(task: TaskInput) -> list[MetricValue]:
    """Linear CKA, debiased and biased."""
    pair = _pair(task)
    return [] if pair is None else [_linear(f"cka_{kind}", pair, kind == "debiased") for kind in ("debiased", "biased")]


def _linear(metric: str, pair: _Pair, debiased: bool) -> MetricValue:
    value, without = leave_out_each(pair.x, pair.y, pair.groups, debiased, pair.device)
    return _left_out(metric, value, without, pair, pair.settings)


def _left_out(
    metric: str, value: float, without: Float64[np.ndarray, " group"], pair: _Pair, settings: Settings
) -> MetricValue:
    interval = Jackknifed(value=value, without=without, unit=pair.unit)
    return MetricValue(metric=metric, interval=interval, n=len(pair.x), settings=settings)


def _without_each(measure: Callable[[Bool[np.ndarray, " row"]], float], pair: _Pair) -> Float64[np.ndarray, " group"]:
    """A measure of the rows without each group; empty where there is only one group."""
    groups = pair.groups
    names = np.unique(groups)
    return np.array([measure(groups != name) for name in names] if len(names) > 1 else [])


def similarity(task: TaskInput) -> list[MetricValue]:
    """All other metrics of similarity. The teacher has its effective rank alone."""
    max_rows, pair = task.spec.similarity.rows, _pair(task)
    if pair is None:
        return [_effective_rank(_with_itself(task).drawn(max_rows, task.seed))]
    drawn = pair.drawn(max_rows, task.seed)
    return [
        _rbf(drawn, task),
        _trimmed(pair, task),
        *_mutual(drawn, task),
        _procrustes(pair),
        *_ridge(task),
        _effective_rank(drawn),
    ]


def _rbf(pair: _Pair, task: TaskInput) -> MetricValue:
    bandwidth = task.spec.similarity.bandwidth
    measure = partial(rbf_cka, debiased=True, bandwidth=bandwidth, max_rows=len(pair.x), seed=task.seed)
    settings = {**pair.settings, "bandwidth": bandwidth, "debiased": True}
    without = _without_each(lambda kept: measure(pair.x[kept], pair.y[kept]), pair)
    return _left_out("similarity_rbf_cka", measure(pair.x, pair.y), without, pair, settings)


def _trimmed(pair: _Pair, task: TaskInput) -> MetricValue:
    share = task.spec.similarity.trim
    kept = central_rows(pair.x, pair.y, share=share)
    groups = pair.groups
    if len(np.unique(groups[kept])) < len(np.unique(groups)):
        raise TaskError(f"a share of {share} of all rows is all of a patient's; lower similarity_trim")
    value, without = leave_out_each(pair.x[kept], pair.y[kept], groups[kept], True, pair.device)
    settings = {**pair.settings, "trimmed_share": share, "rows_left_out": int((~kept).sum()), "debiased": True}
    return _left_out("similarity_trimmed_cka", value, without, pair, settings)


def _mutual(pair: _Pair, task: TaskInput) -> list[MetricValue]:
    """Shares of common neighbors: sums over rows, so they are bootstrapped; the neighbors stay those of all rows."""
    ks = task.spec.similarity.k
    graphs = [nearest(features, None, max(ks)) for features in (pair.x, pair.y)]
    shared = mutual_neighbors(graphs[0], graphs[1], ks)
    values = []
    for column, k in enumerate(ks):
        statistic = mean_statistic(shared[:, column], pair.clusters, per_item=k)
        chance = round(k / (len(pair.x) - 1), 4)
        settings = {**pair.settings, "k": k, "distance": "cosine", "chance": chance}
        values += bootstrapped_values("similarity", {f"mutual_knn_k{k}": statistic}, pair.clusters, settings)
    return values


def _procrustes(pair: _Pair) -> MetricValue:
    value, without = leave_out_moments(procrustes_similarity, pair.x, pair.y, pair.clusters, pair.device)
    return _left_out("similarity_procrustes", value, without, pair, pair.settings)


def _effective_rank(pair: _Pair) -> MetricValue:
    without = _without_each(lambda kept: effective_rank(pair.x[kept]), pair)
    settings = {name: value for name, value in pair.settings.items() if name != "to"}
    value = _left_out("similarity_effective_rank", effective_rank(pair.x), without, pair, settings)
    return replace(value, better="neither")


def _ridge(task: TaskInput) -> list[MetricValue]:
    """How well a linear map from the encoder predicts the teacher on slides that it was not fitted on."""
    sums, tested, penalties = [], [], []
    for train, test in _ridge_parts(task):
        ridge = _fit(task, train)
        assert task.reference is not None
        sums.append(ridge_sums(ridge, task.features[test], task.reference[test]))
        tested.append(test)
        penalties.append(ridge.penalty)
    rows = np.concatenate(tested)
    clusters = task.rows.cluster[rows]
    totals = cluster_sums(np.concatenate(sums), clusters)
    settings = {
        "to": task.teacher,
        "penalty": describe_choices(penalties),
        "fitted_on": f"other {task.rows.cluster_unit}",
    }
    statistics = {"ridge_r2": of_sums(explained_share, totals), "projected_cosine": of_sums(mean_cosine, totals)}
    return bootstrapped_values("similarity", statistics, clusters, settings)


def _ridge_parts(task: TaskInput) -> Iterator[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]]:
    """The fixed split, or folds of whole clusters, which need no class."""
    if task.spec.has_fixed_split:
        yield np.flatnonzero(task.rows.part == "train"), np.flatnonzero(task.rows.part == "test")
        return
    codes, count = cluster_codes(task.rows.cluster)
    if count < 2:
        raise TaskError(f"a ridge map needs {task.rows.cluster_unit} to fit on and others to test on; there is one")
    folds = min(task.spec.folds or task.spec.similarity.folds, count)
    fold = (keyed_generator("ridge folds", task.seed).permutation(count) % folds)[codes]
    for number in range(folds):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def _fit(task: TaskInput, train: Int64[np.ndarray, " train"]) -> RidgeMap:
    assert task.reference is not None
    groups = task.rows.cluster[train]
    folds = min(task.spec.similarity.folds, len(np.unique(groups)))
    return fit_ridge(task.features[train], task.reference[train], groups, folds=folds, seed=task.seed)
