"""Stage two, behind `g2l distill`: from stored features to a student.

`run_distill` collects what decides a run, `_distill` opens everything that can be refused, trains, and writes the
student. The teacher's network is loaded only with --online.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from g2l_core.distillation.checkpoints import RunState, restore_best
from g2l_core.distillation.distiller import Distiller, checkpoint_gradients
from g2l_core.distillation.distributed import ProcessGroup, init_distributed
from g2l_core.distillation.held_out import HeldOutSet, read_held_out
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.logs import read_log, row_of_step
from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.replay import ReplaySpec, count_rows
from g2l_core.distillation.target_statistics import target_statistics
from g2l_core.distillation.training import TrainerHooks, TrainOutcome, train
from g2l_core.distillation.validation import Curves, held_out_metrics, training_warnings
from g2l_core.encoders.loading import DTYPES, LoadedEncoder, choose_device, encode_all, features_of, load_encoder
from g2l_core.encoders.resolve import EncoderSpec, find_stored
from g2l_core.encoders.student_folder import ModelCard, write_student, write_tensors
from g2l_core.errors import StoreMissingError, UsageError, writing
from g2l_core.files import write_text
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import software
from pipeline.progress import ProgressLine, say
from pipeline.run_page import HELD_OUT, training_page
from pipeline.runs import RunRecord, RunResult, open_run, read_run, write_run
from pipeline.settings import DistillHow, DistillSettings
from pipeline.split import Split, split_store

VALIDATION_PATCHES = 2048
VALIDATIONS, STEPS = "validation.csv", "log.csv"
READ_OF_STEPS = ("loss_per_element", "seconds", "seconds_waiting")
"""The columns of `STEPS` that are read again."""
CURVES_PAGE = "curves.html"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where targets come from: a store's features, or a network that runs live."""

    facts: EncoderFacts
    key: str | None = None
    """The teacher's key in the store; None where it runs live."""
    live: LoadedEncoder | None = None

    @property
    def name(self) -> str:
        """How a student's record names its teacher."""
        return self.key or f"{self.live.key if self.live else ''}, run live"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one distillation is made from."""

    store: FeatureStore
    teacher: Teacher
    student: EncoderSpec
    """The student before training."""
    split: Split
    settings: DistillSettings
    machine: DistillHow
    group: ProcessGroup
    out: Path
    """The run folder."""


@dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What a distillation did."""

    out: Path
    steps: int
    stopped_early: bool
    held_out: str
    before: dict[str, float]
    after: dict[str, float]
    share_waiting: float
    """Fraction of the training time that was spent waiting for data."""
    warnings: tuple[str, ...] = ()
    is_main: bool = True
    """Whether this process prints the summary of all that train together."""


def run_distill(
    store_path: Path,
    teacher: str | EncoderSpec,
    student_spec: EncoderSpec,
    out: Path,
    settings: DistillSettings,
    *,
    epochs: int | None = None,
    how: DistillHow | None = None,
) -> DistillSummary:
    """Distill a student from a store.

    Args:
        store_path: The store.
        teacher: The teacher as the user names it, or its spec where it runs live.
        student_spec: The student before training.
        out: The run folder.
        settings: Everything else that decides the student. Its number of steps is ignored where `epochs` is given.
        epochs: Passes over the training patches.
        how: Device, workers and caches.

    Raises:
        G2LError: Something does not fit, and nothing has been trained; or training failed.
    """
    machine = how or DistillHow()
    with (
        init_distributed(choose_device(machine.device)) as group,
        writing(out),
        locked_output(out) if group.is_main else nullcontext(),
    ):
        store = FeatureStore.open(store_path)
        run = Run(
            store=store,
            teacher=_open_teacher(store, teacher, settings, group),
            student=student_spec,
            split=split_store(store, settings.where, settings.hold_out, settings.train.seed, slides=settings.slides),
            settings=settings,
            machine=machine,
            group=group,
            out=out,
        )
        return _distill(run, epochs)


def _distill(run: Run, epochs: int | None) -> DistillSummary:
    """Open everything that can be refused, then train, then write the student."""
    if run.student.is_export:
        raise UsageError(f"{run.student.source.where} is an export, which cannot be trained; give the run folder")
    batches = _open_batches(run)
    if epochs is not None:
        run = _with_steps(run, epochs * batches.batches_per_epoch)
    precision = training_precision(run.settings.precision)
    student = load_encoder(run.student, device=str(run.group.device), precision=precision)
    held_out = _read_held_out(run)
    if run.group.is_main:
        open_run(run.out, run_record(run, student, batches.spec), resume=run.machine.resume)
    run.group.wait()
    outcome, state = _train(run, student, batches, held_out)
    run.group.wait()
    if run.group.is_main:
        _finish(run, outcome, state)
    validations = _validations(run.out)
    return DistillSummary(
        out=run.out,
        steps=outcome.steps,
        stopped_early=outcome.stopped_early,
        held_out=run.split.description,
        before=_values_at(run.out, 0),
        after=validations[-1],
        share_waiting=_share_waiting(run.out),
        warnings=outcome.warnings,
        is_main=run.group.is_main,
    )


