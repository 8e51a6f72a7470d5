"""Stage two: from stored features to a student. Behind `g2l distill`; the teacher is loaded only with --online."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from g2l_core.distillation.checkpoints import RunState, restore_best
from g2l_core.distillation.distiller import Distiller, checkpoint_gradients
from g2l_core.distillation.distributed import ProcessGroup, init_distributed
from g2l_core.distillation.held_out import HeldOutSet, read_held_out
from g2l_core.distillation.loader import Reading, ReplayDataset
from g2l_core.distillation.logs import read_figures
from g2l_core.distillation.replay import ReplaySpec
from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.target_statistics import target_statistics
from g2l_core.distillation.training import TrainerHooks, TrainOutcome, TrainSettings, train
from g2l_core.distillation.validation import Curves, held_out_metrics, training_warnings
from g2l_core.encoders.loading import DTYPES, LoadedEncoder, choose_device, encode_all, features_of, load_encoder
from g2l_core.encoders.resolve import EncoderSpec, find_stored
from g2l_core.encoders.student_folder import ModelCard, write_student
from g2l_core.errors import StoreMissingError, UnknownNameError, UsageError
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import software
from pipeline.progress import ProgressLine, say
from pipeline.run_page import training_page
from pipeline.runs import ABOUT, open_run, read_record, write_record
from pipeline.split import Split, split_store

VALIDATION_PATCHES = 2048
CURVES_PAGE = "curves.html"
KEPT = ("last", "best")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything that decides the student, but for store, teacher and student."""

    train: TrainSettings
    batch_size: int = 32
    """Patches a step and rank."""
    pool_blocks: int = 256
    where: tuple[str, ...] = ()
    hold_out: str = "0.1"
    slides: int | None = None
    """Train on so many slides; None on all."""
    views: int | None = None
    """Replay views 1 to this; None all that are stored; 0, with a live teacher, new ones every epoch."""
    online: bool = False
    """Run the teacher on every batch instead of reading its features."""
    precision: str = "auto"
    keep: str = "last"
    """Which weights the student gets in the end: the last, or those of the best validation."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.keep not in KEPT:
            raise UnknownNameError("weights to keep", self.keep, KEPT)
        if self.views is not None and self.views < (0 if self.online else 1):
            raise UsageError("--views must be at least 1; 0, new views every epoch, needs --online")
        if self.online and (self.train.objective.needs_statistics or self.train.objective.needs_bank):
            raise UsageError(
                "a live teacher has no stored targets to take statistics or a bank from: use teacher-norm batch"
            )


@dataclass(frozen=True, kw_only=True)
class DistillHow:
    """How stage two runs. None of it changes the student, but for the device."""

    resume: bool = False
    device: str = "auto"
    workers: int = 2
    targets_gb: float = 4.0
    pixel_cache: Path | None = None
    pixel_cache_gb: float = 50.0


@dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What stage two did."""

    out: Path
    steps: int
    stopped_early: bool
    held_out: str
    before: dict[str, float]
    after: dict[str, float]
    share_waiting: float
    """Of the training time, waiting for data."""
    warnings: tuple[str, ...] = ()
    leads: bool = True
    """Whether this process speaks for all that train together."""


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    """Where targets come from."""

    facts: Mapping[str, Any]
    key: str | None
    """In the store; None where it runs live."""
    live: LoadedEncoder | None = None

    @property
    def name(self) -> str:
        return self.key or f"{self.live.key if self.live else ''}, run live"


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
        teacher: The teacher as the user names it; a spec where it runs live.
        student_spec: The student before training.
        out: The run folder.
        settings: The rest; `settings.train.steps` counts unless `epochs` is given.
        epochs: Passes over the training patches.
        how: Device, workers, caches.

    Raises:
        G2LError: Something does not fit; nothing has been trained then.
    """
    how = how or DistillHow()
    with init_distributed(choose_device(how.device)) as group:
        return _distill(store_path, teacher, student_spec, out, settings, epochs, how, group)


def _distill(
    store_path: Path,
    teacher: str | EncoderSpec,
    student_spec: EncoderSpec,
    out: Path,
    settings: DistillSettings,
    epochs: int | None,
    how: DistillHow,
    group: ProcessGroup,
) -> DistillSummary:
    store = FeatureStore.open(store_path)
    source = _teacher(store, teacher, settings, group)
    split = split_store(store, settings.where, settings.hold_out, settings.train.seed, slides=settings.slides)
    loader = _loader(store, split, source, settings, how, group)
    training = settings.train
    if epochs is not None:
        batches = epochs * loader.batches_per_epoch
        training = replace(training, steps=max(1, batches // training.optim.accumulate))
    student = load_encoder(student_spec, device=str(group.device), precision=training_precision(settings.precision))
    held_out = _held_out(store, split, source, training.seed, settings.batch_size)
    record = run_record(store, source, student, settings, training, split, loader.spec, group)
    if group.leads:
        open_run(out, record, resume=how.resume)
    group.wait()
    distiller = _distiller(student, held_out, training)
    objective = Objective(training.objective, _statistics(store, split, source, training, loader.spec), group)
    outcome, state = _train(distiller, objective, loader, held_out, student, source, training, settings, out, group)
    group.wait()
    if group.leads:
        _finish(out, state, student_spec, source, split, settings, outcome, record)
    figures = read_figures(out / "validation.csv")
    return DistillSummary(
        out=out,
        steps=outcome.steps,
        stopped_early=outcome.stopped_early,
        held_out=split.description,
        before=figures[0],
        after=figures[-1],
        share_waiting=_share_waiting(out),
        warnings=outcome.warnings,
        leads=group.leads,
    )


def _teacher(
    store: FeatureStore, teacher: str | EncoderSpec, settings: DistillSettings, group: ProcessGroup
) -> _Teacher:
    if not settings.online:
        key = find_stored(teacher.name if isinstance(teacher, EncoderSpec) else teacher, store.encoders)
        return _Teacher(facts=store.encoders[key], key=key)
    if not isinstance(teacher, EncoderSpec):
        raise UsageError("a live teacher is given by its spec")
    stored = (facts["precision"] for facts in store.encoders.values() if facts["name"] == teacher.name)
    live = load_encoder(teacher, device=str(group.device), precision=next(stored, "auto"))
    return _Teacher(facts={**live.facts, "online": True}, key=None, live=live)


def _loader(
    store: FeatureStore, split: Split, source: _Teacher, settings: DistillSettings, how: DistillHow, group: ProcessGroup
) -> ReplayDataset:
    spec = ReplaySpec(
        encoder=source.key,
        n_augmented=_views(store, split, source, settings),
        batch_size=settings.batch_size * group.world,
        pool_blocks=settings.pool_blocks,
        seed=settings.train.seed,
    )
    cache = PixelCache(how.pixel_cache, how.pixel_cache_gb) if how.pixel_cache else None
    reading = Reading(
        workers=how.workers, rank=group.rank, world=group.world, targets_gb=how.targets_gb, pixel_cache=cache
    )
    return ReplayDataset(store, split.train, spec, reading)


def _views(store: FeatureStore, split: Split, source: _Teacher, settings: DistillSettings) -> int:
    """Augmented views to replay.

    Raises:
        StoreMissingError: The teacher has none, or fewer than are wanted.
    """
    slides = [store.slide(slide_id) for slide_id in {*split.train, *split.held_out}]
    if source.key is None:
        stored = min(slide.view_params.shape[1] for slide in slides) - 1
        return stored if settings.views is None else settings.views
    stored = min(slide.features_array(source.key).shape[1] for slide in slides) - 1
    wanted = settings.views or max(stored, 1)
    if stored < wanted:
        there = f"{stored} augmented views, not {wanted}," if stored else "only the canonical view"
        raise StoreMissingError(
            f"{store.path} has {there} of {source.key}: run g2l cache-teacher with --views {max(wanted, 2)}"
        )
    return wanted


def _held_out(store: FeatureStore, split: Split, source: _Teacher, seed: int, batch_size: int) -> HeldOutSet:
    found = read_held_out(store, split.held_out, source.key, limit=VALIDATION_PATCHES, seed=seed)
    if source.live is None:
        return found
    return replace(found, targets=encode_all(source.live, found.pixels, batch_size).astype(np.float16))


def _distiller(student: LoadedEncoder, held_out: HeldOutSet, training: TrainSettings) -> Distiller:
    module = student.module.requires_grad_(True)
    if training.grad_checkpoint:
        checkpoint_gradients(module)
    width = held_out.targets.shape[1]
    return Distiller(module, student.dim, width, training.seed, training.projector).to(student.device)


def _statistics(
    store: FeatureStore, split: Split, source: _Teacher, training: TrainSettings, replay: ReplaySpec
) -> TargetStatistics | None:
    if source.key is None or not (training.objective.needs_statistics or training.objective.needs_bank):
        return None
    return target_statistics(store, split.train, source.key, replay.n_augmented)


def training_precision(asked: str) -> str:
    """The forward precision of training; float16 would need loss scaling, which the paper does not use."""
    if asked not in {"auto", "bf16", "fp32"}:
        raise UsageError(f"--precision {asked} cannot train; use bf16 or fp32")
    return "fp32" if asked == "auto" else asked


def run_record(
    store: FeatureStore,
    source: _Teacher,
    student: LoadedEncoder,
    settings: DistillSettings,
    training: TrainSettings,
    split: Split,
    replay: ReplaySpec,
    group: ProcessGroup,
) -> dict[str, Any]:
    """What identifies a run, as plain values: another of these cannot resume it."""
    return {
        "store": {"grid": store.grid, "views": store.views},
        "teacher": source.facts,
        "student": student.facts,
        "settings": {**asdict(settings), "where": list(settings.where), "train": asdict(training)},
        "replay": asdict(replay),
        "ranks": group.world,
        "held_out": split.description,
        "rows": {
            side: {slide_id: len(rows) for slide_id, rows in part.items()}
            for side, part in (("train", split.train), ("held_out", split.held_out))
        },
        ABOUT: {"store": str(store.path.resolve()), "software": software(), "device": str(group.device)},
    }


def _train(
    distiller: Distiller,
    objective: Objective,
    loader: ReplayDataset,
    held_out: HeldOutSet,
    student: LoadedEncoder,
    source: _Teacher,
    training: TrainSettings,
    settings: DistillSettings,
    out: Path,
    group: ProcessGroup,
) -> tuple[TrainOutcome, RunState]:
    line = ProgressLine("distill", "steps")

    def report(step: int, loss: float) -> None:
        if group.leads:
            line.update(step, training.steps, f"loss {loss:.3f}")

    loop = TrainerHooks(
        batches=loader.batches,
        device=student.device,
        autocast=None if student.precision == "fp32" else DTYPES[student.precision],
        validate=lambda eval_model: held_out_metrics(eval_model, held_out, student.device, settings.batch_size),
        warn=lambda state, folder: _warn(state, folder, training.steps),
        report=report,
        wrap=group.wrap,
        mean_over_ranks=group.mean,
        leads=group.leads,
        world=group.world,
        targets_of=_live(source.live) if source.live else None,
    )
    found = train(distiller, objective, training, out, loop)
    line.close()
    return found


def _live(teacher: LoadedEncoder) -> Callable[[Tensor], Tensor]:
    """The teacher's features of a batch on the device, rounded as a store would keep them."""

    def targets_of(pixels: Tensor) -> Tensor:
        return features_of(teacher, pixels).half().float()

    return targets_of


