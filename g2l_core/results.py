"""What a benchmark run gives: metric values, each with its interval and its support, and what its report plots."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import nan
from typing import Literal

RETAINED = "retained_"
"""What the name of a student's figure over the teacher's begins with; the figure's own name follows."""

FEWEST = 4
"""With fewer patients there is no interval: of three, each one decides a third of it, and no test can reach 0.05."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric value with its 95 % interval. The bounds are NaN where there can be no interval (a single cluster)."""

    value: float
    low: float = nan
    high: float = nan
    method: str = "none"
    """How the interval was made, for people: "jackknife over 8 patients, t with 7.0 degrees of freedom"; or why not."""
    clusters: int = 0
    """How many patients (or slides, if that is what is independent) the value rests on; 0 where nobody counted."""
    unit: str = ""
    """What these are, in the plural."""


Better = Literal["higher", "lower", "neither"]
"""Which values of a metric are the better ones."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one encoder on one task."""

    task: str
    metric: str
    """The metric's name, which begins with its group: "knn_balanced_accuracy", "robustness_ratio_k5"."""
    encoder: str
    """The encoder's key in the store, or its alias."""
    estimate: Estimate
    n: int
    """How many rows, slides or patients the value rests on."""
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """What must be known to read the value: k, C, split, the reference encoder, ..."""
    better: Better = "higher"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference between the values of an encoder and of a reference encoder, on the same patients."""

    task: str
    metric: str
    encoder: str
    reference: str
    difference: Estimate
    """The encoder's value minus the reference's."""
    p_value: float
    """Two-sided; NaN where there can be none."""
    p_holm: float = nan
    """Adjusted by Holm's method over the metrics and tasks that compare the same two encoders."""
    tests: int = 1
    """The number of these comparisons."""
    margin: float = nan
    """By how much the two may differ and still count as equally good."""
    p_equivalent: float = nan
    """Of the hypothesis that they differ by the margin or more (two one-sided t tests)."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task, or one encoder on it, that could not be evaluated."""

    task: str
    reason: str
    encoder: str = ""


@dataclass(frozen=True, kw_only=True)
class EncoderSummary:
    """What a reader must know of an encoder to trust its results."""

    key: str
    """What the report calls it: its key in the store, or the alias that the user gave it."""
    name: str
    weights: str
    """Where they come from, in words: "ImageNet, efficientnet-lite0 package", "random, seed 0"."""
    dim: int
    pooling: str
    precision: str
    digest: str
    note: str = ""
    """A caution the report must show: "untrained"."""
    nested_in: str = ""
    """Of nested features, which encoder's: the name of the one that has all of them, also for that one itself."""
    stored_key: str = ""
    """Its key in the store where `key` is an alias; of several seeds, the first one's."""
    speed: str = ""
    """What `g2l measure` found on some machine, in words."""


@dataclass(frozen=True, kw_only=True)
class PublishedValue:
    """A published value that the report puts beside this run's."""

    task: str
    metric: str
    encoder: str
    """The encoder's key or name; it need not have been run."""
    value: float
    tolerance: float
    """How far this run's value may be off and still count as the same."""
    source: str
    """Where the value is published, and what is not stated there."""


@dataclass(frozen=True, kw_only=True)
class CkaMatrix:
    """Debiased linear CKA of every pair of encoders on the same rows."""

    task: str
    encoders: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """One row and one column for each encoder, in their order; symmetric. NaN where a pair's CKA is undefined."""
    rows: str
    """Which rows were used: "test" or "all"."""
    n: int
    """How many of them were used."""
    of: int
    """How many of them there are."""


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """How often each class was predicted for each true class, pooled over the folds."""

    task: str
    classifier: str
    """"knn" or "probe"."""
    encoder: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """One row for each true class, one column for each predicted one."""
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Features of one encoder as points in the plane."""

    task: str
    encoder: str
    method: str
    """"PCA" or "UMAP"."""
    shares: tuple[float, ...] = ()
    """The fraction of the variance along x and along y; empty where the method has no such fractions."""
    x: tuple[float, ...]
    """Relative to the mean of all points, scaled so that the furthest x or y is 1 or -1."""
    y: tuple[float, ...]
    classes: tuple[str, ...]
    class_of: tuple[int, ...]
    """Each point's place in `classes`."""
    centers: tuple[str, ...]
    center_of: tuple[int, ...]
    of: int
    """How many rows the points were drawn from."""


@dataclass(frozen=True, kw_only=True)
class SlideMap:
    """A slide in the first three principal components of its features, as red, green and blue."""

    task: str
    encoder: str
    slide: str
    cell_mm: float
    """A cell's side in millimeters; NaN where the slide's scale is unknown."""
    columns: tuple[int, ...]
    """The column of each cell, from 0 at the left."""
    rows: tuple[int, ...]
    """The row of each cell, from 0 at the top."""
    colors: tuple[str, ...]
    """Three hexadecimal digits for each cell."""
    patches: int
    """How many patches the cells hold. If these are more than the cells, a cell is the mean of several."""


@dataclass(frozen=True, kw_only=True)
class Plots:
    """The plots of a report; two add up."""

    cka: tuple[CkaMatrix, ...] = ()
    projections: tuple[Projection, ...] = ()
    slides: tuple[SlideMap, ...] = ()
    confusions: tuple[ConfusionMatrix, ...] = ()

    def __add__(self, other: "Plots") -> "Plots":
        """The plots of both."""
        return Plots(**{kind.name: getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)})

    def of_task(self, task: str) -> "Plots":
        """The plots of one task."""
        plots = {kind.name: getattr(self, kind.name) for kind in fields(self)}
        return Plots(**{name: tuple(plot for plot in kind if plot.task == task) for name, kind in plots.items()})

    def tasks(self) -> tuple[str, ...]:
        """The tasks that have plots, in order of first appearance."""
        return tuple(dict.fromkeys(plot.task for kind in fields(self) for plot in getattr(self, kind.name)))

    def encoders(self) -> tuple[str, ...]:
        """The encoders that are in a plot, in order of first appearance."""
        of_one: tuple[Projection | SlideMap | ConfusionMatrix, ...]
        of_one = self.projections + self.slides + self.confusions
        compared = [key for matrix in self.cka for key in matrix.encoders]
        return tuple(dict.fromkeys([*compared, *(plot.encoder for plot in of_one)]))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of one benchmark run."""

    title: str
    summary: tuple[str, ...]
    """One sentence for each task."""
    encoders: tuple[EncoderSummary, ...]
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    provenance: Mapping[str, str]
    """Command, software versions, store digests."""
    notes: tuple[str, ...] = ()
    """What a reader must know before any result: test slides that the student was distilled on, copies found, ..."""
    expected: tuple[PublishedValue, ...] = ()
    pictures: Plots = Plots()
