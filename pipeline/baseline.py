"""`g2l baseline`: the student of a distillation with the same patches, steps and batches, and without its teacher.

Everything comes from the record of a run of `g2l distill`, so that nothing can differ by mistake. `prepare` finds and
checks it; `run_baseline` trains, or leaves the start as it is, and writes a run folder that is an encoder like others.
"""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from g2l_core.distillation.baselines import BaselineObjective, contrast_head
from g2l_core.distillation.checkpoints import RunState
from g2l_core.distillation.distiller import Distiller, HeadLayout, checkpoint_gradients
from g2l_core.distillation.distributed import ProcessGroup, init_distributed
from g2l_core.distillation.held_out import HeldOutSet, read_held_out
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.logs import TrainingLogs, read_log, row_of_step
from g2l_core.distillation.replay import ChosenRows, Given, ReplaySpec, count_rows
from g2l_core.distillation.spec import ObjectiveSpec, RobustnessSpec, TeachersSpec
from g2l_core.distillation.trackers import Tracking, require_trackers
from g2l_core.distillation.training import TrainerHooks, TrainOutcome, train
from g2l_core.distillation.validation import Curves, held_out_metrics, training_warnings
from g2l_core.encoders.loading import COMPILED, DTYPES, LoadedEncoder, choose_device, load_encoder
from g2l_core.encoders.resolve import EncoderSpec, spec_from_json
from g2l_core.encoders.student_folder import ModelCard, write_student, write_tensors
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.errors import RunError, StoreMissingError, writing
from g2l_core.files import write_text
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import software
from pipeline.distill import (
    CURVES_PAGE,
    READ_OF_STEPS,
    STEPS,
    VALIDATION_PATCHES,
    VALIDATIONS,
    DistillSummary,
    recorded,
    recorded_replay,
    share_waiting_of,
    training_precision,
)
from pipeline.progress import ProgressLine, say
from pipeline.row_labels import as_targets, labels_of_rows, require_classes
from pipeline.run_page import training_page
from pipeline.runs import RunRecord, RunResult, open_run, read_run, write_run
from pipeline.settings import BaselineSettings, DistillHow, DistillSettings
from pipeline.split import Split, split_store
from pipeline.teachers import sources_of

TEMPERATURE = 0.1
"""NT-Xent's, the paper's for ImageNet (arXiv 2002.05709, section 4 and table 5)."""

READ_OF_VALIDATIONS = ("cka_debiased",)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one baseline is made from."""

    like: RunRecord
    """The distillation that it is the baseline of."""
    asked: BaselineSettings
    settings: DistillSettings
    """The distillation's, without what speaks of teachers."""
    store: FeatureStore
    teachers: tuple[str, ...]
    """The keys of the distillation's teachers, whose held-out features it is compared with."""
    split: Split
    student: EncoderSpec
    machine: DistillHow


def prepare(run: Path, asked: BaselineSettings, machine: DistillHow, store_path: Path | None = None) -> Baseline:
    """Find what a distillation was made from, and check that it is still that.

    Args:
        run: A run folder of `g2l distill`, finished or not.
        asked: What to learn from.
        machine: Device, workers and caches.
        store_path: Where the store is now, if it was moved.

    Raises:
        RunError: The folder is no run of a distillation, or the store has other patches now.
        StoreMissingError: The store lacks the teacher's features.
        G2LError: The store cannot be opened.
    """
    require_trackers(machine.log_to)
    like = read_run(run)
    if like.baseline:
        raise RunError(f"{run} is a baseline itself: give the run folder of g2l distill that it belongs to")
    store = FeatureStore.open(store_path or str(like.about.get("store", "")), writable=asked.kind == "pca")
    store.require_identity(grid=like.store["grid"], views=like.store["views"])
    settings = _without_teacher(run, like, asked)
    split = split_store(store, settings.where, settings.hold_out, settings.train.seed, slides=settings.slides)
    for side, part in (("train", split.train), ("held_out", split.held_out)):
        if count_rows(store, part) != like.rows[side]:
            raise RunError(
                f"{store.path} has other patches than {run} was made with ({side}): a baseline needs the same ones, so "
                "distill again, or give the store as it was with --store"
            )
    spec = with_trusted_code(spec_from_json(like.student.to_json(), str(run)), machine.trust_code)
    teachers = tuple(_key_of(store, teacher.digest, teacher.name) for teacher in like.teachers)
    return Baseline(
        like=like, asked=asked, settings=settings, store=store, teachers=teachers, split=split, student=spec,
        machine=machine,
    )  # fmt: skip


def _without_teacher(run: Path, like: RunRecord, asked: BaselineSettings) -> DistillSettings:
    """The settings of a distillation, without those of teachers. No early end, so that no step is missing."""
    try:
        settings = TypeAdapter(DistillSettings).validate_python({**like.settings})
    except ValidationError as error:
        raise RunError(f"{run}: its settings are of another version and cannot be used again ({error})") from error
    optim = replace(settings.train.optim, early_stop_patience=0, lr=asked.lr or settings.train.optim.lr)
    plain = replace(
        settings.train, optim=optim, objective=ObjectiveSpec(), teachers=TeachersSpec(), robustness=RobustnessSpec(),
        nested=(), projector="linear",
    )  # fmt: skip
    return replace(settings, train=plain, keep="last")