def _open_teacher(
    store: FeatureStore, teacher: str | EncoderSpec, settings: DistillSettings, group: ProcessGroup
) -> Teacher:
    if not settings.online:
        key = find_stored(teacher.name if isinstance(teacher, EncoderSpec) else teacher, store.encoders)
        return Teacher(facts=store.encoders[key], key=key)
    if not isinstance(teacher, EncoderSpec):
        raise UsageError("a live teacher is given by its spec")
    stored = (facts.precision for facts in store.encoders.values() if facts.name == teacher.name)
    live = load_encoder(teacher, device=str(group.device), precision=next(stored, "auto"))
    return Teacher(facts=replace(live.facts, extra={**live.facts.extra, "online": True}), live=live)


def _open_batches(run: Run) -> ReplayDataset:
    machine, group = run.machine, run.group
    spec = ReplaySpec(
        encoder=run.teacher.key,
        n_augmented=_replayed_views(run),
        batch_size=run.settings.batch_size * group.world,
        pool_blocks=run.settings.pool_blocks,
        seed=run.settings.train.seed,
    )
    reading = Reading(
        workers=machine.workers,
        rank=group.rank,
        world=group.world,
        targets_gb=machine.targets_gb,
        pixel_cache=PixelCache(machine.pixel_cache, machine.pixel_cache_gb) if machine.pixel_cache else None,
    )
    return ReplayDataset(run.store, run.split.train, spec, reading)


def _replayed_views(run: Run) -> int:
    """Number of augmented views to replay.

    Raises:
        StoreMissingError: The teacher has none, or fewer than the settings want.
    """
    slides = [run.store.slide(slide_id) for slide_id in {*run.split.train, *run.split.held_out}]
    key, views = run.teacher.key, run.settings.views
    if key is None:
        stored = min(slide.n_views for slide in slides) - 1
        return stored if views is None else views
    stored = min(slide.feature_facts(key).n_views for slide in slides) - 1
    wanted = views or max(stored, 1)
    if stored < wanted and run.teacher.facts.imported:
        raise StoreMissingError(
            f"{key} was imported, and an import has only the canonical view, while a student learns from augmented "
            "ones: run g2l cache-teacher with the slides, or g2l distill --online, which encodes them as it goes"
        )
    if stored < wanted:
        there = f"{stored} augmented views, not {wanted}," if stored else "only the canonical view"
        raise StoreMissingError(
            f"{run.store.path} has {there} of {key}: run g2l cache-teacher with --views {max(wanted, 2)}"
        )
    return wanted


