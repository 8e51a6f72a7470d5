"""A benchmark task: stored features, labels and a split rule in, figures with intervals out. Loads no model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from g2l_core.errors import G2LError, TaskError
from g2l_core.metrics.neighbors import knn_predict, nearest
from g2l_core.metrics.probe import accuracy, balanced_accuracy, confusion, linear_probe, macro_auc, macro_f1
from g2l_core.metrics.results import Comparison, Estimate, Failure, Pictures, Result
from g2l_core.metrics.robustness import pathorob_index, ratio_index, robustness_counts
from g2l_core.metrics.similarity import cka_difference, cka_interval
from g2l_core.metrics.statistics import cluster_bootstrap, cluster_sums, of_sums, of_weights, paired_bootstrap
from g2l_core.store.features import FeatureStore
from g2l_core.task_data import TaskRows, TaskSpec, gather, parts
from g2l_core.task_pictures import confusion_matrix, task_pictures
from g2l_core.types import Features

Statistic = Callable[[Any], Any]
Settings = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Who is compared with whom, and how intervals are drawn."""

    encoders: tuple[str, ...]
    """Keys; the first is the teacher: the others' CKA is to it, and their differences from it."""
    baseline: str = ""
    """A second encoder that the others' differences are taken from: the student before distillation."""
    draws: int = 1000
    seed: int = 0

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(encoder, reference) of every comparison."""
        found = [(encoder, self.encoders[0]) for encoder in self.encoders[1:]]
        if self.baseline:
            found += [(e, self.baseline) for e in self.encoders[1:] if e != self.baseline]
        return found


@dataclass
class TaskOutcome:
    """What a task gave."""

    results: list[Result] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """One figure of one encoder before its interval: a statistic over clusters."""

    metric: str
    statistic: Statistic
    clusters: Shaped[np.ndarray, " row"]
    settings: Settings
    confusion: tuple[np.ndarray, np.ndarray] | None = None
    """Classes, and counts pooled over clusters; kept with one figure of each classifier."""


def evaluate_task(stores: Sequence[FeatureStore], spec: TaskSpec, bench: BenchSpec, folder: Path) -> TaskOutcome:
    """Evaluate every metric of a task for every encoder; what fails is recorded and costs only itself.

    Args:
        stores: The cohorts.
        spec: The task.
        bench: Encoders and statistics.
        folder: What the task's label file is relative to.
    """
    outcome = TaskOutcome()
    try:
        rows = gather(stores, spec, folder)
    except G2LError as error:
        outcome.failures.append(Failure(task=spec.name, reason=str(error)))
        return outcome
    features = _features(rows, spec, bench, outcome)
    if "cka" in spec.metrics:
        _guarded(outcome, spec, "", lambda: _cka(rows, spec, bench, features, outcome))
    figures: dict[str, list[_Figure]] = {}
    for encoder, values in features.items():
        figures[encoder] = []
        for metric, evaluate in _FAMILIES.items():
            if metric in spec.metrics:
                found = _guarded(outcome, spec, encoder, partial(evaluate, rows, values, spec, bench))
                figures[encoder] += found or []
    _add_intervals(figures, rows, spec, bench, outcome)
    _add_pictures(figures, rows, features, spec, bench, outcome)
    return outcome


def _guarded(outcome: TaskOutcome, spec: TaskSpec, encoder: str, evaluate: Callable[[], Any]) -> Any:
    """What `evaluate` gives, or None with its failure recorded."""
    try:
        return evaluate()
    except TaskError as error:
        outcome.failures.append(Failure(task=spec.name, reason=str(error), encoder=encoder))
        return None


def _features(rows: TaskRows, spec: TaskSpec, bench: BenchSpec, outcome: TaskOutcome) -> dict[str, Features]:
    found: dict[str, Features] = {}
    for encoder in bench.encoders:
        try:
            found[encoder] = rows.features(encoder)
        except G2LError as error:
            outcome.failures.append(Failure(task=spec.name, reason=str(error), encoder=encoder))
    return found


def _test_rows(rows: TaskRows, spec: TaskSpec) -> np.ndarray:
    """Rows that nothing was trained on: the test part, or all where there is no fixed split."""
    return rows.part == "test" if spec.split or spec.train else np.ones(len(rows), bool)


def _cka(
    rows: TaskRows, spec: TaskSpec, bench: BenchSpec, features: Mapping[str, Features], outcome: TaskOutcome
) -> None:
    """CKA of every encoder to the teacher on the test rows, and the differences to the baseline."""
    teacher = bench.encoders[0]
    chosen = _test_rows(rows, spec)
    clusters, unit = rows.cluster[chosen], rows.cluster_unit
    of = {encoder: values[chosen] for encoder, values in features.items()}
    for encoder in [e for e in bench.encoders[1:] if e in of and teacher in of]:
        for kind in ("debiased", "biased"):
            estimate = cka_interval(of[encoder], of[teacher], clusters, debiased=kind == "debiased", unit=unit)
            outcome.results.append(
                Result(
                    task=spec.name,
                    metric=f"cka_{kind}",
                    encoder=encoder,
                    estimate=estimate,
                    n=int(chosen.sum()),
                    settings={"to": teacher, "rows": "test" if spec.split or spec.train else "all"},
                )
            )
        if bench.baseline in of and encoder != bench.baseline:
            difference, p = cka_difference(
                of[encoder], of[bench.baseline], of[teacher], clusters, debiased=True, unit=unit
            )
            outcome.comparisons.append(
                Comparison(
                    task=spec.name,
                    metric="cka_debiased",
                    encoder=encoder,
                    reference=bench.baseline,
                    difference=difference,
                    p_value=p,
                )
            )


def _knn(rows: TaskRows, features: Features, spec: TaskSpec, bench: BenchSpec) -> list[_Figure]:
    """The vote of the nearest: accuracy and balanced accuracy."""
    truth, predicted, clusters = [], [], []
    for train, test in parts(rows, spec, bench.seed):
        found = nearest(features[train], features[test], spec.knn_k)
        predicted.append(knn_predict(found, rows.label[train]))
        truth.append(rows.label[test])
        clusters.append(rows.cluster[test])
    settings = {"k": spec.knn_k, "distance": "cosine", "vote": "uniform", **_split_settings(rows, spec)}
    return _class_figures("knn", np.concatenate(truth), np.concatenate(predicted), np.concatenate(clusters), settings)


def _probe(rows: TaskRows, features: Features, spec: TaskSpec, bench: BenchSpec) -> list[_Figure]:
    """Linear probe: accuracy, balanced accuracy, F1 and AUC."""
    truth, predicted, clusters, probabilities, converged, chosen = [], [], [], [], True, []
    for train, test in parts(rows, spec, bench.seed):
        result = linear_probe(
            features[train],
            rows.label[train],
            features[test],
            c_values=spec.probe_c,
            groups=rows.cluster[train],
            seed=bench.seed,
        )
        truth.append(rows.label[test])
        predicted.append(result.predictions)
        clusters.append(rows.cluster[test])
        probabilities.append(result.probabilities)
        chosen.append(result.c)
        converged = converged and result.converged
    settings = {"C": chosen[0], "converged": converged, **_split_settings(rows, spec)}
    labels, groups = np.concatenate(truth), np.concatenate(clusters)
    figures = _class_figures("probe", labels, np.concatenate(predicted), groups, settings)
    scores, classes = np.concatenate(probabilities), result.classes
    auc = of_weights(lambda weights: macro_auc(labels, scores, classes, weights), groups)
    return [*figures, _Figure(metric="probe_auc", statistic=auc, clusters=groups, settings=settings)]


def _class_figures(
    prefix: str, truth: np.ndarray, predicted: np.ndarray, clusters: np.ndarray, settings: Settings
) -> list[_Figure]:
    matrices = confusion(truth, predicted, clusters)
    pooled = np.unique(np.concatenate([truth, predicted])), matrices.sum(axis=0)
    scores = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}
    return [
        _Figure(
            metric=f"{prefix}_{name}",
            statistic=of_sums(score, matrices),
            clusters=clusters,
            settings=settings,
            confusion=pooled if name == "accuracy" else None,
        )
        for name, score in scores.items()
    ]


def _robustness(rows: TaskRows, features: Features, spec: TaskSpec, bench: BenchSpec) -> list[_Figure]:
    """Robustness indices over k on the test rows, neighbours of the same slide left out."""
    chosen = _test_rows(rows, spec)
    if not rows.center[chosen].astype(bool).all():
        raise TaskError(f"robustness needs the column {spec.center!r} for every slide; give it in the manifest")
    found = nearest(features[chosen], None, max(spec.robustness_k), groups=rows.slide_ids[chosen])
    clusters = rows.cluster[chosen]
    figures = []
    for k in spec.robustness_k:
        counts = robustness_counts(found, rows.label[chosen], rows.center[chosen], k=k)
        sums = cluster_sums(counts, clusters)
        settings: Settings = {"k": k, "distance": "cosine", "neighbours": "of other slides"}
        for name, index in (("ratio", ratio_index), ("pathorob", pathorob_index)):
            metric = f"robustness_{name}_k{k}"
            figures.append(_Figure(metric=metric, statistic=of_sums(index, sums), clusters=clusters, settings=settings))
    return figures


_FAMILIES: Mapping[str, Callable[[TaskRows, Features, TaskSpec, BenchSpec], list[_Figure]]] = {
    "knn": _knn,
    "probe": _probe,
    "robustness": _robustness,
}


def _split_settings(rows: TaskRows, spec: TaskSpec) -> dict[str, str | int]:
    how = f"{spec.folds} folds by {rows.cluster_unit}" if spec.folds else f"fixed, {spec.split or spec.test}"
    return {"split": how, "duplicates_dropped": rows.duplicates_dropped}


def _add_intervals(
    figures: Mapping[str, Sequence[_Figure]],
    rows: TaskRows,
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    """Bootstrap every figure, and every difference on the same draws."""
    bootstrap = partial(cluster_bootstrap, unit=rows.cluster_unit, draws=bench.draws, seed=bench.seed)
    paired = partial(paired_bootstrap, unit=rows.cluster_unit, draws=bench.draws, seed=bench.seed)
    for encoder, found in figures.items():
        for figure in found:
            estimate: Estimate | None = _guarded(
                outcome, spec, encoder, partial(bootstrap, figure.statistic, figure.clusters)
            )
            if estimate:
                outcome.results.append(
                    Result(
                        task=spec.name,
                        metric=figure.metric,
                        encoder=encoder,
                        estimate=estimate,
                        n=len(figure.clusters),
                        settings=figure.settings,
                    )
                )
    for encoder, reference in bench.pairs:
        theirs = {figure.metric: figure for figure in figures.get(reference, [])}
        for figure in figures.get(encoder, []):
            if figure.metric not in theirs:
                continue
            pair = _guarded(
                outcome,
                spec,
                encoder,
                partial(paired, figure.statistic, theirs[figure.metric].statistic, figure.clusters),
            )
            if pair:
                outcome.comparisons.append(
                    Comparison(
                        task=spec.name,
                        metric=figure.metric,
                        encoder=encoder,
                        reference=reference,
                        difference=pair[0],
                        p_value=pair[1],
                    )
                )


def _add_pictures(
    figures: Mapping[str, Sequence[_Figure]],
    rows: TaskRows,
    features: Mapping[str, Features],
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    outcome.pictures, failures = task_pictures(spec.name, rows, _test_rows(rows, spec), features, bench.seed)
    outcome.failures += failures
    for encoder, found in figures.items():
        for figure in found:
            if figure.confusion:
                classes, counts = figure.confusion
                classifier = figure.metric.partition("_")[0]
                outcome.pictures += confusion_matrix(spec.name, classifier, encoder, classes, counts, figure.settings)