def _key_of(store: FeatureStore, digest: str, name: str) -> str:
    key = next((key for key, facts in store.encoders.items() if facts.digest == digest), None)
    if key is None:
        raise StoreMissingError(
            f"{store.path} has no features of the teacher {name} to compare with: run g2l cache-teacher for it"
        )
    return key


def run_baseline(baseline: Baseline, out: Path) -> DistillSummary:
    """Make a baseline of the kinds simclr, supervised and start, and write its run folder.

    Raises:
        G2LError: Something does not fit, and nothing has been trained; or training failed.
    """
    with (
        init_distributed(choose_device(baseline.machine.device)) as group,
        writing(out),
        locked_output(out) if group.is_main else nullcontext(),
    ):
        return _run(baseline, out, group)


def _run(baseline: Baseline, out: Path, group: ProcessGroup) -> DistillSummary:
    settings, kind = baseline.settings, baseline.asked.kind
    precision = training_precision(settings.precision) + COMPILED * settings.compile
    student = load_encoder(baseline.student, device=str(group.device), precision=precision)
    if student.digest != baseline.like.student.digest:
        raise RunError(f"the start {baseline.student.name} has other weights now than the distillation began with")
    rows, given, classes = labeled_rows(baseline) if kind == "supervised" else (baseline.split.train, None, [])
    batches = None if kind == "start" else _open_batches(baseline, rows, given, group)
    keys, held = baseline.teachers, baseline.split.held_out
    may_miss = bool(baseline.like.replay.get("may_miss"))
    held_out = read_held_out(
        baseline.store, held, keys, limit=VALIDATION_PATCHES, seed=settings.train.seed, may_miss=may_miss
    )
    record = _record(baseline, batches, rows, classes, group)
    if group.is_main:
        open_run(out, record, restart=baseline.machine.restart)
    group.wait()
    outcome, distiller, step = _train(baseline, student, batches, held_out, len(classes), out, group)
    group.wait()
    if group.is_main:
        _finish(baseline, record, outcome, distiller, step, out)
    validations = read_log(out / VALIDATIONS, READ_OF_VALIDATIONS)
    return DistillSummary(
        out=out,
        steps=outcome.steps,
        stopped_early=False,
        held_out=baseline.split.description,
        before=dict(row_of_step(out / VALIDATIONS, validations, 0)),
        after=validations[-1],
        share_waiting=share_waiting_of(out),
        warnings=outcome.warnings,
        is_main=group.is_main,
    )


def labeled_rows(baseline: Baseline) -> tuple[ChosenRows, Given, list[str]]:
    """The training rows that have a label, their classes as numbers, and the classes. Nothing else is labeled.

    Raises:
        UsageError: There are fewer than two classes, or too many.
    """
    column, store = baseline.asked.label, baseline.store
    found = labels_of_rows(store, baseline.split.train, column)
    classes = require_classes(store, found, f"--label {column}")
    texts = {slide_id: of_rows for slide_id, of_rows in found.items() if of_rows}
    rows = {slide_id: np.array(list(of_rows), np.int64) for slide_id, of_rows in texts.items()}
    return rows, as_targets(store, texts, classes), classes


def _open_batches(baseline: Baseline, rows: ChosenRows, given: Given | None, group: ProcessGroup) -> ReplayDataset:
    """The distillation's batches. The first view of a patch is the one that the distillation saw there."""
    replay, machine = baseline.like.replay, baseline.machine
    at_once = 2 if baseline.asked.kind == "simclr" else 1
    views = int(replay["n_augmented"])
    spec = ReplaySpec(
        encoders=(),
        n_augmented=max(views, at_once) if views else 0,
        batch_size=int(replay["batch_size"]),
        pool_blocks=int(replay["pool_blocks"]),
        seed=int(replay["seed"]),
        at_once=at_once,
    )
    cache = PixelCache(machine.pixel_cache, machine.pixel_cache_gb) if machine.pixel_cache else None
    reading = Reading(workers=machine.workers, rank=group.rank, world=group.world, pixel_cache=cache)
    return ReplayDataset(baseline.store, rows, spec, reading, given)


def _record(
    baseline: Baseline, batches: ReplayDataset | None, rows: ChosenRows, classes: Sequence[str], group: ProcessGroup
) -> RunRecord:
    store = baseline.store
    return replace(
        baseline.like,
        baseline=_described(baseline.asked, classes),
        settings=recorded(baseline.settings),
        replay=recorded_replay(batches.spec) if batches else {},
        rows={"train": count_rows(store, rows) if batches else {}, "held_out": baseline.like.rows["held_out"]},
        ranks=group.world,
        about={"store": str(store.path.resolve()), "software": software(), "device": str(group.device)},
        result=None,
        extra={},
    )