def _with_steps(run: Run, batches: int) -> Run:
    """The run with as many steps as a number of batches makes."""
    steps = max(1, batches // run.settings.train.optim.accumulate)
    return replace(run, settings=replace(run.settings, train=replace(run.settings.train, steps=steps)))


def training_precision(precision: str) -> str:
    """The forward precision of training; float16 would need loss scaling, which the paper does not use.

    Raises:
        UsageError: The precision cannot train.
    """
    if precision not in {"auto", "bf16", "fp32"}:
        raise UsageError(f"--precision {precision} cannot train; use bf16 or fp32")
    return "fp32" if precision == "auto" else precision


def _read_held_out(run: Run) -> HeldOutSet:
    held_out = read_held_out(
        run.store, run.split.held_out, run.teacher.key, limit=VALIDATION_PATCHES, seed=run.settings.train.seed
    )
    if run.teacher.live is None:
        return held_out
    features = encode_all(run.teacher.live, held_out.pixels, run.settings.batch_size)
    return replace(held_out, targets=features.astype(np.float16))


def run_record(run: Run, student: LoadedEncoder, replay: ReplaySpec) -> RunRecord:
    """What run.json says of a run before it has a result."""
    return RunRecord(
        store={"grid": run.store.grid, "views": run.store.views},
        teacher=run.teacher.facts,
        student=student.facts,
        settings={**asdict(run.settings), "where": list(run.settings.where)},
        replay=asdict(replay),
        ranks=run.group.world,
        held_out=run.split.description,
        rows={
            side: count_rows(run.store, part)
            for side, part in (("train", run.split.train), ("held_out", run.split.held_out))
        },
        about={"store": str(run.store.path.resolve()), "software": software(), "device": str(run.group.device)},
    )


def _train(
    run: Run, student: LoadedEncoder, batches: ReplayDataset, held_out: HeldOutSet
) -> tuple[TrainOutcome, RunState]:
    settings, group = run.settings.train, run.group
    module = student.module.requires_grad_(True)
    if settings.grad_checkpoint:
        checkpoint_gradients(module)
    teacher_dim = held_out.targets.shape[1]
    distiller = Distiller(module, student.dim, teacher_dim, settings.seed, settings.projector).to(student.device)
    objective = Objective(settings.objective, _statistics(run, batches.spec), group)

    def report(step: int, loss: float) -> None:
        if group.is_main:
            line.update(step, settings.steps, f"loss {loss:.3f}")

    hooks = TrainerHooks(
        batches=batches.batches,
        group=group,
        autocast=None if student.precision == "fp32" else DTYPES[student.precision],
        validate=lambda model: held_out_metrics(model, held_out, student.device, run.settings.batch_size),
        warn=lambda state, folder: _warn(state, folder, settings.steps),
        report=report,
        note=lambda text: say(f"note  {text}") if group.is_main else None,
        teacher=_live_features(run.teacher.live) if run.teacher.live else None,
    )
    with ProgressLine("distill", "steps") as line:
        return train(distiller, objective, settings, run.out, hooks)


def _statistics(run: Run, replay: ReplaySpec) -> TargetStatistics | None:
    objective, key = run.settings.train.objective, run.teacher.key
    if key is None or not (objective.needs_statistics or objective.needs_bank):
        return None
    return target_statistics(run.store, run.split.train, key, replay.n_augmented)


def _live_features(teacher: LoadedEncoder) -> Callable[[Tensor], Tensor]:
    """Gives the teacher's features of a batch on the device, rounded as a store keeps them."""
    return lambda pixels: features_of(teacher, pixels).half().float()


def _warn(state: RunState, folder: Path, steps: int) -> None:
    """Print each kind of warning about the curves once."""
    curves = Curves(
        validations=_validations(folder),
        losses=[row["loss_per_element"] for row in read_log(folder / STEPS, READ_OF_STEPS)],
        steps=steps,
        is_over=state.stopped or state.step == steps,
    )
    for warning in training_warnings(curves):
        kind = warning.partition(" ")[0]
        if not any(printed.startswith(kind) for printed in state.warnings):
            state.warnings.append(warning)
            say(f"warning  step {state.step}: {warning}")


def _finish(run: Run, outcome: TrainOutcome, state: RunState) -> None:
    """Write the student with its model card, the projector, the page of curves, and last the result into run.json."""
    out, record = run.out, read_run(run.out)
    distiller, step, kept = state.eval_model, state.step, run.settings.keep
    if kept == "best":
        best = restore_best(out, distiller, lambda text: say(f"note  {text}"))
        step, kept = (state.step, "last") if best is None else (best, kept)
        if best is None:
            say("warning  the best weights cannot be read: the last ones are kept")
    before, after = _values_at(out, 0), _values_at(out, step)
    card = ModelCard(
        name=out.resolve().name,
        teacher=run.teacher.facts.to_json(),
        student=run.student,
        settings=record.settings,
        train_slides=len(run.split.train),
        train_patches=sum(count_rows(run.store, run.split.train).values()),
        held_out=run.split.description,
        step=step,
        before=before,
        after=after,
        warnings=outcome.warnings,
    )
    trained_on = f"{run.student.describe_weights()}; distilled from {run.teacher.name}"
    exported = write_student(out, distiller.student, run.student, trained_on=trained_on, card=card)
    tensors = {name: t.detach().cpu().contiguous() for name, t in distiller.projector.state_dict().items()}
    write_tensors(out / "projector.safetensors", tensors)
    result = RunResult(
        outcome=outcome,
        before=before,
        after=after,
        exported=exported,
        kept=kept,
        kept_step=step,
        share_waiting=_share_waiting(out),
    )
    record = replace(record, result=result)
    write_text(out / CURVES_PAGE, training_page(card.name, out, record, result))
    write_run(out, record)


def _validations(folder: Path) -> list[dict[str, float]]:
    return read_log(folder / VALIDATIONS, HELD_OUT)


def _values_at(folder: Path, step: int) -> dict[str, float]:
    """The held-out metric values of one step.

    Raises:
        RunError: There are none.
    """
    return dict(row_of_step(folder / VALIDATIONS, _validations(folder), step))


def _share_waiting(out: Path) -> float:
    """Fraction of the training time spent waiting for data, without the first step, which fills the pool."""
    rows = read_log(out / STEPS, READ_OF_STEPS)[1:]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["seconds_waiting"] for row in rows) / seconds if seconds else 0.0
