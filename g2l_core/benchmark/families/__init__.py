"""The families of figures that a task can ask for: stored features and labels in, figures before intervals out.

Each takes a `TaskInput` of one encoder and gives its `Figure`s, named FAMILY_FIGURE. What a family needs of a task is
in `task_spec.NEEDS`; what its figures mean is in docs/tasks.md.
"""

from collections.abc import Callable, Mapping

from g2l_core.benchmark.families import patches
from g2l_core.benchmark.families import robustness as centers
from g2l_core.benchmark.families import similarity as likeness
from g2l_core.benchmark.families import slides as bags
from g2l_core.benchmark.families.figures import Draws, Figure, TaskInput

__all__ = ("FAMILIES", "Draws", "Figure", "TaskInput")

FAMILIES: Mapping[str, Callable[[TaskInput], list[Figure]]] = {
    "cka": likeness.cka,
    "similarity": likeness.similarity,
    "knn": patches.knn,
    "probe": patches.probe,
    "prototypes": patches.prototype_vote,
    "regression": patches.regression,
    "retrieval": patches.retrieval,
    "slide_probe": bags.slide_probe,
    "slide_vote": bags.slide_vote,
    "abmil": bags.abmil,
    "survival": bags.survival,
    "robustness": centers.robustness,
    "robustness_paired": centers.robustness_paired,
    "center": centers.center,
    "bias_drop": centers.bias_drop,
    "consistency": centers.consistency,
}
"""In the order in which a report has them."""
