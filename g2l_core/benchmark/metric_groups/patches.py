"""Metric groups of single patches: `knn`, `probe`, `prototypes`, `regression`, `retrieval`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.benchmark.metric_groups.values import (
    CLASSIFIED,
    MetricValue,
    Settings,
    TaskInput,
    classification_values,
    describe_choices,
    metric_values,
    ratio,
)
from g2l_core.benchmark.rows import parts, split_parts
from g2l_core.benchmark.spec import PROBE_C, ProbeOptions
from g2l_core.errors import TaskError
from g2l_core.metrics.calibration import (
    NO_INTERVAL,
    brier_score,
    brier_sums,
    calibration_error,
    calibration_sums,
    expected_brier_variance,
)
from g2l_core.metrics.fewshot import draw_shots, prototypes, retrieval_sums
from g2l_core.metrics.intervals import of_group_sums, of_neighbors, of_sums
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import Neighbors, knn_predict
from g2l_core.metrics.patients import MAX_GROUPS, MAX_SUMMED_GROUPS, leave_out_groups
from g2l_core.metrics.probe import ProbeResult, auc_figure, linear_probe
from g2l_core.metrics.ridge import correlation_sums, explained_share, fit_ridge, pearson, ridge_sums
from g2l_core.metrics.scales import CORRELATION, SHARE, SQUARED_ERROR
from g2l_core.rng import keyed_generator

_WEIGHTS: dict[tuple[str, str], tuple[Literal["uniform", "distance", "similarity"], str]] = {
    ("majority", "cosine"): ("uniform", "majority"),
    ("majority", "euclidean"): ("uniform", "majority"),
    ("weighted", "cosine"): ("similarity", "weighted by exp(cosine / 0.07)"),
    ("weighted", "euclidean"): ("distance", "weighted by 1 / distance"),
}


def _distance(name: str) -> Literal["cosine", "euclidean"]:
    return "cosine" if name == "cosine" else "euclidean"


@dataclass(frozen=True, kw_only=True)
class _Ballot:
    """One way of voting."""

    prefix: str
    weights: Literal["uniform", "distance", "similarity"]
    description: str
    k: int


def _ballots(task: TaskInput) -> list[_Ballot]:
    options = task.spec.knn
    return [
        _Ballot(
            prefix="knn" if vote == options.votes[0] else f"knn_{vote}",
            weights=_WEIGHTS[vote, options.distance][0],
            description=_WEIGHTS[vote, options.distance][1],
            k=k,
        )
        for vote in options.votes
        for k in options.k
    ]


def knn(task: TaskInput) -> list[MetricValue]:
    """The vote of the nearest training patches, for each k and way of voting. One search serves all of them.

    With folds, every patient is tested and votes for others, and is left out as both.
    """
    rows, options, ballots = task.rows, task.spec.knn, _ballots(task)
    classes, labels = np.unique(rows.label, return_inverse=True)
    groups, count = leave_out_groups(rows.cluster)
    shape = len(ballots), len(classes), len(classes)
    order, predicted = np.zeros(0, np.int64), np.zeros((0, len(ballots)), np.int64)
    totals = np.zeros((1 + count + count * (count - 1) // 2, *shape))
    for train, test in parts(rows, task.spec, task.seed):
        voters = groups[train] if task.spec.folds else np.full(len(train), -1)
        search = Search(
            reference=task.features[train],
            queries=task.features[test],
            k=max(options.k),
            metric=_distance(options.distance),
            left_out_with=voters,
        )
        sums = leave_out_sums(
            [search],
            partial(_votes, ballots, labels[train]),
            groups[test],
            count,
            partial(_matrices, labels[test], len(classes)),
        )
        order, predicted = np.append(order, test), np.vstack([predicted, sums.base.astype(np.int64)])
        totals += sums.totals.reshape(-1, *shape)
    values: list[MetricValue] = []
    for i, ballot in enumerate(ballots):
        suffix = "" if len(ballots) == 1 else f"_k{ballot.k}"
        settings = {"k": ballot.k, "distance": options.distance, "vote": ballot.description, **task.split_settings}
        of_ballot = classification_values(
            task,
            ballot.prefix,
            rows.label[order],
            classes[predicted[:, i]],
            rows.cluster[order],
            settings,
            suffix=suffix,
            plotted=not values,
        )
        values += _both_ways(task, of_ballot, totals[:, i], order) if task.spec.folds else of_ballot
    return values


def _votes(
    ballots: Sequence[_Ballot], labels: Int64[np.ndarray, " train"], _: Int64[np.ndarray, " query"], graph: Neighbors
) -> Int64[np.ndarray, "query ballot"]:
    """The class that each way of voting predicts for some queries."""
    return np.stack([knn_predict(graph, labels, k=ballot.k, weights=ballot.weights) for ballot in ballots], axis=1)


def _matrices(
    labels: Int64[np.ndarray, " test"],
    classes: int,
    queries: Int64[np.ndarray, " query"],
    predicted: Float64[np.ndarray, "query ballot"],
) -> Float64[np.ndarray, " sum"]:
    """The confusion matrix of each way of voting, one behind the other."""
    cells = labels[queries, None] * classes + predicted.astype(np.int64)
    size = classes * classes
    return np.concatenate([np.bincount(column, minlength=size) for column in cells.T]).astype(np.float64)


def _both_ways(
    task: TaskInput,
    values: Sequence[MetricValue],
    totals: Float64[np.ndarray, "set class class"],
    order: Int64[np.ndarray, " test"],
) -> list[MetricValue]:
    """The same values, without each patient as a voter too. Nothing can then be exchanged between two encoders."""
    clusters, labels = task.rows.cluster[order], task.rows.label[order]
    by_row, by_class = (task.design(clusters, strata, most=MAX_GROUPS) for strata in (None, labels))
    return [
        replace(
            value,
            figure=of_neighbors(score(totals), by_row if name == "accuracy" else by_class, SHARE),
        )
        for (name, score), value in zip(CLASSIFIED.items(), values, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What classifiers predict of items that they were not fitted on: patches, slides or patients."""

    truth: Shaped[np.ndarray, " item"]
    clusters: Shaped[np.ndarray, " item"]
    classes: Shaped[np.ndarray, " class"]
    probabilities: Float64[np.ndarray, "item class"]
    predictions: Shaped[np.ndarray, " item"]

    @classmethod
    def of_folds(
        cls,
        labels: Shaped[np.ndarray, " whole"],
        clusters: Shaped[np.ndarray, " whole"],
        tested: Sequence[Int64[np.ndarray, "_"]],
        folds: Sequence[tuple[Shaped[np.ndarray, "_"], Float64[np.ndarray, "_ _"], Shaped[np.ndarray, "_"]]],
    ) -> "Predicted":
        """Pool the test items of all folds.

        Args:
            labels: The class of every item of the task.
            clusters: The patient of every item of the task.
            tested: The test items of each fold.
            folds: The classes that each fold knows, its probabilities and its predictions.
        """
        classes = np.unique(np.concatenate([known for known, _, _ in folds]))
        order = np.concatenate(tested)
        probabilities = []
        for known, narrow, _ in folds:
            wide = np.zeros((len(narrow), len(classes)))
            wide[:, np.searchsorted(classes, known)] = narrow
            probabilities.append(wide)
        return cls(
            truth=labels[order],
            clusters=clusters[order],
            classes=classes,
            probabilities=np.concatenate(probabilities),
            predictions=np.concatenate([predicted for _, _, predicted in folds]),
        )

    def values(self, task: TaskInput, group: str, settings: Settings) -> list[MetricValue]:
        """Accuracy, balanced accuracy, F1, AUC, Brier score, calibration error."""
        codes, _ = leave_out_groups(self.clusters, MAX_SUMMED_GROUPS)
        data, n = (self.truth, self.probabilities, self.classes), len(self.truth)
        by_row, by_class = task.design(self.clusters), task.design(self.clusters, self.truth)
        calibration = of_group_sums(calibration_error, calibration_sums(*data, codes), by_row)
        brier = of_group_sums(brier_score, brier_sums(*data, codes), by_row, SQUARED_ERROR)
        errors = {
            "brier": replace(brier, expected_variance=expected_brier_variance(self.probabilities)),
            "ece": replace(calibration, no_interval=NO_INTERVAL),
        }
        area = auc_figure(*data, self.clusters, by_class)
        return [
            *classification_values(task, group, self.truth, self.predictions, self.clusters, settings),
            *metric_values(group, {"auc": area}, settings, n=n),
            *metric_values(group, errors, settings, n=n, better="lower"),
        ]


