"""A student for other programs, judged on patches that it was not trained on: behind `g2l export-student`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from g2l_core.benchmark.metric_groups import METRIC_GROUPS, TaskInput
from g2l_core.benchmark.rows import TaskRows, gather
from g2l_core.benchmark.task_file import read_named_task
from g2l_core.distillation.held_out import read_held_out
from g2l_core.distillation.replay import ChosenRows, count_rows, good_rows
from g2l_core.encoders.conversion import LinearClassifier
from g2l_core.encoders.gate import MIN_SLIDES, Encode, HeldOutPatches, ProbeLoss
from g2l_core.encoders.resolve import RUN_RECORD
from g2l_core.encoders.student_export import FORMS, Exported
from g2l_core.encoders.student_export import export_student as write_export
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.heads.head import RECORD as HEAD_RECORD
from g2l_core.heads.head import Head, read_head
from g2l_core.metrics.intervals import estimate
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import digest
from pipeline.bench import find_tasks
from pipeline.runs import RunRecord, read_run
from pipeline.split import Split, split_store

GATE_PATCHES, CALIBRATION_PATCHES = 512, 128
PROBE_PATCHES = 2048
PROBE_METRIC = "probe_balanced_accuracy"


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What an export is judged on."""

    store: Path | None = None
    tasks: Path | None = None
    """A task file, or the name of a shipped one."""
    task: str = ""
    """The task; may be empty where the file has one."""
    seed: int = 0


def run_export(run: Path, form: str, out: Path, settings: GateSettings, trusted: Collection[str] = ()) -> Exported:
    """Export the student of a run, or of a head, judged on a store's held-out patches if one is given.

    Args:
        run: The run folder, or the folder of a head that has a student.
        form: The format.
        out: The folder to make.
        settings: The store, and a task for a probe.
        trusted: Modules whose code may run if the run's record names it.

    Raises:
        G2LError: Nothing was written: something does not fit, or the export is not near enough to the student.
    """
    if form not in FORMS:
        raise UnknownNameError("format", form, FORMS)
    if settings.tasks is not None and settings.store is None:
        raise UsageError("--tasks needs --store, whose patches the probe is fitted on")
    if form == "timm" and settings.store is not None:
        raise UsageError(
            "--format timm is a copy of the student, bit for bit: nothing is to be judged; leave --store out"
        )
    head = read_head(run) if (run / HEAD_RECORD).is_file() else None
    held_out = None if settings.store is None else read_patches(run, head, settings, calibrate=form == "onnx-int8")
    linear = linear_classifier(head) if head is not None and form == "wsinfer" else None
    return write_export(run, form, out, trusted, held_out=held_out, head=linear)


def linear_classifier(head: Head) -> LinearClassifier:
    """A head as one linear layer on features, with its scaling and its calibration in it.

    Raises:
        UsageError: The head does not speak of single patches.
    """
    if head.facts.kind != "probe":
        raise UsageError(
            f"--format wsinfer runs a classifier on single patches; this head is of kind {head.facts.kind}. Fit one "
            "with g2l fit-head --kind probe"
        )
    tensors = {name: value.astype(np.float64) for name, value in head.tensors.items()}
    scaled = tensors["weights"][:-1] / tensors["deviation"][:, None]
    weights = scaled.T / head.facts.temperature
    bias = (tensors["weights"][-1] - tensors["mean"] @ scaled) / head.facts.temperature
    return LinearClassifier(
        classes=head.facts.classes,
        weights=np.ascontiguousarray(weights, dtype=np.float32),
        bias=bias.astype(np.float32),
        mpp=GridSpec.from_json(head.facts.grid).mpp,
        patch_px=ViewSpec.from_json(head.facts.views).crop_px,
    )


# -- the patches ------------------------------------------------------------------------------------------


