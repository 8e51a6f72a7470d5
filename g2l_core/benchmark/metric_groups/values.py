"""A metric value of one encoder before its interval, and what metric groups compute it from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Shaped

from g2l_core.benchmark.rows import TaskRows
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.metrics.probe import accuracy, balanced_accuracy, confusion, macro_f1
from g2l_core.metrics.similarity import jackknife
from g2l_core.metrics.statistics import Statistic, cluster_bootstrap, cluster_sums, of_sums, paired_bootstrap
from g2l_core.results import Better, Estimate
from g2l_core.types import Features

Settings = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are drawn: the arguments of `statistics.cluster_bootstrap`."""

    unit: str
    """What a cluster is, in the plural."""
    draws: int
    seed: int


class Interval(ABC):
    """A metric value that can be computed on other clusters; the same clusters serve for every encoder."""

    @abstractmethod
    def estimate(self, resampling: Resampling) -> Estimate:
        """The metric value with its interval."""

    @abstractmethod
    def difference(self, reference: "Interval", resampling: Resampling) -> tuple[Estimate, float]:
        """This value minus a reference encoder's, with the two-sided p-value."""


@dataclass(frozen=True, kw_only=True)
class Bootstrapped(Interval):
    """A statistic over clusters, which are drawn with replacement."""

    statistic: Statistic
    clusters: Shaped[np.ndarray, " item"]

    def estimate(self, resampling: Resampling) -> Estimate:
        """See `statistics.cluster_bootstrap`."""
        return cluster_bootstrap(self.statistic, self.clusters, **asdict(resampling))

    def difference(self, reference: Interval, resampling: Resampling) -> tuple[Estimate, float]:
        """See `statistics.paired_bootstrap`."""
        assert isinstance(reference, Bootstrapped)
        return paired_bootstrap(self.statistic, reference.statistic, self.clusters, **asdict(resampling))


@dataclass(frozen=True, kw_only=True)
class Jackknifed(Interval):
    """A value of pairs of rows, which copies of rows would falsify: groups are left out in turn, nothing is drawn."""

    value: float
    without: Float64[np.ndarray, " group"]
    """The value without each group of clusters."""
    unit: str
    """What is left out at a time."""

    def estimate(self, resampling: Resampling) -> Estimate:
        """See `similarity.jackknife`."""
        return jackknife(self.value, self.without, self.unit)[0]

    def difference(self, reference: Interval, resampling: Resampling) -> tuple[Estimate, float]:
        """See `similarity.jackknife`."""
        assert isinstance(reference, Jackknifed)
        return jackknife(self.value - reference.value, self.without - reference.without, self.unit)


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
    interval: Interval
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


def bootstrapped_values(
    group: str,
    statistics: Mapping[str, Statistic],
    clusters: Shaped[np.ndarray, " item"],
    settings: Settings,
    *,
    n: int | None = None,
    better: Better = "higher",
) -> list[MetricValue]:
    """Values of several statistics on the same clusters, named GROUP_STATISTIC.

    Args:
        group: The first part of the names.
        statistics: By the second part of the names.
        clusters: The cluster of each item.
        settings: What must be known to read the values.
        n: How many items they rest on, if not as many as `clusters`.
        better: Which values are the better ones.
    """
    return [
        MetricValue(
            metric=f"{group}_{name}",
            interval=Bootstrapped(statistic=statistic, clusters=clusters),
            n=len(clusters) if n is None else n,
            settings=settings,
            better=better,
        )
        for name, statistic in statistics.items()
    ]


def mean_statistic(
    values: Shaped[np.ndarray, " item"], clusters: Shaped[np.ndarray, " item"], per_item: int = 1
) -> Statistic:
    """The mean of the values over the items that are drawn, each of which counts as `per_item`."""
    sums = cluster_sums(np.stack([values, np.full(len(values), per_item)], axis=1), clusters)
    return of_sums(lambda totals: totals[:, 0] / totals[:, 1], sums)


def classification_values(
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
    matrices = confusion(truth, predicted, clusters)
    scores = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}
    statistics = {f"{name}{suffix}": of_sums(score, matrices) for name, score in scores.items()}
    first, *others = bootstrapped_values(prefix, statistics, clusters, settings, n=n)
    if plotted:
        classes = np.unique(np.concatenate([truth, predicted]))
        table = Confusion(classifier=prefix + suffix, classes=classes, counts=matrices.sum(axis=0))
        first = replace(first, confusion=table)
    return [first, *others]


def describe_choices(values: Sequence[float]) -> str | float:
    """A setting that folds may have chosen differently: the one value, or all in the order of the folds."""
    return values[0] if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)