def fit_probe(
    train: Float[np.ndarray, "train dim"],
    labels: Shaped[np.ndarray, " train"],
    groups: Shaped[np.ndarray, " train"],
    test: Float[np.ndarray, "test dim"],
    options: ProbeOptions,
    seed: int,
) -> tuple[ProbeResult, str]:
    """A linear probe with C chosen on folds of the training patients, and in words how it was chosen.

    Where a class has one training patient, C is 1 in place of the default grid; a grid of the task's own is refused.

    Raises:
        TaskError: As `linear_probe`.
    """
    fewest = min(len(np.unique(groups[labels == name])) for name in np.unique(labels))
    folds = min(options.folds, fewest)
    c_values, chosen_by = options.c, f"log loss on {folds} folds of the training part"
    if len(options.c) == 1:
        chosen_by = "given"
    elif folds < 2 and options.c == PROBE_C:
        c_values, chosen_by = (1.0,), "1, as a class has one training patient"
    elif folds < 2:
        raise TaskError("to choose among several probe_c, every class needs two training patients; give one C")
    result = linear_probe(train, labels, test, c_values=c_values, groups=groups, folds=max(folds, 2), seed=seed)
    return result, chosen_by


def probe_settings(task: TaskInput, probes: Sequence[tuple[ProbeResult, str]]) -> Settings:
    """What the probes of all folds had in common."""
    return {
        "C": describe_choices([result.c for result, _ in probes]),
        "C_chosen_by": "; ".join(dict.fromkeys(chosen_by for _, chosen_by in probes)),
        "converged": all(result.converged for result, _ in probes),
        **task.split_settings,
    }