def read_patches(run: Path, head: Head | None, settings: GateSettings, *, calibrate: bool) -> HeldOutPatches:
    """Patches of a store that the student was not trained on, and others to calibrate with.

    Args:
        run: The run folder, or that of the head.
        head: The head, if it is one.
        settings: The store, and a task for a probe.
        calibrate: Whether patches to calibrate with are wanted. Where the store has no slide that was trained on, they
            come from a quarter of its slides, which then judge nothing.

    Raises:
        G2LError: The store cannot be used, or all its patches were trained on.
    """
    assert settings.store is not None
    store = FeatureStore.open(settings.store)
    rows, others, origin = _parts(store, run, head)
    if not rows:
        raise UsageError(
            f"{settings.store}: the student was trained on every slide in it, which proves nothing of new ones. Give "
            "--store with others"
        )
    if calibrate and not others and len(rows) > MIN_SLIDES:
        names = keyed_generator("calibrate", settings.seed).permutation(sorted(rows)).tolist()
        others = {name: rows[name] for name in names[: max(1, (len(rows) - MIN_SLIDES) // 4)]}
        rows = {name: of for name, of in rows.items() if name not in others}
    pixels, slides = _read(store, rows, GATE_PATCHES, settings.seed)
    calibration = pixels[:0]
    if calibrate and others:
        calibration, _ = _read(store, others, CALIBRATION_PATCHES, settings.seed)
    probe = None if settings.tasks is None else _probe(store, settings)
    return HeldOutPatches(pixels=pixels, slides=slides, origin=origin, calibration=calibration, probe=probe)


def _parts(store: FeatureStore, run: Path, head: Head | None) -> tuple[ChosenRows, ChosenRows, str]:
    """Rows to judge on, further rows, and what the first are in words.

    Of the store of the run these are what the run held out and what it trained on; of another one, all slides.
    """
    slides = {slide.slide_id: slide for slide in store.slides()}
    if (run / RUN_RECORD).is_file():
        record = read_run(run)
        if (split := _split_of_run(store, record)) is not None:
            return split.held_out, split.train, f"held out by the run: {record.held_out}"
        trained = set(record.rows["train"])
    elif head is not None:
        fitted = set(head.facts.trained_on["slides"])
        trained = {name for name, slide in slides.items() if digest(slide.facts.fingerprint)[:16] in fitted}
    else:
        trained = set[str]()
    rows = {name: good_rows(slide) for name, slide in slides.items() if name not in trained}
    others = {name: good_rows(slides[name]) for name in sorted(trained & slides.keys())}
    return rows, others, "slides of another cohort" if not others else "slides that were not trained on"


def _split_of_run(store: FeatureStore, record: RunRecord) -> Split | None:
    """The run's own split, if this is its store: the slides that it names, with as many patches of each."""
    settings = record.settings
    try:
        split = split_store(
            store, settings["where"], settings["hold_out"], settings["train"]["seed"], slides=settings["slides"]
        )
    except UsageError:
        return None
    parts = {"train": split.train, "held_out": split.held_out}
    counts = {side: dict(count_rows(store, part)) for side, part in parts.items()}
    return split if all(counts[side] == dict(record.rows[side]) for side in counts) else None


def _read(
    store: FeatureStore, rows: ChosenRows, limit: int, seed: int
) -> tuple[UInt8[np.ndarray, "n height width 3"], np.ndarray]:
    """The canonical views of at most `limit` of the rows, as many of every slide as go, and their slides."""
    good = {name: good_rows(store.slide(name)) if of is None else of for name, of in rows.items()}
    drawn = _even(good, limit, seed)
    pixels = read_held_out(store, drawn, (), limit=limit, seed=seed).pixels
    return pixels, np.repeat(sorted(drawn), [len(drawn[name]) for name in sorted(drawn)])


def _even(rows: Mapping[str, np.ndarray], limit: int, seed: int) -> dict[str, np.ndarray]:
    """At most `limit` rows, drawn slide by slide so that small slides count as much as large ones."""
    left, drawn = limit, dict[str, np.ndarray]()
    for done, name in enumerate(sorted(rows, key=lambda name: (len(rows[name]), name))):
        share = min(len(rows[name]), left // (len(rows) - done))
        if share:
            order = keyed_generator("gate", seed, name).permutation(len(rows[name]))[:share]
            drawn[name] = np.sort(rows[name][order])
        left -= share
    return drawn


# -- the probe --------------------------------------------------------------------------------------------


def _probe(store: FeatureStore, settings: GateSettings) -> Callable[[Encode, Encode], ProbeLoss]:
    """A probe of the task on features of the student, and on those of its export, on the same patches and folds.

    Raises:
        G2LError: The task cannot be used, or evaluates no probe.
    """
    assert settings.tasks is not None
    tasks_file, folder = find_tasks(settings.tasks)
    spec = read_named_task(tasks_file, settings.task)
    if "probe" not in spec.metrics:
        raise UsageError(f"task {spec.name} evaluates no probe; its metrics are {', '.join(spec.metrics)}")
    rows = gather([store], spec, folder)
    if len(rows) > PROBE_PATCHES:
        order = keyed_generator("gate", settings.seed, "probe").permutation(len(rows))[:PROBE_PATCHES]
        rows = rows.take(np.sort(order))
    pixels, order = _pixels_of(store, rows, settings.seed)

    def value(encode: Encode) -> float:
        encoded = encode(pixels)
        features = np.empty(encoded.shape, np.float16)  # as a store keeps them
        features[order] = encoded
        task = TaskInput(
            rows=rows, features=features, spec=spec, seed=settings.seed, teacher="", device="cpu", reference=None
        )
        found = {value.metric: value for value in METRIC_GROUPS["probe"](task)}
        return float(estimate(found[PROBE_METRIC].figure).value)

    def compared(student: Encode, exported: Encode) -> ProbeLoss:
        return ProbeLoss(
            task=spec.name,
            metric=PROBE_METRIC,
            patches=len(rows),
            student=value(student),
            exported=value(exported),
        )

    return compared


def _pixels_of(store: FeatureStore, rows: TaskRows, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The canonical views of a task's rows, slide by slide, and the place of each among the rows."""
    names = rows.slide_ids
    by_slide = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
    ordered = {name: of[np.argsort(rows.row[of])] for name, of in by_slide.items()}
    chosen: dict[str, Any] = {name: rows.row[of] for name, of in ordered.items()}
    pixels = read_held_out(store, chosen, (), limit=len(rows), seed=seed).pixels
    return pixels, np.concatenate([ordered[name] for name in sorted(ordered)])
