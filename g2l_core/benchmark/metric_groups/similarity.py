"""Metric groups `cka` and `similarity`: how similar an encoder's features are to the teacher's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Shaped

from g2l_core.benchmark.metric_groups.values import (
    MetricValue,
    Settings,
    TaskInput,
    describe_choices,
    metric_values,
    ratio,
)
from g2l_core.errors import TaskError
from g2l_core.metrics.alignment import central_rows, effective_rank, mutual_neighbors, procrustes_similarity, rbf_cka
from g2l_core.metrics.intervals import Figure, of_neighbors, of_sums
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import Neighbors
from g2l_core.metrics.patients import MAX_GROUPS, Design, design_of, leave_out_groups
from g2l_core.metrics.ridge import RidgeMap, explained_share, fit_ridge, mean_cosine, ridge_sums
from g2l_core.metrics.scales import CORRELATION, SHARE
from g2l_core.metrics.similarity import leave_out_each, leave_out_moments
from g2l_core.metrics.statistics import cluster_codes
from g2l_core.rng import keyed_generator
from g2l_core.types import Features


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The features of an encoder and of the teacher on rows that nothing is trained on."""

    x: Features
    y: Float16[np.ndarray, "patch dim_y"]
    clusters: Shaped[np.ndarray, " row"]
    design: Design
    settings: Settings
    device: str
    """Where sums over rows are taken."""

    @property
    def groups(self) -> Int64[np.ndarray, " row"]:
        """What is left out together. All rows count, so that encoders whose rows are trimmed agree."""
        return leave_out_groups(self.clusters)[0]

    def drawn(self, max_rows: int, seed: int) -> "_Pair":
        """At most so many of the rows, the same ones for every encoder."""
        if len(self.x) <= max_rows:
            return self
        rows = np.sort(keyed_generator("similarity rows", seed).choice(len(self.x), max_rows, replace=False))
        settings = {**self.settings, "rows_drawn": max_rows}
        clusters = self.clusters[rows]
        design = design_of(clusters, unit=self.design.unit, most=MAX_GROUPS)
        return replace(self, x=self.x[rows], y=self.y[rows], clusters=clusters, design=design, settings=settings)


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
        design=task.design(clusters, most=MAX_GROUPS),
        settings={"rows": task.test_rows_name},
        device=task.device,
    )


def cka(task: TaskInput) -> list[MetricValue]:
    """Linear CKA, debiased and biased."""
    pair = _pair(task)
    return [] if pair is None else [_linear(f"cka_{kind}", pair, kind == "debiased") for kind in ("debiased", "biased")]


def _linear(metric: str, pair: _Pair, debiased: bool) -> MetricValue:
    values = leave_out_each(pair.x, pair.y, pair.groups, debiased, pair.device)
    return _left_out(metric, values, pair, pair.settings)


def _left_out(
    metric: str, values: Float64[np.ndarray, " whole_and_group"], pair: _Pair, settings: Settings
) -> MetricValue:
    figure = Figure(values=values, design=pair.design)
    return MetricValue(metric=metric, figure=figure, n=len(pair.x), settings=settings)


def _leaving_out_each(
    measure: Callable[[Bool[np.ndarray, " row"]], float], pair: _Pair
) -> Float64[np.ndarray, " whole_and_group"]:
    """A measure of all rows, then of those without each group, of which there is none where one group is all."""
    groups = pair.groups
    names = np.unique(groups)
    everyone = np.ones(len(groups), bool)
    return np.array([measure(kept) for kept in (everyone, *(groups != name for name in names if len(names) > 1))])


def similarity(task: TaskInput) -> list[MetricValue]:
    """All other metrics of similarity but the ridge map's. The teacher has its effective rank alone."""
    max_rows, pair = task.spec.similarity.rows, _pair(task)
    if pair is None:
        return [_effective_rank(_with_itself(task).drawn(max_rows, task.seed))]
    drawn = pair.drawn(max_rows, task.seed)
    return [
        _rbf(drawn, task),
        _trimmed(pair, task),
        *_mutual(drawn, task),
        _procrustes(pair),
        _effective_rank(drawn),
    ]