def probe_folds(
    task: TaskInput,
    features: Float[np.ndarray, "item dim"],
    labels: Shaped[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    splits: Sequence[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]],
) -> tuple[Predicted, Settings]:
    """Fit a probe on the training items of each fold and predict its test items."""
    probes = [
        fit_probe(features[train], labels[train], clusters[train], features[test], task.spec.probe, task.seed)
        for train, test in splits
    ]
    folds = [(result.classes, result.probabilities, result.predictions) for result, _ in probes]
    predicted = Predicted.of_folds(labels, clusters, [test for _, test in splits], folds)
    return predicted, probe_settings(task, probes)


def probe(task: TaskInput) -> list[MetricValue]:
    """Logistic regression on single patches."""
    rows = task.rows
    predicted, settings = probe_folds(task, task.features, rows.label, rows.cluster, parts(rows, task.spec, task.seed))
    return predicted.values(task, "probe", settings)


def prototype_vote(task: TaskInput) -> list[MetricValue]:
    """The nearest mean of a few training patches of each class, over repeated draws of them."""
    rows, options = task.rows, task.spec.prototypes
    values = []
    for shots in options.shots:
        predicted, tested = [], []
        for train, test in parts(rows, task.spec, task.seed):
            center = task.features[train].mean(axis=0, dtype=np.float64)
            for repeat in range(options.repeats):
                seed = int(keyed_generator("shots", task.seed, repeat).integers(2**32))
                drawn = train[draw_shots(rows.label[train], rows.cluster[train], shots, seed=seed)]
                means = prototypes(task.features[drawn], rows.label[drawn], center)
                predicted.append(means.predict(task.features[test]))
                tested.append(test)
        order = np.concatenate(tested)
        values += classification_values(
            task,
            "prototypes",
            rows.label[order],
            np.concatenate(predicted),
            rows.cluster[order],
            {"shots": shots, "repeats": options.repeats, **task.split_settings},
            suffix=f"_shots{shots}",
            n=len(order) // options.repeats,
            plotted=False,
        )
    return values


