"""Stage two, behind `g2l distill`: from stored features to a student.

`run_distill` collects what decides a run, `_distill` opens everything that can be refused, trains, and writes the
student. The teacher's network is loaded only with --online.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from g2l_core.distillation.checkpoints import RunState, last_step, restore_best
from g2l_core.distillation.distiller import Distiller, HeadLayout, checkpoint_gradients, head_layout
from g2l_core.distillation.distributed import ProcessGroup, init_distributed
from g2l_core.distillation.held_out import HeldOutSet, read_held_out
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.logs import read_log, row_of_step
from g2l_core.distillation.objective import TargetStatistics
from g2l_core.distillation.replay import ReplaySpec, count_rows, encoders_of
from g2l_core.distillation.spec import ObjectiveSpec, RobustnessSpec, TeachersSpec
from g2l_core.distillation.target_statistics import FILE as STATISTICS
from g2l_core.distillation.target_statistics import read_statistics, target_statistics, write_statistics
from g2l_core.distillation.trackers import Tracking, require_trackers
from g2l_core.distillation.training import TrainerHooks, TrainOutcome, train
from g2l_core.distillation.validation import Curves, Restored, held_out_metrics, training_warnings
from g2l_core.encoders.loading import COMPILED, DTYPES, LoadedEncoder, choose_device, load_encoder
from g2l_core.encoders.resolve import EncoderSpec
from g2l_core.encoders.student_folder import ModelCard, write_student, write_tensors
from g2l_core.encoders.terms import Source, not_free
from g2l_core.errors import RunError, UsageError, writing
from g2l_core.files import write_text
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.store.features import FeatureStore
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import software
from pipeline.interruption import if_interrupted
from pipeline.progress import ProgressLine, say
from pipeline.row_labels import centers_of
from pipeline.run_page import HELD_OUT, training_page
from pipeline.runs import RunRecord, RunResult, open_run, read_run, write_run
from pipeline.settings import DistillHow, DistillSettings
from pipeline.split import Split, split_store
from pipeline.teachers import (
    Teachers,
    build_objective,
    doubts_of,
    live_features,
    objective_of_each,
    open_teachers,
    paired_views,
    replayed_views,
    require_held_out,
    sources_of,
    stored_keys,
    weights_of,
    with_live_targets,
)

VALIDATION_PATCHES = 2048
VALIDATIONS, STEPS = "validation.csv", "log.csv"
READ_OF_STEPS = ("loss_per_element", "seconds", "seconds_waiting")
"""The columns of `STEPS` that are read again."""
CURVES_PAGE = "curves.html"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one distillation is made from."""

    store: FeatureStore
    teachers: Teachers
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
    teacher: str | EncoderSpec | Sequence[str | EncoderSpec],
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
        teacher: The teacher as the user names it, or its spec where it runs live; or several.
        student_spec: The student before training.
        out: The run folder.
        settings: Everything else that decides the student. Its number of steps is ignored where `epochs` is given.
        epochs: Passes over the training patches.
        how: Device, workers and caches.

    Raises:
        G2LError: Something does not fit, and nothing has been trained; or training failed.
    """
    machine = how or DistillHow()
    require_trackers(machine.log_to)
    asked = [teacher] if isinstance(teacher, str | EncoderSpec) else list(teacher)
    with (
        init_distributed(choose_device(machine.device)) as group,
        writing(out),
        locked_output(out) if group.is_main else nullcontext(),
    ):
        store = FeatureStore.open(store_path)
        run = Run(
            store=store,
            teachers=open_teachers(store, asked, settings, group),
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
    precision = training_precision(run.settings.precision) + COMPILED * run.settings.compile
    student = load_encoder(run.student, device=str(run.group.device), precision=precision)
    if student.spec.width is not None:
        raise UsageError(f"{student.spec.name}: a student is trained with all of its features; leave the width out")
    held_out = _read_held_out(run)
    layout = head_layout(
        [teacher.column for teacher in run.teachers],
        [teacher.facts.dim for teacher in run.teachers],
        run.settings.train.nested,
        student.dim,
    )
    require_held_out(held_out, layout)
    objective_of_each(run.settings.train.objective, run.teachers), weights_of(run.settings.train, run.teachers)
    sources = sources_of(run.store, run.split.train, run.teachers, run.student)
    if run.machine.permissive and (reason := not_free(sources)):
        raise UsageError(f"--permissive: the student would not be free for any use, because of {reason}")
    for doubt in doubts_of(run.teachers) if run.group.is_main else ():
        say(f"note  {doubt}: g2l store verify --recompute N does, where the teacher's weights are at hand")
    if run.group.is_main:
        open_run(run.out, run_record(run, student, batches.spec), restart=run.machine.restart)
    run.group.wait()
    outcome, state = _train(run, student, batches, held_out, layout)
    run.group.wait()
    if run.group.is_main:
        _finish(run, outcome, state, sources, layout)
    validations = _validations(run.out)
    return DistillSummary(
        out=run.out,
        steps=outcome.steps,
        stopped_early=outcome.stopped_early,
        held_out=run.split.description,
        before=_values_at(run.out, 0),
        after=validations[-1],
        share_waiting=share_waiting_of(run.out),
        warnings=outcome.warnings,
        is_main=run.group.is_main,
    )


def _open_batches(run: Run) -> ReplayDataset:
    machine, group = run.machine, run.group
    slides = [run.store.slide(slide_id) for slide_id in sorted({*run.split.train, *run.split.held_out})]
    terms = run.settings.train.robustness
    views = replayed_views(run.store, slides, run.teachers, run.settings)
    if terms.stain_weight:
        views = paired_views(run.store, views, run.settings)
    spec = ReplaySpec(
        encoders=stored_keys(run.teachers),
        may_miss=run.settings.train.teachers.missing == "mask",
        n_augmented=views,
        at_once=2 if terms.stain_weight else 1,
        is_paired=terms.stain_weight > 0,
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
    centers = centers_of(run.store, run.split.train, terms.center_label) if terms.center_weight else None
    return ReplayDataset(run.store, run.split.train, spec, reading, centers)


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
        run.store,
        run.split.held_out,
        stored_keys(run.teachers),
        limit=VALIDATION_PATCHES,
        seed=run.settings.train.seed,
        may_miss=run.settings.train.teachers.missing == "mask",
    )
    return with_live_targets(held_out, run.teachers, run.settings.batch_size)


def run_record(run: Run, student: LoadedEncoder, replay: ReplaySpec) -> RunRecord:
    """What run.json says of a run before it has a result."""
    return RunRecord(
        store={"grid": run.store.grid, "views": run.store.views},
        teacher=run.teachers[0].facts,
        more_teachers=tuple(teacher.facts for teacher in run.teachers[1:]),
        student=student.facts,
        settings=recorded(run.settings),
        replay=recorded_replay(replay),
        ranks=run.group.world,
        held_out=run.split.description,
        rows={
            side: count_rows(run.store, part)
            for side, part in (("train", run.split.train), ("held_out", run.split.held_out))
        },
        about={"store": str(run.store.path.resolve()), "software": software(), "device": str(run.group.device)},
    )


def recorded(settings: DistillSettings) -> dict[str, Any]:
    """The settings as run.json keeps them. Those that older runs have not are left out at their defaults."""
    plain = {**asdict(settings), "where": list(settings.where)}
    train = plain["train"]
    if settings.train.teachers == TeachersSpec():
        del train["teachers"]
    if settings.train.robustness == RobustnessSpec():
        del train["robustness"]
    if not settings.train.nested:
        del train["nested"]
    if not settings.compile:
        del plain["compile"]
    return plain


def recorded_replay(replay: ReplaySpec) -> dict[str, Any]:
    """What is replayed as run.json keeps it: `encoder` is the first teacher's key, `encoders` those of several."""
    plain = asdict(replay)
    keys, may_miss, at_once = plain.pop("encoders"), plain.pop("may_miss"), plain.pop("at_once")
    if not plain["is_paired"]:
        del plain["is_paired"]
    several = {"encoders": list(keys), "may_miss": may_miss} if len(keys) > 1 else {}
    views = {"at_once": at_once} if at_once > 1 else {}
    return {"encoder": keys[0] if keys else None, **plain, **several, **views}


