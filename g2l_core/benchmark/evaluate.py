"""A benchmark task: stored features, labels and a split rule in, metric values with intervals out.

No model is loaded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from g2l_core.benchmark.damage import Damages, damaged_documents, damaged_features, describe
from g2l_core.benchmark.metric_groups import FURTHER, METRIC_GROUPS, TASK_GROUPS, MetricValue, TaskInput
from g2l_core.benchmark.notes import notes_on
from g2l_core.benchmark.plots import confusion_matrix, task_plots
from g2l_core.benchmark.rows import TaskRows, gather
from g2l_core.benchmark.spec import NEEDS, TaskSpec
from g2l_core.benchmark.training import with_training_variation
from g2l_core.errors import G2LError, StoreError, TaskError
from g2l_core.metrics.intervals import Figure, averaged, compare, estimate, ratio
from g2l_core.metrics.statistics import holm
from g2l_core.results import RETAINED, Comparison, Estimate, Failure, Plots, PublishedValue, Result
from g2l_core.store.features import FeatureStore
from g2l_core.types import Features

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Which encoders are compared, and how."""

    encoders: tuple[str, ...]
    """Keys of encoders. The first is the teacher, which the others are compared with."""
    seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The keys in the store that an encoder is a mean over: students that differ in their seed alone."""
    baseline: str = ""
    """A second encoder that the others' differences are taken from: the student before distillation."""
    draws: int = 1000
    """Random exchanges of two encoders, where there are too many patients to try all."""
    margin: float = 0.02
    """By how much an encoder may differ from another and still count as equally good."""
    seed: int = 0
    device: str = "cpu"
    """Where CKA's sums over rows are taken: "cpu" or a torch device, which changes last digits."""

    def members(self, encoder: str) -> tuple[str, ...]:
        """The keys in the store that an encoder stands for: its own, or those of its seeds."""
        return self.seeds.get(encoder, (encoder,))

    @property
    def stored(self) -> tuple[str, ...]:
        """All keys in the store, those of seeds one by one."""
        return tuple(key for encoder in self.encoders for key in self.members(encoder))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(encoder, reference) of every comparison."""
        others = self.encoders[1:]
        pairs = [(encoder, self.encoders[0]) for encoder in others]
        if self.baseline:
            pairs += [(encoder, self.baseline) for encoder in others if encoder != self.baseline]
        return pairs


@dataclass
class TaskOutcome:
    """The results of one task, or of several; two add up."""

    results: list[Result] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know of the rows: copies, missing labels, slides that a student was distilled on."""
    expected: list[PublishedValue] = field(default_factory=list)
    pictures: Plots = field(default_factory=Plots)

    def __iadd__(self, other: "TaskOutcome") -> "TaskOutcome":
        """Add the outcome of another task."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self


def evaluate_task(stores: Sequence[FeatureStore], spec: TaskSpec, bench: BenchSpec, folder: Path) -> TaskOutcome:
    """Evaluate every metric group of a task for every encoder. If one fails, the failure is recorded and others go on.

    A slide that is damaged is left out for all encoders, so that they are compared on the same patches. It is a failure
    of the task, and a note on it.

    Args:
        stores: The cohorts.
        spec: The task.
        bench: Encoders and statistics.
        folder: What the task's label file is relative to.
    """
    outcome = TaskOutcome(expected=list(spec.expected))
    damages = damaged_documents(stores)
    try:
        rows = gather(stores, spec, folder, damages)
        features, errors = _features(rows, bench)
        if found := _damaged_features(rows, bench, errors):
            damages |= found
            rows = gather(stores, spec, folder, damages)
            features, errors = _features(rows, bench)
    except G2LError as error:
        _note_damages(damages, spec, outcome)
        outcome.failures.append(Failure(task=spec.name, reason=str(error)))
        return outcome
    _note_damages(damages, spec, outcome)
    outcome.notes += notes_on(rows, spec, stores, bench.stored)
    outcome.failures += [Failure(task=spec.name, reason=str(why), encoder=key) for key, why in errors.items()]
    values = {encoder: _metric_values(encoder, rows, features, spec, bench, outcome) for encoder in features}
    means = _over_seeds(values, bench)
    _add_retained(means, spec, bench, outcome)
    _add_intervals(means, rows, spec, bench, outcome)
    first = {key: features[key] for encoder in means if (key := bench.members(encoder)[0]) in features}
    _add_plots(means, rows, first, spec, bench, outcome)
    return outcome


def _damaged_features(rows: TaskRows, bench: BenchSpec, errors: Mapping[str, G2LError]) -> Damages:
    """The slides of the rows whose features are damaged for some encoder; looked for where reading them failed."""
    if not any(isinstance(error, StoreError) for error in errors.values()):
        return {}
    return damaged_features((rows.slides[i] for i in np.unique(rows.slide_index).tolist()), bench.stored)


def _note_damages(damages: Damages, spec: TaskSpec, outcome: TaskOutcome) -> None:
    sentences = describe(damages)
    outcome.failures += [Failure(task=spec.name, reason=sentence) for sentence in sentences]
    outcome.notes += [f"task {spec.name}: {sentence}" for sentence in sentences]


def _guarded(outcome: TaskOutcome, spec: TaskSpec, encoder: str, what: str, evaluate: Callable[[], T]) -> T | None:
    """What `evaluate` returns, or None with its failure recorded."""
    try:
        return evaluate()
    except TaskError as error:
        outcome.failures.append(Failure(task=spec.name, reason=f"{what}: {error}", encoder=encoder))
        return None


def _features(rows: TaskRows, bench: BenchSpec) -> tuple[dict[str, Features], dict[str, G2LError]]:
    """The features of every encoder, or why they cannot be read."""
    features: dict[str, Features] = {}
    errors: dict[str, G2LError] = {}
    for encoder in bench.stored:
        try:
            features[encoder] = rows.features(encoder)
        except G2LError as error:
            errors[encoder] = error
    return features, errors


def _metric_values(
    encoder: str,
    rows: TaskRows,
    features: Mapping[str, Features],
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> list[MetricValue]:
    """The metric values of one encoder, group by group."""
    teacher = bench.encoders[0]
    task = TaskInput(
        rows=rows,
        features=features[encoder],
        spec=spec,
        seed=bench.seed,
        teacher=teacher,
        device=bench.device,
        reference=features.get(teacher) if encoder != teacher else None,
    )
    values: list[MetricValue] = []
    for group, evaluate in METRIC_GROUPS.items():
        if group in spec.metrics:
            halved = spec.training_halves and NEEDS[group].split
            of_group = partial(with_training_variation, evaluate, task) if halved else partial(evaluate, task)
            values += _guarded(outcome, spec, encoder, group, of_group) or []
            if group in FURTHER:
                values += _guarded(outcome, spec, encoder, group, partial(FURTHER[group], task)) or []
    return values


def _over_seeds(values: Mapping[str, list[MetricValue]], bench: BenchSpec) -> dict[str, list[MetricValue]]:
    """The metric values of every encoder; of several seeds, the mean of what all of them have."""
    found = {}
    for encoder in bench.encoders:
        members = [values[key] for key in bench.members(encoder) if key in values]
        if len(members) > 1:
            by_metric = [{value.metric: value for value in of_seed} for of_seed in members]
            common = [value for value in members[0] if all(value.metric in of_seed for of_seed in by_metric)]
            found[encoder] = [
                replace(value, figure=averaged([of_seed[value.metric].figure for of_seed in by_metric], "seeds"))
                for value in common
            ]
        elif members:
            found[encoder] = members[0]
    return found


def _add_retained(
    values: Mapping[str, Sequence[MetricValue]], spec: TaskSpec, bench: BenchSpec, outcome: TaskOutcome
) -> None:
    """The share of the teacher's figure that every other encoder has, of figures of the task where higher is better."""
    teacher = bench.encoders[0]
    references = {value.metric: value.figure for value in values.get(teacher, [])}
    for encoder in bench.encoders[1:]:
        for value in values.get(encoder, []):
            of_task = any(value.metric.startswith(f"{group}_") for group in TASK_GROUPS)
            if not of_task or value.better != "higher" or value.metric not in references:
                continue
            share = partial(_share, value.figure, references[value.metric])
            found = _guarded(outcome, spec, encoder, f"{RETAINED}{value.metric}", share)
            if found:
                result = _result(spec, encoder, value, found)
                settings = {**value.settings, "reference": teacher}
                outcome.results.append(replace(result, metric=f"{RETAINED}{value.metric}", settings=settings))