def numbers(values: Shaped[np.ndarray, " item"], column: str) -> Float64[np.ndarray, " item"]:
    """A column as numbers.

    Raises:
        TaskError: A value is not a number, or not finite.
    """
    try:
        floats = values.astype(np.float64)
    except ValueError as error:
        raise TaskError(f"column {column!r} must hold numbers: {error}") from error
    if not np.isfinite(floats).all():
        raise TaskError(f"column {column!r} must hold finite numbers; got {values[~np.isfinite(floats)][0]}")
    return floats


def regression(task: TaskInput) -> list[MetricValue]:
    """Ridge regression for a label that is a number."""
    rows, options = task.rows, task.spec.regression
    truth = numbers(rows.label, task.spec.label)[:, None]
    tested, predicted, errors, penalties = [], [], [], []
    no_strata = np.zeros(len(rows), np.int64)
    for train, test in split_parts(no_strata, rows.cluster, rows.part, task.spec, rows.cluster_unit, task.seed):
        groups = rows.cluster[train]
        folds = min(options.folds, len(np.unique(groups)))
        ridge = fit_ridge(
            task.features[train], truth[train], groups, penalties=options.penalties, folds=folds, seed=task.seed
        )
        predicted.append(ridge.predict(task.features[test])[:, 0])
        errors.append(ridge_sums(ridge, task.features[test], truth[test]))
        tested.append(test)
        penalties.append(ridge.penalty)
    order = np.concatenate(tested)
    clusters = rows.cluster[order]
    correlations = correlation_sums(np.concatenate(predicted), truth[order, 0])
    design = task.design(clusters, weights=(truth[order, 0] - truth[order, 0].mean()) ** 2)
    figures = {
        "pearson": of_sums(pearson, correlations, clusters, design, CORRELATION),
        "r2": of_sums(explained_share, np.concatenate(errors), clusters, design),
    }
    settings = {"penalty": describe_choices(penalties), **task.split_settings}
    return metric_values("regression", figures, settings, n=len(order))


def retrieval(task: TaskInput) -> list[MetricValue]:
    """Whether patches of the same class of other patients are found first, among rows that nothing is trained on."""
    tested, options = np.flatnonzero(task.test_rows), task.spec.retrieval
    labels, clusters = task.rows.label[tested], task.rows.cluster[tested]
    if len(np.unique(labels)) < 2:
        raise TaskError(f"retrieval needs two classes at least; all {len(labels):,} rows are {labels[0]}")
    metric = _distance(options.distance)
    groups, count = leave_out_groups(clusters)
    search = Search(
        reference=task.features[tested], k=max(options.k), metric=metric, groups=clusters, left_out_with=groups
    )
    sums = leave_out_sums([search], partial(_retrieved, labels, options.k), groups, count)
    design = task.design(clusters, most=MAX_GROUPS)
    values = []
    for column, k in enumerate(options.k):
        settings: Settings = {
            "k": k,
            "distance": options.distance,
            "among": f"{task.test_rows_name} rows of other {task.rows.cluster_unit}",
            "duplicates_dropped": task.rows.duplicates_dropped,
        }
        names = {f"top_k{k}": column, f"map_k{k}": len(options.k) + column}
        figures = {name: of_neighbors(ratio(sums.totals[:, [of, -1]]), design, SHARE) for name, of in names.items()}
        values += metric_values("retrieval", figures, settings, n=len(tested))
    return values


def _retrieved(
    labels: Shaped[np.ndarray, " row"], ks: Sequence[int], queries: Int64[np.ndarray, " query"], graph: Neighbors
) -> Float64[np.ndarray, "query column"]:
    """What `retrieval_sums` says of some queries, and 1 for each."""
    return np.column_stack([retrieval_sums(graph, labels, ks, labels[queries]), np.ones(len(queries))])
