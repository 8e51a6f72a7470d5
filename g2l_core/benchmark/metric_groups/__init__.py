"""The metric groups that a task can ask for: stored features and labels in, metric values before intervals out.

Each group takes the `TaskInput` of one encoder and returns its `MetricValue`s, which are named GROUP_METRIC. What a
group needs of a task is in `spec.NEEDS`; docs/tasks.md says what its metrics mean.
"""

from collections.abc import Callable, Mapping

from g2l_core.benchmark.metric_groups import patches, robustness, similarity, slides
from g2l_core.benchmark.metric_groups.values import MetricValue, TaskInput

__all__ = ("FURTHER", "METRIC_GROUPS", "TASK_GROUPS", "MetricValue", "TaskInput")

TASK_GROUPS = (
    "knn", "probe", "prototypes", "regression", "retrieval", "slide_probe", "slide_vote", "abmil", "survival",
)  # fmt: skip
"""The groups that say how good features are at a task; the others describe the features."""

METRIC_GROUPS: Mapping[str, Callable[[TaskInput], list[MetricValue]]] = {
    "cka": similarity.cka,
    "similarity": similarity.similarity,
    "knn": patches.knn,
    "probe": patches.probe,
    "prototypes": patches.prototype_vote,
    "regression": patches.regression,
    "retrieval": patches.retrieval,
    "slide_probe": slides.slide_probe,
    "slide_vote": slides.slide_vote,
    "abmil": slides.abmil,
    "survival": slides.survival,
    "robustness": robustness.robustness,
    "robustness_paired": robustness.robustness_paired,
    "center": robustness.center,
    "bias_drop": robustness.bias_drop,
    "consistency": robustness.consistency,
}
"""In the order in which a report has them."""

FURTHER: Mapping[str, Callable[[TaskInput], list[MetricValue]]] = {"similarity": similarity.ridge_map}
"""More values of a group, which there may be none of where there are the others: one slide has no ridge map."""