def _warn(state: RunState, folder: Path, steps: int) -> None:
    """Say once what the curves warn of."""
    curves = Curves(
        validations=read_figures(folder / "validation.csv"),
        losses=[row["loss_per_element"] for row in read_figures(folder / "log.csv")],
        steps=steps,
    )
    for warning in training_warnings(curves):
        kind = warning.partition(" ")[0]
        if not any(said.startswith(kind) for said in state.said):
            state.said.append(warning)
            say(f"warning  step {state.step}: {warning}")


def _finish(
    out: Path,
    state: RunState,
    student_spec: EncoderSpec,
    source: _Teacher,
    split: Split,
    settings: DistillSettings,
    outcome: TrainOutcome,
    record: Mapping[str, Any],
) -> None:
    """Write the student, its model card, the curves, and the result into run.json."""
    distiller, step = state.eval_model, state.step
    if settings.keep == "best":
        step = restore_best(out, distiller) or 0
    figures = {int(row["step"]): row for row in read_figures(out / "validation.csv")}
    card = ModelCard(
        name=out.resolve().name,
        teacher=source.facts,
        student=student_spec,
        settings=record["settings"],
        train_slides=len(split.train),
        train_patches=sum(map(len, split.train.values())),
        held_out=split.description,
        step=step,
        before=figures[0],
        after=figures[step],
    )
    trained_on = f"{student_spec.weights_in_words}; distilled from {source.name}"
    exported = write_student(out, distiller.student, student_spec, trained_on=trained_on, card=card)
    tensors = {name: t.detach().cpu().contiguous() for name, t in distiller.projector.state_dict().items()}
    save_file(tensors, out / "projector.safetensors")
    result: dict[str, Any] = {
        "outcome": asdict(outcome),
        "before": figures[0],
        "after": figures[step],
        "exported": exported,
    }
    result |= {"kept": settings.keep, "kept_step": step, "share_waiting": _share_waiting(out)}
    write_record(out, {**read_record(out), "result": result})
    (out / CURVES_PAGE).write_text(training_page(out.resolve().name, out, read_record(out)), encoding="utf-8")


def _share_waiting(out: Path) -> float:
    """The share of the training time that was spent waiting for data; the first step fills the pool and is left out."""
    rows = read_figures(out / "log.csv")[1:]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["seconds_waiting"] for row in rows) / seconds if seconds else 0.0