def _train(
    run: Run, student: LoadedEncoder, batches: ReplayDataset, held_out: HeldOutSet, layout: HeadLayout
) -> tuple[TrainOutcome, RunState]:
    settings, group = run.settings.train, run.group
    module = student.module.requires_grad_(True)
    if settings.grad_checkpoint:
        checkpoint_gradients(module)
    distiller = Distiller(module, student.dim, layout, settings.seed, settings.projector).to(student.device)
    statistics = _statistics(run, batches.spec)
    objective = build_objective(settings, run.teachers, layout, statistics, group)
    restored = _restored(run, statistics)
    precision = student.precision.removesuffix(COMPILED)

    def report(step: int, loss: float) -> None:
        if group.is_main:
            line.update(step, settings.steps, f"loss {loss:.3f}")

    def validate(model: Distiller) -> dict[str, float]:
        batch_size = run.settings.batch_size
        return held_out_metrics(model, held_out, student.device, batch_size, layout=layout, restored=restored)

    hooks = TrainerHooks(
        batches=batches.batches,
        group=group,
        autocast=None if precision == "fp32" else DTYPES[precision],
        validate=validate,
        warn=lambda state, folder: _warn(state, folder, settings.steps),
        report=report,
        note=lambda text: say(f"note  {text}") if group.is_main else None,
        teacher=live_features(run.teachers),
        tracking=Tracking(names=run.machine.log_to, config=_shown_by_trackers(run)),
    )
    with ProgressLine("distill", "steps") as line, if_interrupted(lambda: _left(run.out, settings.steps)):
        return train(distiller, objective, settings, run.out, hooks)


