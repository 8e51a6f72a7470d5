"""A classifier of stage three that travels with its student: behind `g2l fit-head`."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from g2l_core.benchmark.metric_groups import METRIC_GROUPS, TaskInput
from g2l_core.benchmark.metric_groups.patches import fit_probe, numbers
from g2l_core.benchmark.rows import TaskRows, bags, gather, stored_encoders
from g2l_core.benchmark.spec import TaskSpec
from g2l_core.benchmark.task_file import read_named_task
from g2l_core.encoders.resolve import STUDENT_FOLDER, find_stored, is_run_folder, spec_from_json
from g2l_core.errors import G2LError, TaskError, UsageError, require_output_folder, writing
from g2l_core.heads.calibration import fit_temperature, log_loss, tempered
from g2l_core.heads.head import KINDS, RECORD, Head, HeadFacts, HeadFigure, write_head
from g2l_core.metrics.bags import mean_pool
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.intervals import estimate
from g2l_core.metrics.mil import train_abmil
from g2l_core.metrics.ridge import fit_ridge
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import digest, software
from g2l_core.types import Features
from pipeline.bench import find_tasks
from pipeline.progress import say

CALIBRATION_FOLDS = 5
_UNCALIBRATED = ("_brier", "_ece")
"""Figures of probabilities before calibration, which the head does not give."""


@dataclass(frozen=True, kw_only=True)
class _Items:
    """What a head is fitted on: patches, or bags of them."""

    rows: Int64[np.ndarray, " item_row"]
    """Of the task; for bags, all patches of them."""
    label: Shaped[np.ndarray, " item"]
    cluster: Shaped[np.ndarray, " item"]
    bag: Shaped[np.ndarray, " item_row"] | None = None
    """The bag of each row."""

    def take(self, chosen: Int64[np.ndarray, " chosen"]) -> "_Items":
        """Some of the items."""
        if self.bag is None:
            return _Items(rows=self.rows[chosen], label=self.label[chosen], cluster=self.cluster[chosen])
        names = np.unique(self.bag)[chosen]
        kept = np.isin(self.bag, names)
        return _Items(rows=self.rows[kept], label=self.label[chosen], cluster=self.cluster[chosen], bag=self.bag[kept])


def run_fit_head(
    tasks_path: Path,
    task: str,
    store_paths: Sequence[Path],
    encoder: str,
    out: Path,
    *,
    kind: str = "",
    seed: int = 0,
) -> Head:
    """Fit a head on the labeled patches of a task, calibrate it, and write it with its student.

    With a fixed split it is fitted on the training part, and its figures are those of the test part. With folds it is
    fitted on all patients, and its figures are those of the heads of the folds.

    Args:
        tasks_path: The task file, or the name of a shipped one.
        task: The task; may be empty where the file has one.
        store_paths: The cohorts.
        encoder: As users write it. The student of a run folder is copied into the head.
        out: The head's folder. An existing head there is replaced; a folder of something else is refused.
        kind: probe, slide_probe, abmil or regression; empty takes the first of these that the task evaluates.
        seed: Random seed of folds and of ABMIL's training.

    Raises:
        G2LError: The task, its rows or the encoder cannot be used.
    """
    require_output_folder(out, (RECORD,), "head")
    tasks_file, folder = find_tasks(tasks_path)
    spec = read_named_task(tasks_file, task)
    kind = _kind(kind, spec)
    stores = [FeatureStore.open(path) for path in store_paths]
    known = stored_encoders(stores)
    key = find_stored(encoder, known)
    rows = gather(stores, spec, folder)
    features = rows.features(key)
    patients = f"{len(np.unique(rows.cluster)):,} {rows.cluster_unit}"
    say(f"{kind}: {len(rows):,} labeled patches of {patients}; computing figures")
    figures = _figures(kind, rows, features, spec, key, seed)
    items = _items(kind, rows, spec)
    say("fitting the head")
    classes, tensors, chosen = _fit(kind, features, items, spec, seed)
    say("calibrating it on folds of the training patients")
    temperature, calibration = _calibration(kind, features, items, chosen, seed)
    facts = HeadFacts(
        kind=kind,
        task=spec.name,
        label=spec.label,
        classes=classes,
        bag=spec.bag,
        temperature=temperature,
        calibration=calibration,
        encoder=known[key].to_json(),
        grid=stores[0].grid,
        views=stores[0].views,
        figures=figures,
        figures_of=_figures_of(spec),
        trained_on=_trained_on(rows, items),
        license=_license(known[key]),
        versions=software(),
    )
    head = Head(facts=facts, tensors=tensors)
    with writing(out), locked_output(out):
        _copy_student(encoder, out)
        write_head(head, out)
    return head


def _kind(kind: str, spec: TaskSpec) -> str:
    possible = [name for name in KINDS if name in spec.metrics]
    if kind and kind not in KINDS:
        raise UsageError(f"--kind {kind}: a head is one of {', '.join(KINDS)}")
    if not kind and not possible:
        raise UsageError(f"task {spec.name} evaluates none of {', '.join(KINDS)}; say which with --kind")
    return kind or possible[0]


def _figures(
    kind: str, rows: TaskRows, features: Features, spec: TaskSpec, key: str, seed: int
) -> tuple[HeadFigure, ...]:
    """The figures of stage three on patients that were not fitted on."""
    task = TaskInput(rows=rows, features=features, spec=spec, seed=seed, teacher=key, device="cpu", reference=None)
    found = []
    for value in METRIC_GROUPS[kind](task):
        if value.metric.endswith(_UNCALIBRATED):
            continue
        of = estimate(value.figure)
        low, high = (None if np.isnan(bound) else float(bound) for bound in (of.low, of.high))
        found.append(
            HeadFigure(
                metric=value.metric,
                value=float(of.value),
                low=low,
                high=high,
                n=value.n,
                clusters=of.clusters,
                unit=of.unit,
                method=of.method,
            )
        )
    return tuple(found)


def _figures_of(spec: TaskSpec) -> str:
    if spec.has_fixed_split:
        return "this head, on the test part"
    return f"heads fitted on {spec.folds - 1} of {spec.folds} folds of the patients; this one is fitted on all"


def _items(kind: str, rows: TaskRows, spec: TaskSpec) -> _Items:
    """The training items: the training part of a fixed split, else all."""
    if kind in {"probe", "regression"}:
        chosen = np.flatnonzero(rows.part == "train") if spec.has_fixed_split else np.arange(len(rows))
        return _Items(rows=chosen, label=rows.label[chosen], cluster=rows.cluster[chosen])
    whole = bags(rows, spec)
    items = _Items(rows=np.arange(len(rows)), label=whole.label, cluster=whole.cluster, bag=whole.of_row)
    return items.take(np.flatnonzero(whole.part == "train")) if spec.has_fixed_split else items


def _fit(
    kind: str, features: Features, items: _Items, spec: TaskSpec, seed: int
) -> tuple[tuple[str, ...], dict[str, np.ndarray], TaskSpec]:
    """The classes, the fitted tensors, and the task with the penalty that was chosen, for the folds of calibration."""
    own = features[items.rows]
    if kind == "regression":
        truth = numbers(items.label, spec.label)[:, None]
        options = spec.regression
        folds = min(options.folds, len(np.unique(items.cluster)))
        ridge = fit_ridge(own, truth, items.cluster, penalties=options.penalties, folds=folds, seed=seed)
        return (spec.label,), {"mean": ridge.mean_x, "weights": ridge.weights, "offset": ridge.mean_y}, spec
    if kind == "abmil":
        assert items.bag is not None
        data = own, items.bag, items.label, items.cluster, own[:1], items.bag[:1]
        result = train_abmil(*data, settings=spec.abmil, seed=seed)
        return tuple(map(str, result.classes)), result.network.to_arrays(), spec
    pooled = mean_pool(own, items.bag)[1] if items.bag is not None else own
    probe, _ = fit_probe(pooled, items.label, items.cluster, pooled[:1], spec.probe, seed)
    tensors = {"mean": probe.scaling.mean, "deviation": probe.scaling.deviation, "weights": probe.weights}
    return tuple(map(str, probe.classes)), tensors, replace(spec, probe=replace(spec.probe, c=(probe.c,)))


def _calibration(
    kind: str, features: Features, items: _Items, spec: TaskSpec, seed: int
) -> tuple[float, dict[str, float | int | str]]:
    """The temperature that is best for folds of the training patients, and its log loss there."""
    if kind == "regression":
        return 1.0, {"method": "none: a number has no probability"}
    fewest = min(len(np.unique(items.cluster[items.label == name])) for name in np.unique(items.label))
    folds = min(CALIBRATION_FOLDS, fewest)
    if folds < 2:
        return 1.0, {"method": "none: a class has one training patient"}
    classes, codes = np.unique(items.label, return_inverse=True)
    logs = np.zeros((len(codes), len(classes)))
    try:
        for train, test in stratified_group_folds(items.label, items.cluster, folds, seed=seed):
            logs[test] = _held_out(kind, features, items.take(train), items.take(test), spec, seed)
    except TaskError as error:
        return 1.0, {"method": f"none: {error}"}
    temperature = fit_temperature(logs, codes)
    after = np.log(np.maximum(tempered(logs, temperature), 1e-300))
    return temperature, {
        "method": f"temperature on {folds} folds of the training patients",
        "items": len(codes),
        "log_loss_before": round(log_loss(logs, codes), 6),
        "log_loss_after": round(log_loss(after, codes), 6),
    }


def _held_out(kind: str, features: Features, train: _Items, test: _Items, spec: TaskSpec, seed: int) -> np.ndarray:
    """(item, class) log-probabilities of items that are not fitted on."""
    own, others = features[train.rows], features[test.rows]
    if kind == "abmil":
        assert train.bag is not None
        assert test.bag is not None
        data = own, train.bag, train.label, train.cluster, others, test.bag
        chances = train_abmil(*data, settings=spec.abmil, seed=seed).probabilities
    else:
        if train.bag is not None and test.bag is not None:
            own, others = mean_pool(own, train.bag)[1], mean_pool(others, test.bag)[1]
        chances = fit_probe(own, train.label, train.cluster, others, spec.probe, seed)[0].probabilities
    return np.log(np.maximum(chances, 1e-300))


def _trained_on(rows: TaskRows, items: _Items) -> dict[str, object]:
    """Counts by class, and digests by which a patient or slide that was trained on is known again."""
    slides = [rows.slides[i] for i in np.unique(rows.slide_index[items.rows]).tolist()]
    names = np.unique(items.cluster)
    by_class = {}
    if len(np.unique(items.label)) <= 100:
        by_class = {str(c): len(np.unique(items.cluster[items.label == c])) for c in np.unique(items.label)}
    return {
        "unit": rows.cluster_unit,
        "count": len(names),
        "patches": len(items.rows),
        "by_class": by_class,
        "patients": sorted(digest(str(name))[:16] for name in names.tolist()),
        "slides": sorted(digest(slide.facts.fingerprint)[:16] for slide in slides),
    }


def _license(facts: EncoderFacts) -> str:
    try:
        return spec_from_json(facts.to_json()).license
    except (G2LError, TypeError, ValueError, KeyError):
        return "unknown: the features were imported"


def _copy_student(encoder: str, out: Path) -> None:
    """Put the student of a run folder into the head, so that nothing else has to travel."""
    shutil.rmtree(out / STUDENT_FOLDER, ignore_errors=True)
    if is_run_folder(encoder):
        temporary = out / f".partial-{STUDENT_FOLDER}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(Path(encoder) / STUDENT_FOLDER, temporary)
        temporary.rename(out / STUDENT_FOLDER)
