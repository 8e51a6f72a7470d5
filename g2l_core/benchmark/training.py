"""How much figures vary with the patients that were trained on: the training part is halved again and again.

A classifier that is fitted on a random half of the training patients differs from one of all of them as two training
sets of all differ, to first order: the variance over halves is that of a training set (balanced half-samples; McCarthy,
Pseudo-replication: Half Samples, 1969). No patient comes twice, which would be a neighbor of itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Shaped

from g2l_core.benchmark.metric_groups.values import MetricValue, TaskInput
from g2l_core.errors import TaskError
from g2l_core.metrics.intervals import Source
from g2l_core.rng import keyed_generator

SOURCE = "training halves"
"""What a repetition is called in methods."""


def with_training_variation(evaluate: Callable[[TaskInput], list[MetricValue]], task: TaskInput) -> list[MetricValue]:
    """The values of a metric group, whose intervals hold the variation of the training patients too.

    Args:
        evaluate: The metric group.
        task: With `training_halves` of at least 2, and a fixed split.

    Raises:
        TaskError: As the group; or a half of the training part cannot be trained on.
    """
    values = evaluate(task)
    halves = task.spec.training_halves
    found: dict[str, list[float]] = {value.metric: [] for value in values}
    for number in range(halves):
        kept = ~_left_out(task, number)
        half = replace(
            task,
            rows=task.rows.take(kept),
            features=task.features[kept],
            reference=None if task.reference is None else task.reference[kept],
        )
        try:
            by_metric: Mapping[str, MetricValue] = {value.metric: value for value in evaluate(half)}
        except TaskError as error:
            raise TaskError(f"on half of the training patients: {error}; set training_halves = 0") from error
        for metric, of_halves in found.items():
            if metric in by_metric:
                of_halves.append(float(by_metric[metric].figure.values[0]))
    return [
        replace(value, figure=replace(value.figure, more=(*value.figure.more, _source(found[value.metric]))))
        for value in values
    ]


def _source(values: list[float]) -> Source:
    return Source(what=f"{len(values)} {SOURCE}", values=np.array(values), share=1.0, paired=True)


def _left_out(task: TaskInput, number: int) -> Bool[np.ndarray, " row"]:
    """Rows of the training patients that one half goes without: every other one of each class, in random order."""
    rows, rng = task.rows, keyed_generator("training halves", task.seed, number)
    trained = np.flatnonzero(rows.part == "train")
    clusters, first = np.unique(rows.cluster[trained], return_index=True)
    order = rng.permutation(len(clusters))
    by_class = order[np.argsort(_classes(rows.label[trained][first])[order], kind="stable")]
    dropped = clusters[by_class[int(rng.integers(2)) :: 2]]
    return (rows.part == "train") & np.isin(rows.cluster, dropped)


def _classes(labels: Shaped[np.ndarray, " cluster"]) -> Shaped[np.ndarray, " cluster"]:
    """Numbers of the classes; a label that is a number, of which no two are equal, makes no strata."""
    names, codes = np.unique(labels, return_inverse=True)
    return codes if len(names) <= len(labels) / 2 else np.zeros(len(labels), np.int64)