def _rbf(pair: _Pair, task: TaskInput) -> MetricValue:
    bandwidth = task.spec.similarity.bandwidth
    measure = partial(rbf_cka, debiased=True, bandwidth=bandwidth, max_rows=len(pair.x), seed=task.seed)
    settings = {**pair.settings, "bandwidth": bandwidth, "debiased": True}
    values = _leaving_out_each(lambda kept: measure(pair.x[kept], pair.y[kept]), pair)
    return _left_out("similarity_rbf_cka", values, pair, settings)


def _trimmed(pair: _Pair, task: TaskInput) -> MetricValue:
    share = task.spec.similarity.trim
    kept = central_rows(pair.x, pair.y, share=share)
    groups = pair.groups
    if len(np.unique(groups[kept])) < len(np.unique(groups)):
        raise TaskError(f"a share of {share} of all rows is all of a patient's; lower similarity_trim")
    values = leave_out_each(pair.x[kept], pair.y[kept], groups[kept], True, pair.device)
    settings = {**pair.settings, "trimmed_share": share, "rows_left_out": int((~kept).sum()), "debiased": True}
    return _left_out("similarity_trimmed_cka", values, pair, settings)


def _mutual(pair: _Pair, task: TaskInput) -> list[MetricValue]:
    """Shares of common neighbors, without each patient's rows as queries and as neighbors."""
    ks = task.spec.similarity.k
    searches = [
        Search(reference=features, k=max(ks), left_out_with=pair.groups) for features in (pair.x, np.asarray(pair.y))
    ]

    def shared(queries: Int64[np.ndarray, " some"], own: Neighbors, other: Neighbors) -> Float64[np.ndarray, "_ _"]:
        counts = mutual_neighbors(own, other, ks) if len(queries) else np.zeros((0, len(ks)))
        return np.column_stack([counts / np.array(ks), np.ones(len(queries))])

    totals = leave_out_sums(searches, shared, pair.groups, len(pair.design.counts)).totals
    values = []
    for column, k in enumerate(ks):
        figure = of_neighbors(ratio(totals[:, [column, -1]]), pair.design, SHARE)
        chance = round(k / (len(pair.x) - 1), 4)
        settings = {**pair.settings, "k": k, "distance": "cosine", "chance": chance}
        values += metric_values("similarity", {f"mutual_knn_k{k}": figure}, settings, n=len(pair.x))
    return values


def _procrustes(pair: _Pair) -> MetricValue:
    values = leave_out_moments(procrustes_similarity, pair.x, pair.y, pair.clusters, pair.device)
    return _left_out("similarity_procrustes", values, pair, pair.settings)


def _effective_rank(pair: _Pair) -> MetricValue:
    values = _leaving_out_each(lambda kept: effective_rank(pair.x[kept]), pair)
    settings = {name: value for name, value in pair.settings.items() if name != "to"}
    return replace(_left_out("similarity_effective_rank", values, pair, settings), better="neither")


def ridge_map(task: TaskInput) -> list[MetricValue]:
    """How well a linear map from the encoder predicts the teacher on slides that it was not fitted on."""
    if task.reference is None:
        return []
    sums, tested, penalties = [], [], []
    for train, test in _ridge_parts(task):
        ridge = _fit(task, train)
        sums.append(ridge_sums(ridge, task.features[test], task.reference[test]))
        tested.append(test)
        penalties.append(ridge.penalty)
    rows = np.concatenate(tested)
    clusters = task.rows.cluster[rows]
    design, of_rows = task.design(clusters), np.concatenate(sums)
    settings = {
        "to": task.teacher,
        "penalty": describe_choices(penalties),
        "fitted_on": f"other {task.rows.cluster_unit}",
    }
    figures = {
        "ridge_r2": of_sums(explained_share, of_rows, clusters, design),
        "projected_cosine": of_sums(mean_cosine, of_rows, clusters, design, CORRELATION),
    }
    return metric_values("similarity", figures, settings, n=len(rows))


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
    if len(np.unique(groups)) == 1:  # the penalty is chosen on its rows
        groups = np.arange(len(train))
    folds = min(task.spec.similarity.folds, len(np.unique(groups)))
    return fit_ridge(task.features[train], task.reference[train], groups, folds=folds, seed=task.seed)