def _shown_by_trackers(run: Run) -> dict[str, Any]:
    """What trackers filter runs by: teachers, student and settings."""
    names = {"teachers": [teacher.facts.name for teacher in run.teachers], "student": run.student.name}
    return {**names, **asdict(run.settings)}


def _left(out: Path, steps: int) -> str:
    """What a run that is interrupted now leaves to the next call."""
    kept = last_step(out)
    if kept is None:
        return f"no step of {steps:,} is kept; the same command begins again"
    return f"step {kept:,} of {steps:,} is kept; the same command goes on from there"


def _statistics(run: Run, replay: ReplaySpec) -> dict[str, TargetStatistics]:
    """Each teacher's statistics, of those that need any: the run's, or taken from the store once and kept with it."""
    specs = objective_of_each(run.settings.train.objective, run.teachers)
    needed = {
        teacher.key: spec
        for teacher, spec in zip(run.teachers, specs, strict=True)
        if teacher.key is not None and (spec.needs_statistics or spec.needs_bank)
    }
    if not needed:
        return {}
    if run.group.is_main and not read_statistics(run.out):
        found = {key: _taken(run, replay, key, spec) for key, spec in needed.items()}
        write_statistics(run.out, found)
    run.group.wait()
    kept = read_statistics(run.out)
    if missing := [key for key in needed if key not in kept]:
        raise RunError(f"{run.out / STATISTICS} lacks {missing[0]}: restore it from a copy, or begin again")
    return kept


def _taken(run: Run, replay: ReplaySpec, key: str, spec: ObjectiveSpec) -> TargetStatistics:
    rows = run.split.train
    if replay.may_miss:
        rows = {
            i: chosen
            for i, chosen in rows.items()
            if key in encoders_of(run.store.slide(i), replay.encoders, replay.views)
        }
    found = target_statistics(run.store, rows, key, replay.views, with_phi_s=spec.norms[1] == "phi-s")
    return found if spec.needs_bank else replace(found, bank=None)


def _restored(run: Run, statistics: Mapping[str, TargetStatistics]) -> dict[str, Restored]:
    """What takes projected features back where PHI-S has rotated the targets."""
    return {key: found.restored for key, found in statistics.items() if found.phi_s is not None}


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


def _finish(run: Run, outcome: TrainOutcome, state: RunState, sources: Sequence[Source], layout: HeadLayout) -> None:
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
        teachers=[teacher.facts.to_json() for teacher in run.teachers],
        student=run.student,
        settings=record.settings,
        train_slides=len(run.split.train),
        train_patches=sum(count_rows(run.store, run.split.train).values()),
        held_out=run.split.description,
        step=step,
        before=before,
        after=after,
        warnings=(*doubts_of(run.teachers), *outcome.warnings),
        sources=sources,
        widths=layout.widths[:-1],
    )
    trained_on = f"{run.student.describe_weights()}; distilled from {' and '.join(t.name for t in run.teachers)}"
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
        share_waiting=share_waiting_of(out),
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


def share_waiting_of(out: Path) -> float:
    """Fraction of the training time spent waiting for data, without the first step, which fills the pool."""
    rows = read_log(out / STEPS, READ_OF_STEPS)[1:]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["seconds_waiting"] for row in rows) / seconds if seconds else 0.0
