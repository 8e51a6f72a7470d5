"""A metric value of one encoder before its interval, and what metric groups compute it from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Num, Shaped

from g2l_core.benchmark.rows import TaskRows
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.metrics.intervals import Figure, of_group_sums
from g2l_core.metrics.patients import MAX_SUMMED_GROUPS, Design, design_of, leave_out_groups
from g2l_core.metrics.probe import accuracy, balanced_accuracy, confusion, macro_f1, unanimous_variance
from g2l_core.metrics.scales import SHARE
from g2l_core.results import Better
from g2l_core.types import Features

Settings = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each class was taken for each, over all clusters."""

    classifier: str
    """The metric group, and what distinguishes the classifier from others of the group."""
    classes: Shaped[np.ndarray, " class"]
    counts: Int64[np.ndarray, "class class"]
    """[truth, predicted]."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One metric of one encoder."""

    metric: str
    figure: Figure
    """The value on all patients, and without each."""
    n: int
    """How many patches, slides or patients it rests on."""
    settings: Settings
    better: Better = "higher"
    confusion: Confusion | None = None
    """Given with one value of each classifier whose confusion matrix is plotted."""


@dataclass(frozen=True, kw_only=True)
class TaskInput:
    """What a metric group reads: one encoder's features of the rows of a task."""

    rows: TaskRows
    features: Features
    spec: TaskSpec
    seed: int
    teacher: str
    """The key of the encoder that similarity is to."""
    device: str
    """Where CKA's sums over rows are taken: "cpu" or a torch device."""
    reference: Float16[np.ndarray, "patch reference_dim"] | None
    """The teacher's features of the same rows; None where this encoder is the teacher, or the teacher has failed."""

    @property
    def test_rows(self) -> Bool[np.ndarray, " row"]:
        """Rows that nothing is trained on: the test part, or all where there is no fixed split."""
        return self.rows.tested(self.spec)

    @property
    def test_rows_name(self) -> str:
        """Which rows `test_rows` are: "test" or "all"."""
        return "test" if self.spec.has_fixed_split else "all"

    @property
    def split_settings(self) -> dict[str, str | int]:
        """How training and test rows were separated."""
        spec, rows = self.spec, self.rows
        split = f"{spec.folds} folds by {rows.cluster_unit}" if spec.folds else f"fixed, {spec.split or spec.test}"
        return {"split": split, "duplicates_dropped": rows.duplicates_dropped}

    def design(
        self,
        clusters: Shaped[np.ndarray, " item"],
        strata: Shaped[np.ndarray, " item"] | None = None,
        *,
        stratum: str = "class",
        most: int = MAX_SUMMED_GROUPS,
        weights: Float64[np.ndarray, " item"] | None = None,
    ) -> Design:
        """How some items fall to the patients. See `patients.design_of`."""
        unit = self.rows.cluster_unit
        return design_of(clusters, strata, unit=unit, stratum=stratum, most=most, weights=weights)


def metric_values(
    group: str, figures: Mapping[str, Figure], settings: Settings, *, n: int, better: Better = "higher"
) -> list[MetricValue]:
    """Values of several figures on the same items, named GROUP_FIGURE.

    Args:
        group: The first part of the names.
        figures: By the second part of the names.
        settings: What must be known to read the values.
        n: How many items they rest on.
        better: Which values are the better ones.
    """
    return [
        MetricValue(metric=f"{group}_{name}", figure=figure, n=n, settings=settings, better=better)
        for name, figure in figures.items()
    ]


def ratio(totals: Float64[np.ndarray, "set 2"]) -> Float64[np.ndarray, " set"]:
    """The first column of sums over the second; NaN where that is 0."""
    return np.divide(totals[:, 0], totals[:, 1], out=np.full(len(totals), np.nan), where=totals[:, 1] > 0)


CLASSIFIED = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}
"""The scores of a confusion matrix."""


def classification_values(
    task: TaskInput,
    prefix: str,
    truth: Shaped[np.ndarray, " item"],
    predicted: Shaped[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    settings: Settings,
    *,
    suffix: str = "",
    n: int | None = None,
    plotted: bool = True,
) -> list[MetricValue]:
    """Accuracy, balanced accuracy and macro F1 of predictions, named PREFIX_accuracySUFFIX and so on."""
    codes, _ = leave_out_groups(clusters, MAX_SUMMED_GROUPS)
    matrices = confusion(truth, predicted, codes)
    figures = classified(matrices, task.design(clusters), task.design(clusters, truth), suffix)
    table = None
    if plotted:
        classes = np.unique(np.concatenate([truth, predicted]))
        table = Confusion(classifier=prefix + suffix, classes=classes, counts=matrices.sum(axis=0))
    first, *others = metric_values(prefix, figures, settings, n=len(truth) if n is None else n)
    return [replace(first, confusion=table), *others]


def classified(
    matrices: Num[np.ndarray, "group class class"], by_row: Design, by_class: Design, suffix: str = ""
) -> dict[str, Figure]:
    """The scores of each group's confusion matrix. Accuracy is a mean over rows, not over classes."""
    hidden = unanimous_variance(matrices)
    return {
        f"{name}{suffix}": of_group_sums(score, matrices, by_row, SHARE)
        if name == "accuracy"
        else replace(of_group_sums(score, matrices, by_class, SHARE), least_variance=hidden)
        for name, score in CLASSIFIED.items()
    }


def describe_choices(values: Sequence[float]) -> str | float:
    """A setting that folds may have chosen differently: the one value, or all in the order of the folds."""
    return values[0] if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)
