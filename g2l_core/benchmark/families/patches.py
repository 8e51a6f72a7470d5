"""Families that ask single patches: `knn`, `probe`, `prototypes`, `regression`, `retrieval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Shaped

from g2l_core.benchmark.families.figures import Drawn, Figure, Settings, TaskInput, chosen_in_words, class_figures
from g2l_core.benchmark.rows import parts, split_parts
from g2l_core.benchmark.spec import PROBE_C, ProbeOptions
from g2l_core.errors import TaskError
from g2l_core.metrics.calibration import brier_score, brier_sums, calibration_error, calibration_sums
from g2l_core.metrics.fewshot import draw_shots, prototypes, retrieval_sums
from g2l_core.metrics.knn.neighbors import Neighbors, knn_predict, nearest
from g2l_core.metrics.probe import ProbeResult, auc_statistic, linear_probe
from g2l_core.metrics.ridge import correlation_sums, explained_share, fit_ridge, pearson, ridge_sums
from g2l_core.metrics.statistics import cluster_sums, of_sums
from g2l_core.rng import keyed_generator

_WEIGHTS: dict[tuple[str, str], tuple[Literal["uniform", "distance", "similarity"], str]] = {
    ("majority", "cosine"): ("uniform", "majority"),
    ("majority", "euclidean"): ("uniform", "majority"),
    ("weighted", "cosine"): ("similarity", "weighted by exp(cosine / 0.07)"),
    ("weighted", "euclidean"): ("distance", "weighted by 1 / distance"),
}


def knn(given: TaskInput) -> list[Figure]:
    """The vote of the nearest training patches, for each k and way of voting; one search serves all."""
    rows, options = given.rows, given.spec.knn
    graphs: list[tuple[Neighbors, np.ndarray]] = []
    tested = []
    for train, test in parts(rows, given.spec, given.seed):
        metric: Literal["cosine", "euclidean"] = "cosine" if options.distance == "cosine" else "euclidean"
        found = nearest(given.features[train], given.features[test], max(options.k), metric=metric)
        graphs.append((found, rows.label[train]))
        tested.append(test)
    order = np.concatenate(tested)
    plain = len(options.k) == len(options.votes) == 1
    figures: list[Figure] = []
    for vote in options.votes:
        weights, words = _WEIGHTS[vote, options.distance]
        prefix = "knn" if vote == options.votes[0] else f"knn_{vote}"
        for k in options.k:
            predicted = np.concatenate([knn_predict(graph, labels, k=k, weights=weights) for graph, labels in graphs])
            settings = {"k": k, "distance": options.distance, "vote": words, **given.split_settings}
            suffix = "" if plain else f"_k{k}"
            said = rows.label[order], predicted, rows.cluster[order]
            figures += class_figures(prefix, *said, settings, suffix=suffix, pictured=not figures)
    return figures


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What probes said of items that they were not fitted on: patches, slides or patients."""

    truth: Shaped[np.ndarray, " item"]
    clusters: Shaped[np.ndarray, " item"]
    classes: Shaped[np.ndarray, " class"]
    probabilities: Float64[np.ndarray, "item class"]
    predictions: Shaped[np.ndarray, " item"]

    @classmethod
    def of(
        cls,
        truth: Sequence[Shaped[np.ndarray, "_"]],
        clusters: Sequence[Shaped[np.ndarray, "_"]],
        said: Sequence[tuple[Shaped[np.ndarray, "_"], Float64[np.ndarray, "_ _"], Shaped[np.ndarray, "_"]]],
    ) -> "Predicted":
        """From the parts of the folds, each with its classes, probabilities and predictions."""
        classes = np.unique(np.concatenate([names for names, _, _ in said]))
        columns = []
        for names, found, _ in said:
            wide = np.zeros((len(found), len(classes)))
            wide[:, np.searchsorted(classes, names)] = found
            columns.append(wide)
        return cls(
            truth=np.concatenate(truth),
            clusters=np.concatenate(clusters),
            classes=classes,
            probabilities=np.concatenate(columns),
            predictions=np.concatenate([predicted for _, _, predicted in said]),
        )

    def figures(self, prefix: str, settings: Settings) -> list[Figure]:
        """Accuracy, balanced accuracy, F1, AUC, Brier score, calibration error."""
        data = (self.truth, self.probabilities, self.classes, self.clusters)
        found = class_figures(prefix, self.truth, self.predictions, self.clusters, settings)
        of_probabilities = {
            "auc": auc_statistic(*data),
            "brier": of_sums(brier_score, brier_sums(*data)),
            "ece": of_sums(calibration_error, calibration_sums(*data)),
        }
        return found + [
            Figure(
                metric=f"{prefix}_{name}",
                interval=Drawn(statistic=statistic, clusters=self.clusters),
                n=len(self.truth),
                settings=settings,
                better="higher" if name == "auc" else "lower",
            )
            for name, statistic in of_probabilities.items()
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

    The default grid gives way to C = 1 where a class has one training patient; a grid of the task's own is refused.

    Raises:
        TaskError: As `linear_probe`.
    """
    fewest = min(len(np.unique(groups[labels == name])) for name in np.unique(labels))
    folds = min(options.folds, fewest)
    c_values, how = options.c, f"log loss on {folds} folds of the training part"
    if len(options.c) == 1:
        how = "given"
    elif folds < 2 and options.c == PROBE_C:
        c_values, how = (1.0,), "1, as a class has one training patient"
    elif folds < 2:
        raise TaskError("to choose among several probe_c, every class needs two training patients; give one C")
    found = linear_probe(train, labels, test, c_values=c_values, groups=groups, folds=max(folds, 2), seed=seed)
    return found, how


def probe_settings(given: TaskInput, found: Sequence[tuple[ProbeResult, str]]) -> Settings:
    """What the probes of all folds had in common."""
    return {
        "C": chosen_in_words([result.c for result, _ in found]),
        "C_chosen_by": "; ".join(dict.fromkeys(how for _, how in found)),
        "converged": all(result.converged for result, _ in found),
        **given.split_settings,
    }


def probe(given: TaskInput) -> list[Figure]:
    """Logistic regression on single patches."""
    rows, features, spec = given.rows, given.features, given.spec
    tested, found = [], []
    for train, test in parts(rows, spec, given.seed):
        labels, groups = rows.label[train], rows.cluster[train]
        found.append(fit_probe(features[train], labels, groups, features[test], spec.probe, given.seed))
        tested.append(test)
    said = Predicted.of(
        [rows.label[test] for test in tested],
        [rows.cluster[test] for test in tested],
        [(result.classes, result.probabilities, result.predictions) for result, _ in found],
    )
    return said.figures("probe", probe_settings(given, found))


def prototype_vote(given: TaskInput) -> list[Figure]:
    """The nearest mean of a few training patches of each class, over repeated draws of them."""
    rows, options = given.rows, given.spec.prototypes
    figures = []
    for shots in options.shots:
        truth, predicted, clusters = [], [], []
        for train, test in parts(rows, given.spec, given.seed):
            center = given.features[train].mean(axis=0, dtype=np.float64)
            for repeat in range(options.repeats):
                seed = int(keyed_generator("shots", given.seed, repeat).integers(2**32))
                drawn = train[draw_shots(rows.label[train], rows.cluster[train], shots, seed=seed)]
                said = prototypes(given.features[drawn], rows.label[drawn], center)
                truth.append(rows.label[test])
                predicted.append(said.predict(given.features[test]))
                clusters.append(rows.cluster[test])
        settings = {"shots": shots, "repeats": options.repeats, **given.split_settings}
        where = np.concatenate(truth), np.concatenate(predicted), np.concatenate(clusters)
        n = len(where[0]) // options.repeats
        figures += class_figures("prototypes", *where, settings, suffix=f"_shots{shots}", n=n, pictured=False)
    return figures


def numbers(values: Shaped[np.ndarray, " item"], column: str) -> Float64[np.ndarray, " item"]:
    """A column as numbers.

    Raises:
        TaskError: One is none, or not finite.
    """
    try:
        found = values.astype(np.float64)
    except ValueError as error:
        raise TaskError(f"column {column!r} must hold numbers: {error}") from error
    if not np.isfinite(found).all():
        raise TaskError(f"column {column!r} must hold finite numbers; got {values[~np.isfinite(found)][0]}")
    return found


def regression(given: TaskInput) -> list[Figure]:
    """Ridge regression for a label that is a number."""
    rows, options = given.rows, given.spec.regression
    truth = numbers(rows.label, given.spec.label)[:, None]
    tested, predicted, errors, penalties = [], [], [], []
    no_strata = np.zeros(len(rows), np.int64)
    for train, test in split_parts(no_strata, rows.cluster, rows.part, given.spec, rows.cluster_unit, given.seed):
        groups = rows.cluster[train]
        folds = min(options.folds, len(np.unique(groups)))
        found = fit_ridge(
            given.features[train], truth[train], groups, penalties=options.penalties, folds=folds, seed=given.seed
        )
        predicted.append(found.predict(given.features[test])[:, 0])
        errors.append(ridge_sums(found, given.features[test], truth[test]))
        tested.append(test)
        penalties.append(found.penalty)
    order = np.concatenate(tested)
    clusters = rows.cluster[order]
    correlations = correlation_sums(np.concatenate(predicted), truth[order, 0])
    settings: Settings = {"penalty": chosen_in_words(penalties), **given.split_settings}
    statistics = {
        "pearson": of_sums(pearson, cluster_sums(correlations, clusters)),
        "r2": of_sums(explained_share, cluster_sums(np.concatenate(errors), clusters)),
    }
    return [
        Figure(
            metric=f"regression_{name}",
            interval=Drawn(statistic=statistic, clusters=clusters),
            n=len(order),
            settings=settings,
        )
        for name, statistic in statistics.items()
    ]


def retrieval(given: TaskInput) -> list[Figure]:
    """Whether patches of the same class of other patients are found first, among rows that nothing was trained on."""
    chosen, options = np.flatnonzero(given.test_rows), given.spec.retrieval
    labels, clusters = given.rows.label[chosen], given.rows.cluster[chosen]
    if len(np.unique(labels)) < 2:
        raise TaskError(f"retrieval needs two classes at least; all {len(labels):,} rows are {labels[0]}")
    metric: Literal["cosine", "euclidean"] = "cosine" if options.distance == "cosine" else "euclidean"
    graph = nearest(given.features[chosen], None, max(options.k), metric=metric, groups=clusters)
    sums = retrieval_sums(graph, labels, options.k)
    figures = []
    for column, k in enumerate(options.k):
        settings: Settings = {
            "k": k,
            "distance": options.distance,
            "among": f"{given.rows_in_words} rows of other {given.rows.cluster_unit}",
            "duplicates_dropped": given.rows.duplicates_dropped,
        }
        for name, values in (("top", sums[:, column]), ("map", sums[:, len(options.k) + column])):
            figures.append(_mean_figure(f"retrieval_{name}_k{k}", values, clusters, settings))
    return figures


def _mean_figure(
    metric: str, values: Float64[np.ndarray, " row"], clusters: Shaped[np.ndarray, " row"], settings: Settings
) -> Figure:
    sums = cluster_sums(np.stack([values, np.ones(len(values))], axis=1), clusters)
    interval = Drawn(statistic=of_sums(lambda totals: totals[:, 0] / totals[:, 1], sums), clusters=clusters)
    return Figure(metric=metric, interval=interval, n=len(values), settings=settings)
