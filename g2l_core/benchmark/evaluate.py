"""A benchmark task: stored features, labels and a split rule in, figures with intervals out. Loads no model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from g2l_core.benchmark.families import FAMILIES, Draws, Figure, TaskInput
from g2l_core.benchmark.notes import notes_on
from g2l_core.benchmark.pictures import confusion_matrix, task_pictures
from g2l_core.benchmark.rows import TaskRows, gather
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.errors import G2LError, TaskError
from g2l_core.metrics.statistics import holm
from g2l_core.results import Comparison, Estimate, ExpectedFigure, Failure, Pictures, Result
from g2l_core.store.features import FeatureStore
from g2l_core.types import Features

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Who is compared with whom, and how intervals are drawn."""

    encoders: tuple[str, ...]
    """Keys; the first is the teacher: the others' CKA is to it, and their differences from it."""
    baseline: str = ""
    """A second encoder that the others' differences are taken from: the student before distillation."""
    draws: int = 1000
    seed: int = 0
    device: str = "cpu"
    """Where CKA's sums over rows are taken: "cpu" or a torch device, which changes last digits."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(encoder, reference) of every comparison."""
        found = [(encoder, self.encoders[0]) for encoder in self.encoders[1:]]
        if self.baseline:
            found += [(e, self.baseline) for e in self.encoders[1:] if e != self.baseline]
        return found


@dataclass
class TaskOutcome:
    """What a task gave."""

    results: list[Result] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know of the rows: copies, missing labels, slides that a student was distilled on."""
    expected: list[ExpectedFigure] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)

    def __iadd__(self, other: "TaskOutcome") -> "TaskOutcome":
        """Adds what another task gave."""
        self.results += other.results
        self.comparisons += other.comparisons
        self.failures += other.failures
        self.notes += other.notes
        self.expected += other.expected
        self.pictures += other.pictures
        return self


def evaluate_task(stores: Sequence[FeatureStore], spec: TaskSpec, bench: BenchSpec, folder: Path) -> TaskOutcome:
    """Evaluate every metric of a task for every encoder; what fails is recorded and costs only itself.

    Args:
        stores: The cohorts.
        spec: The task.
        bench: Encoders and statistics.
        folder: What the task's label file is relative to.
    """
    outcome = TaskOutcome(expected=list(spec.expected))
    try:
        rows = gather(stores, spec, folder)
    except G2LError as error:
        outcome.failures.append(Failure(task=spec.name, reason=str(error)))
        return outcome
    outcome.notes += notes_on(rows, spec, stores, bench.encoders)
    features = _features(rows, spec, bench, outcome)
    figures = {encoder: _figures(encoder, rows, features, spec, bench, outcome) for encoder in features}
    _add_intervals(figures, rows, spec, bench, outcome)
    _add_pictures(figures, rows, features, spec, bench, outcome)
    return outcome


def _guarded(outcome: TaskOutcome, spec: TaskSpec, encoder: str, family: str, evaluate: Callable[[], T]) -> T | None:
    """What `evaluate` gives, or None with its failure recorded."""
    try:
        return evaluate()
    except TaskError as error:
        outcome.failures.append(Failure(task=spec.name, reason=f"{family}: {error}", encoder=encoder))
        return None


def _features(rows: TaskRows, spec: TaskSpec, bench: BenchSpec, outcome: TaskOutcome) -> dict[str, Features]:
    found: dict[str, Features] = {}
    for encoder in bench.encoders:
        try:
            found[encoder] = rows.features(encoder)
        except G2LError as error:
            outcome.failures.append(Failure(task=spec.name, reason=str(error), encoder=encoder))
    return found


def _figures(
    encoder: str,
    rows: TaskRows,
    features: Mapping[str, Features],
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> list[Figure]:
    """The figures of one encoder, family by family."""
    teacher = bench.encoders[0]
    given = TaskInput(
        rows=rows,
        features=features[encoder],
        spec=spec,
        seed=bench.seed,
        teacher=teacher,
        device=bench.device,
        reference=features.get(teacher) if encoder != teacher else None,
    )
    figures: list[Figure] = []
    for family, evaluate in FAMILIES.items():
        if family in spec.metrics:
            figures += _guarded(outcome, spec, encoder, family, partial(evaluate, given)) or []
    return figures


def _add_intervals(
    figures: Mapping[str, Sequence[Figure]],
    rows: TaskRows,
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    """An interval for every figure, and for every difference on the same draws."""
    how = Draws(unit=rows.cluster_unit, draws=bench.draws, seed=bench.seed)
    for encoder, found in figures.items():
        for figure in found:
            estimate = _guarded(outcome, spec, encoder, figure.metric, partial(figure.interval.estimate, how))
            if estimate:
                outcome.results.append(_result(spec, encoder, figure, estimate))
    for encoder, reference in bench.pairs:
        theirs = {figure.metric: figure for figure in figures.get(reference, [])}
        for figure in (mine for mine in figures.get(encoder, []) if mine.metric in theirs):
            other = theirs[figure.metric].interval
            pair = _guarded(outcome, spec, encoder, figure.metric, partial(figure.interval.difference, other, how))
            if pair:
                outcome.comparisons.append(
                    Comparison(
                        task=spec.name,
                        metric=figure.metric,
                        encoder=encoder,
                        reference=reference,
                        difference=pair[0],
                        p_value=pair[1],
                    )
                )


def _result(spec: TaskSpec, encoder: str, figure: Figure, estimate: Estimate) -> Result:
    return Result(
        task=spec.name,
        metric=figure.metric,
        encoder=encoder,
        estimate=estimate,
        n=figure.n,
        settings=figure.settings,
        better=figure.better,
    )


def adjusted_over_tasks(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Every comparison with Holm's p-value over the tasks.

    A family is one metric of one encoder against one reference; its tests are the tasks that have it.
    """
    found = list(comparisons)
    families: dict[tuple[str, str, str], list[int]] = {}
    for i, row in enumerate(found):
        families.setdefault((row.metric, row.encoder, row.reference), []).append(i)
    for members in families.values():
        adjusted = holm(np.array([found[i].p_value for i in members]))
        for i, p_value in zip(members, adjusted.tolist(), strict=True):
            found[i] = replace(found[i], p_holm=p_value, tests=int(np.isfinite(adjusted).sum()))
    return found


def _add_pictures(
    figures: Mapping[str, Sequence[Figure]],
    rows: TaskRows,
    features: Mapping[str, Features],
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    """Pictures of the rows that nothing was trained on, by class unless the label is a number."""
    classed = replace(rows, label=np.full(len(rows), "")) if "regression" in spec.metrics else rows
    outcome.pictures, failures = task_pictures(spec.name, classed, rows.tested(spec), features, bench.seed)
    outcome.failures += failures
    for encoder, found in figures.items():
        for figure in (each for each in found if each.confusion):
            assert figure.confusion
            outcome.pictures += confusion_matrix(
                spec.name,
                figure.confusion.classifier,
                encoder,
                figure.confusion.classes,
                figure.confusion.counts,
                figure.settings,
            )
