"""A figure of one encoder before its interval, and what it is computed from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64, Shaped

from g2l_core.benchmark.rows import TaskRows
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.metrics.probe import accuracy, balanced_accuracy, confusion, macro_f1
from g2l_core.metrics.similarity import jackknife
from g2l_core.metrics.statistics import Statistic, cluster_bootstrap, of_sums, paired_bootstrap
from g2l_core.results import Better, Estimate
from g2l_core.types import Features

Settings = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How intervals are drawn."""

    unit: str
    """What a cluster is, in the plural."""
    draws: int
    seed: int


class Interval(ABC):
    """A figure that can be taken again on other clusters; the same clusters for every encoder."""

    @abstractmethod
    def estimate(self, how: Draws) -> Estimate:
        """The figure with its interval."""

    @abstractmethod
    def difference(self, reference: "Interval", how: Draws) -> tuple[Estimate, float]:
        """How far it stands above a reference encoder's, with the two-sided p-value."""


@dataclass(frozen=True, kw_only=True)
class Drawn(Interval):
    """A statistic over clusters: bootstrapped."""

    statistic: Statistic
    clusters: Shaped[np.ndarray, " item"]

    def estimate(self, how: Draws) -> Estimate:
        """See `statistics.cluster_bootstrap`."""
        return cluster_bootstrap(self.statistic, self.clusters, unit=how.unit, draws=how.draws, seed=how.seed)

    def difference(self, reference: Interval, how: Draws) -> tuple[Estimate, float]:
        """See `statistics.paired_bootstrap`."""
        assert isinstance(reference, Drawn)
        return paired_bootstrap(
            self.statistic, reference.statistic, self.clusters, unit=how.unit, draws=how.draws, seed=how.seed
        )


@dataclass(frozen=True, kw_only=True)
class LeftOut(Interval):
    """A figure of pairs of rows, which copies of rows would falsify: jackknifed."""

    value: float
    without: Float64[np.ndarray, " group"]
    """The figure without each group of clusters."""
    unit: str

    def estimate(self, how: Draws) -> Estimate:
        """See `similarity.cka_interval`; nothing is drawn."""
        return jackknife(self.value, self.without, self.unit)[0]

    def difference(self, reference: Interval, how: Draws) -> tuple[Estimate, float]:
        """See `similarity.cka_difference`."""
        assert isinstance(reference, LeftOut)
        return jackknife(self.value - reference.value, self.without - reference.without, self.unit)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each class was taken for each, over all clusters."""

    classifier: str
    """The family, and what tells it from its siblings."""
    classes: Shaped[np.ndarray, " class"]
    counts: Int64[np.ndarray, "class class"]
    """[truth, predicted]."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one encoder."""

    metric: str
    interval: Interval
    n: int
    """Patches, slides or patients that it rests on."""
    settings: Settings
    better: Better = "higher"
    confusion: Confusion | None = None
    """With one figure of each classifier that is pictured."""


@dataclass(frozen=True, kw_only=True)
class TaskInput:
    """What a family reads."""

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
        """Rows that nothing was trained on: the test part, or all where there is no fixed split."""
        return self.rows.tested(self.spec)

    @property
    def rows_in_words(self) -> str:
        """Which rows `test_rows` are."""
        return "test" if self.spec.has_fixed_split else "all"

    @property
    def split_settings(self) -> dict[str, str | int]:
        """How training and test rows were parted."""
        spec, rows = self.spec, self.rows
        how = f"{spec.folds} folds by {rows.cluster_unit}" if spec.folds else f"fixed, {spec.split or spec.test}"
        return {"split": how, "duplicates_dropped": rows.duplicates_dropped}


def class_figures(
    prefix: str,
    truth: Shaped[np.ndarray, " item"],
    predicted: Shaped[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    settings: Settings,
    *,
    suffix: str = "",
    n: int | None = None,
    pictured: bool = True,
) -> list[Figure]:
    """Accuracy, balanced accuracy and macro F1 of predictions, named PREFIX_accuracySUFFIX and so on."""
    matrices = confusion(truth, predicted, clusters)
    classes = np.unique(np.concatenate([truth, predicted]))
    picture = Confusion(classifier=prefix + suffix, classes=classes, counts=matrices.sum(axis=0))
    scores = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}
    return [
        Figure(
            metric=f"{prefix}_{name}{suffix}",
            interval=Drawn(statistic=of_sums(score, matrices), clusters=clusters),
            n=len(truth) if n is None else n,
            settings=settings,
            confusion=picture if pictured and name == "accuracy" else None,
        )
        for name, score in scores.items()
    ]


def chosen_in_words(values: Sequence[float]) -> str | float:
    """A setting that folds may have chosen differently: the one value, or all in the order of the folds."""
    return values[0] if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)
