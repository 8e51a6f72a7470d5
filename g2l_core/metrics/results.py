"""The figures that a benchmark gives, each with its interval and its support."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval; NaN bounds where no interval can be had (a single cluster)."""

    value: float
    low: float = nan
    high: float = nan
    method: str = "none"
    """How the interval was made, for people: "bootstrap over 8 patients, 1,000 draws"."""


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
    higher_is_better: bool = True


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
class EncoderFacts:
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
class Report:
    """All of one benchmark run."""

    title: str
    summary: tuple[str, ...]
    """One sentence a task."""
    encoders: tuple[EncoderFacts, ...]
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    provenance: Mapping[str, str]
    """Command, software versions, store digests."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the rows: copies left out, labels missing, slides that a student was distilled on."""
