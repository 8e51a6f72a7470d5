"""The figures that a benchmark gives, each with its interval and its support, and what its report pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval; NaN bounds where no interval can be had (a single cluster)."""

    value: float
    low: float = nan
    high: float = nan
    method: str = "none"
    """How the interval was made, for people: "bootstrap over 8 patients, 1,000 draws"."""


Better = Literal["higher", "lower", "neither"]
"""Which values of a figure are the better ones."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one encoder on one task."""

    task: str
    metric: str
    """Which figure, with what tells it from its siblings: "knn_balanced_accuracy", "robustness_ratio_k5"."""
    encoder: str
    """The encoder's key in the store."""
    estimate: Estimate
    n: int
    """Rows that the figure rests on."""
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """What must be known to read the figure: k, C, split, the reference encoder, ..."""
    better: Better = "higher"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far an encoder's figure stands above a reference encoder's, on the same draws."""

    task: str
    metric: str
    encoder: str
    reference: str
    difference: Estimate
    """encoder minus reference."""
    p_value: float
    """Two-sided; NaN where no interval can be had."""
    p_holm: float = nan
    """Adjusted by Holm's method over the tasks that compare the same encoders by the same metric."""
    tests: int = 1
    """How many these are."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task, or one encoder on it, that could not be evaluated."""

    task: str
    reason: str
    encoder: str = ""


@dataclass(frozen=True, kw_only=True)
class EncoderSummary:
    """What a reader must know of an encoder to trust its figures."""

    key: str
    name: str
    weights: str
    """Where they come from, in words: "ImageNet, efficientnet-lite0 package", "random, seed 0"."""
    dim: int
    pooling: str
    precision: str
    digest: str
    note: str = ""
    """A caution the report must show: "untrained"."""


@dataclass(frozen=True, kw_only=True)
class ExpectedFigure:
    """A published figure that one of this run is held against."""

    task: str
    metric: str
    encoder: str
    """By key or by name; it need not have been run."""
    value: float
    tolerance: float
    """How far off a figure may be and still count as the same."""
    source: str


@dataclass(frozen=True, kw_only=True)
class CkaMatrix:
    """Debiased linear CKA of every pair of encoders on the same rows."""

    task: str
    encoders: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """A row and a column an encoder, in their order; symmetric. NaN where a pair's CKA is undefined."""
    rows: str
    """Which rows: "test" or "all"."""
    n: int
    """How many of them were used."""
    of: int
    """How many there are."""


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """How often each class was taken for each, pooled over the folds."""

    task: str
    classifier: str
    """"knn" or "probe"."""
    encoder: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """A row for each true class, a column for each predicted one."""
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Features of one encoder in the plane."""

    task: str
    encoder: str
    method: str
    """"PCA" or "UMAP"."""
    shares: tuple[float, ...] = ()
    """The share of the variance that lies along x and along y; empty where the method knows none."""
    x: tuple[float, ...]
    """About the mean of all; the furthest of all x and y lies at 1 or -1."""
    y: tuple[float, ...]
    classes: tuple[str, ...]
    class_of: tuple[int, ...]
    """Each point's place in `classes`."""
    centers: tuple[str, ...]
    center_of: tuple[int, ...]
    of: int
    """How many rows the points were chosen from by seed."""


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
    """Of each cell, three hexadecimal digits."""
    patches: int
    """How many patches the cells hold; where they are more than cells, a cell is the mean of several."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is shown rather than told; two add up."""

    cka: tuple[CkaMatrix, ...] = ()
    projections: tuple[Projection, ...] = ()
    slides: tuple[SlideMap, ...] = ()
    confusions: tuple[ConfusionMatrix, ...] = ()

    def __add__(self, other: "Pictures") -> "Pictures":
        """The pictures of both."""
        return Pictures(
            cka=self.cka + other.cka,
            projections=self.projections + other.projections,
            slides=self.slides + other.slides,
            confusions=self.confusions + other.confusions,
        )

    def of_task(self, task: str) -> "Pictures":
        """Those of one task."""
        return Pictures(
            cka=tuple(p for p in self.cka if p.task == task),
            projections=tuple(p for p in self.projections if p.task == task),
            slides=tuple(p for p in self.slides if p.task == task),
            confusions=tuple(p for p in self.confusions if p.task == task),
        )

    def tasks(self) -> tuple[str, ...]:
        """The tasks that have any, in order of first appearance."""
        shown: tuple[CkaMatrix | Projection | SlideMap | ConfusionMatrix, ...]
        shown = self.cka + self.projections + self.slides + self.confusions
        return tuple(dict.fromkeys(picture.task for picture in shown))

    def encoders(self) -> tuple[str, ...]:
        """The encoders that are in any, in order of first appearance."""
        of_one: tuple[Projection | SlideMap | ConfusionMatrix, ...]
        of_one = self.projections + self.slides + self.confusions
        compared = [key for matrix in self.cka for key in matrix.encoders]
        return tuple(dict.fromkeys([*compared, *(picture.encoder for picture in of_one)]))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of one benchmark run."""

    title: str
    summary: tuple[str, ...]
    """One sentence a task."""
    encoders: tuple[EncoderSummary, ...]
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    provenance: Mapping[str, str]
    """Command, software versions, store digests."""
    notes: tuple[str, ...] = ()
    """What a reader must know before any figure: slides that the student saw and a test set holds, copies found, ..."""
    expected: tuple[ExpectedFigure, ...] = ()
    pictures: Pictures = Pictures()