def _share(figure: Figure, reference: Figure) -> Estimate | None:
    """The retained share with its interval; None where the teacher, or the encoder, has nothing above 0 to share."""
    if not reference.values[0] > 0 or not figure.values[0] >= 0:
        return None
    return estimate(ratio(figure, reference))


def _add_intervals(
    values: Mapping[str, Sequence[MetricValue]],
    rows: TaskRows,
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    """An interval for every metric value, and for every difference on the same patients."""
    for encoder, of_encoder in values.items():
        for value in of_encoder:
            found = _guarded(outcome, spec, encoder, value.metric, partial(estimate, value.figure))
            if found:
                outcome.results.append(_result(spec, encoder, value, found))
    for encoder, reference in bench.pairs:
        references = {value.metric: value.figure for value in values.get(reference, [])}
        for value in values.get(encoder, []):
            if value.metric not in references:
                continue
            difference = partial(
                compare,
                value.figure,
                references[value.metric],
                draws=bench.draws,
                seed=bench.seed,
                margin=bench.margin,
            )
            compared = _guarded(outcome, spec, encoder, value.metric, difference)
            if compared:
                outcome.comparisons.append(
                    Comparison(
                        task=spec.name,
                        metric=value.metric,
                        encoder=encoder,
                        reference=reference,
                        difference=compared.estimate,
                        p_value=compared.p_value,
                        margin=bench.margin,
                        p_equivalent=compared.p_equivalent,
                    )
                )


def _result(spec: TaskSpec, encoder: str, value: MetricValue, estimate: Estimate) -> Result:
    return Result(
        task=spec.name,
        metric=value.metric,
        encoder=encoder,
        estimate=estimate,
        n=value.n,
        settings=value.settings,
        better=value.better,
    )


def adjusted(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Every comparison with Holm's p-value over all that the report compares of the same two encoders.

    Each metric on each task is one test, as the page shows them side by side and anyone may pick the least p.
    """
    rows = list(comparisons)
    families: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        families.setdefault((row.encoder, row.reference), []).append(i)
    for members in families.values():
        p_values = holm(np.array([rows[i].p_value for i in members]))
        for i, p_value in zip(members, p_values.tolist(), strict=True):
            rows[i] = replace(rows[i], p_holm=p_value, tests=int(np.isfinite(p_values).sum()))
    return rows


def _add_plots(
    values: Mapping[str, Sequence[MetricValue]],
    rows: TaskRows,
    features: Mapping[str, Features],
    spec: TaskSpec,
    bench: BenchSpec,
    outcome: TaskOutcome,
) -> None:
    """Plots of the rows that nothing is trained on, by class unless the label is a number."""
    classed = replace(rows, label=np.full(len(rows), "")) if "regression" in spec.metrics else rows
    outcome.pictures, failures = task_plots(spec.name, classed, rows.tested(spec), features, bench.seed)
    outcome.failures += failures
    for encoder, of_encoder in values.items():
        for value in of_encoder:
            if value.confusion:
                outcome.pictures += confusion_matrix(spec.name, encoder, value.confusion, value.settings)