def _described(asked: BaselineSettings, classes: Sequence[str]) -> dict[str, Any]:
    """What a baseline learns from, as run.json keeps it."""
    match asked.kind:
        case "simclr":
            t = asked.temperature or TEMPERATURE
            what = "trained by SimCLR on two views of each patch"
            return {"kind": "simclr", "what": what, "loss": f"NT-Xent, t = {t:g}", "temperature": t}
        case "supervised":
            what = f"trained on the labels {asked.label} ({len(classes)} classes)"
            loss = {"loss": "cross-entropy", "label": asked.label, "classes": list(classes)}
            return {"kind": "supervised", "what": what, **loss}
        case _:
            return {"kind": "start", "what": "the start of the student, not trained any further", "loss": "none"}


def _train(
    baseline: Baseline,
    student: LoadedEncoder,
    batches: ReplayDataset | None,
    held_out: HeldOutSet,
    classes: int,
    out: Path,
    group: ProcessGroup,
) -> tuple[TrainOutcome, Distiller, int]:
    """The network as it was trained, and its step; the start as it is where there are no batches."""
    settings, asked = baseline.settings.train, baseline.asked
    module = student.module.requires_grad_(True)
    if settings.grad_checkpoint:
        checkpoint_gradients(module)
    distiller = Distiller(module, student.dim, max(classes, 1), settings.seed)
    if asked.kind == "simclr":
        distiller.projector = contrast_head(student.dim, settings.seed)
    distiller.to(student.device)
    dims = tuple(baseline.store.encoders[key].dim for key in baseline.teachers)
    layout = HeadLayout(teachers=baseline.teachers, dims=dims, widths=(student.dim,))

    def validate(model: Distiller) -> dict[str, float]:
        size = baseline.settings.batch_size
        return held_out_metrics(model, held_out, student.device, size, layout=layout, is_projected=False)

    tracking = Tracking(names=baseline.machine.log_to, config={"baseline": asdict(asked), **asdict(baseline.settings)})
    if batches is None:
        if group.is_main:
            with closing(TrainingLogs(out, 0, tracking)) as logs:
                logs.validation({"step": 0, **validate(distiller)})
        return TrainOutcome(steps=0, stopped_early=False, last_loss=0.0, best_step=0), distiller, 0
    precision = student.precision.removesuffix(COMPILED)
    with ProgressLine("baseline", "steps") as line:
        hooks = TrainerHooks(
            batches=batches.batches,
            group=group,
            autocast=None if precision == "fp32" else DTYPES[precision],
            validate=validate,
            warn=lambda state, folder: _warn(state, folder, settings.steps),
            report=lambda step, loss: line.update(step, settings.steps, f"loss {loss:.3f}") if group.is_main else None,
            note=lambda text: say(f"note  {text}") if group.is_main else None,
            tracking=tracking,
        )
        objective = BaselineObjective(asked.kind, asked.temperature or TEMPERATURE)
        outcome, state = train(distiller, objective, settings, out, hooks)
    return outcome, state.eval_model, state.step


def _warn(state: RunState, folder: Path, steps: int) -> None:
    """Say at the end if the loss has not fallen. How near it is to a teacher is no aim of a baseline."""
    losses = [row["loss_per_element"] for row in read_log(folder / STEPS, READ_OF_STEPS)]
    for warning in training_warnings(Curves(validations=(), losses=losses, steps=steps, is_over=state.step == steps)):
        if warning not in state.warnings:
            state.warnings.append(warning)
            say(f"warning  step {state.step}: {warning}")


def _finish(
    baseline: Baseline, record: RunRecord, outcome: TrainOutcome, distiller: Distiller, step: int, out: Path
) -> None:
    """Write the encoder with its model card, the head, the page of curves, and last the result into run.json."""
    validations = read_log(out / VALIDATIONS, READ_OF_VALIDATIONS)
    before, after = (dict(row_of_step(out / VALIDATIONS, validations, at)) for at in (0, step))
    what = str(record.baseline["what"])
    card = ModelCard(
        name=out.resolve().name,
        teachers=[teacher.to_json() for teacher in record.teachers],
        student=baseline.student,
        settings=record.settings,
        train_slides=len(record.rows["train"]),
        train_patches=sum(record.rows["train"].values()),
        held_out=record.held_out,
        step=step,
        before=before,
        after=after,
        warnings=outcome.warnings,
        sources=sources_of(baseline.store, record.rows["train"], (), baseline.student),
        baseline=what,
        loss=str(record.baseline["loss"]),
    )
    trained_on = f"{baseline.student.describe_weights()}; baseline: {what}"
    exported = write_student(out, distiller.student, baseline.student, trained_on=trained_on, card=card)
    if step:
        head = {name: t.detach().cpu().contiguous() for name, t in distiller.projector.state_dict().items()}
        write_tensors(out / "projector.safetensors", head)
    waiting = share_waiting_of(out)
    result = RunResult(
        outcome=outcome, before=before, after=after, exported=exported, kept="last", kept_step=step,
        share_waiting=waiting,
    )  # fmt: skip
    done = replace(record, result=result)
    write_text(out / CURVES_PAGE, training_page(card.name, out, done, result))
    write_run(out, done)
