"""Stage two: from stored features to a student. Behind `g2l distill`; the teacher is never loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from g2l_core.encoder_loading import DTYPES, LoadedEncoder, load_encoder
from g2l_core.encoders import EncoderSpec, find_stored
from g2l_core.errors import StoreMissingError, UsageError
from g2l_core.loader import CanonicalSet, ReplayLoader, ReplaySpec, read_canonical
from g2l_core.losses import standardize
from g2l_core.metrics.similarity import cka_center, cka_moments, linear_cka
from g2l_core.store.features import FeatureStore
from g2l_core.store.provenance import software
from g2l_core.students import write_student
from g2l_core.training import Distiller, TrainOutcome, TrainSettings, train
from pipeline.progress import ProgressLine
from pipeline.runs import ABOUT, open_run, read_record, write_record
from pipeline.split import Split, split_store

VALIDATION_PATCHES = 2048


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything that decides the student, but for store, teacher and student."""

    train: TrainSettings
    batch_size: int = 32
    pool_blocks: int = 256
    where: tuple[str, ...] = ()
    hold_out: str = "0.1"
    precision: str = "auto"


@dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What stage two did."""

    out: Path
    steps: int
    stopped_early: bool
    held_out: str
    before: dict[str, float]
    after: dict[str, float]


def run_distill(
    store_path: Path,
    teacher: str,
    student_spec: EncoderSpec,
    out: Path,
    settings: DistillSettings,
    *,
    epochs: int | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int = 2,
) -> DistillSummary:
    """Distill a student from a store.

    Args:
        store_path: The store.
        teacher: The teacher as the user names it.
        student_spec: The student before training.
        out: The run folder.
        settings: The rest; `settings.train.steps` counts unless `epochs` is given.
        epochs: Passes over the training patches.
        resume: Go on with the run in `out`.
        device: auto, cpu or cuda.
        workers: Threads that read and augment.

    Raises:
        G2LError: Something does not fit; nothing has been trained then.
    """
    store = FeatureStore.open(store_path)
    key = find_stored(teacher, store.encoders)
    split = split_store(store, settings.where, settings.hold_out, settings.train.seed)
    replay = ReplaySpec(
        encoder=key,
        n_augmented=augmented_views(store, split, key),
        batch_size=settings.batch_size,
        pool_blocks=settings.pool_blocks,
        seed=settings.train.seed,
    )
    loader = ReplayLoader(store, split.train, replay, workers=workers)
    training = settings.train
    if epochs is not None:
        training = TrainSettings(**{**asdict(training), "steps": epochs * loader.batches_per_epoch})
    student = load_encoder(student_spec, device=device, precision=training_precision(settings.precision))
    record = run_record(store, key, student, settings, training, split, replay)
    open_run(out, record, resume=resume)
    held_out = read_canonical(store, split.held_out, key, limit=VALIDATION_PATCHES, seed=training.seed)
    distiller = Distiller(student.module.requires_grad_(True), student.dim, held_out.targets.shape[1], training.seed)
    outcome = _train(distiller, loader, held_out, student, training, settings, out)
    trained_on = f"{student_spec.weights_in_words}; distilled from {key}"
    exported = write_student(out, distiller.student, student_spec, trained_on=trained_on)
    save_file(
        {name: t.detach().cpu() for name, t in distiller.projector.state_dict().items()}, out / "projector.safetensors"
    )
    figures = read_validation(out)
    result = {"outcome": asdict(outcome), "before": figures[0], "after": figures[-1], "exported": exported}
    write_record(out, {**read_record(out), "result": result})
    return DistillSummary(
        out=out,
        steps=outcome.steps,
        stopped_early=outcome.stopped_early,
        held_out=split.description,
        before=figures[0],
        after=figures[-1],
    )


def training_precision(asked: str) -> str:
    """The forward precision of training; float16 would need loss scaling, which the paper does not use."""
    if asked not in {"auto", "bf16", "fp32"}:
        raise UsageError(f"--precision {asked} cannot train; use bf16 or fp32")
    return "fp32" if asked == "auto" else asked


def augmented_views(store: FeatureStore, split: Split, key: str) -> int:
    """Augmented views that the teacher has of every slide in use.

    Raises:
        StoreMissingError: There are none.
    """
    views = min(store.slide(i).features_array(key).shape[1] for i in {*split.train, *split.held_out}) - 1
    if views < 1:
        raise StoreMissingError(
            f"{store.path} has only the canonical view of {key}: run g2l cache-teacher with --views 2 or more"
        )
    return views


def run_record(
    store: FeatureStore,
    key: str,
    student: LoadedEncoder,
    settings: DistillSettings,
    training: TrainSettings,
    split: Split,
    replay: ReplaySpec,
) -> dict[str, Any]:
    """What identifies a run, as plain values: another of these cannot resume it."""
    return {
        "store": {"grid": store.grid, "views": store.views},
        "teacher": store.encoders[key],
        "student": student.facts,
        "settings": {**asdict(settings), "where": list(settings.where), "train": asdict(training)},
        "replay": asdict(replay),
        "held_out": split.description,
        "rows": {
            side: {slide_id: len(rows) for slide_id, rows in part.items()}
            for side, part in (("train", split.train), ("held_out", split.held_out))
        },
        ABOUT: {"store": str(store.path.resolve()), "software": software()},
    }


def _train(
    distiller: Distiller,
    loader: ReplayLoader,
    held_out: CanonicalSet,
    student: LoadedEncoder,
    training: TrainSettings,
    settings: DistillSettings,
    out: Path,
) -> TrainOutcome:
    line = ProgressLine("distill", "steps")
    outcome = train(
        distiller.to(student.device),
        loader.batches,
        training,
        out,
        device=student.device,
        autocast=None if student.precision == "fp32" else DTYPES[student.precision],
        validate=lambda _: validation_figures(distiller, held_out, student.device, settings.batch_size),
        report=lambda step, loss: line.update(step, training.steps, f"loss {loss:.3f}"),
    )
    line.close()
    return outcome


def validation_figures(
    distiller: Distiller, held_out: CanonicalSet, device: torch.device, batch_size: int
) -> dict[str, float]:
    """How close the student is to the teacher on held-out canonical views.

    Returns:
        Linear CKA of student and teacher, debiased and biased; the same for the projected student; and the
        mean cosine of the projected student and the teacher, both standardised over the held-out patches.
    """
    distiller.eval()
    features, projected = [], []
    with torch.inference_mode():
        for start in range(0, len(held_out.pixels), batch_size):
            pixels = torch.from_numpy(held_out.pixels[start : start + batch_size]).to(device)
            encoded = distiller.student(pixels)
            features.append(encoded.float().cpu().numpy())
            projected.append(distiller.projector(encoded).float().cpu().numpy())
    student, projection = np.concatenate(features), np.concatenate(projected)
    teacher = held_out.targets.astype(np.float32)
    cosine = torch.nn.functional.cosine_similarity(
        standardize(torch.from_numpy(projection)), standardize(torch.from_numpy(teacher)), dim=1
    )
    return {
        **_cka(student, teacher, ""),
        **_cka(projection, teacher, "_projected"),
        "cosine_projected": float(cosine.mean()),
    }


def _cka(x: np.ndarray, y: np.ndarray, suffix: str) -> dict[str, float]:
    moments = cka_moments(x, y, center=cka_center(x, y))
    return {f"cka_{kind}{suffix}": linear_cka(moments, debiased=kind == "debiased") for kind in ("debiased", "biased")}


def read_validation(folder: Path) -> list[dict[str, float]]:
    """The rows of validation.csv as numbers."""
    import csv

    with (folder / "validation.csv").open(newline="", encoding="utf-8") as file:
        rows: list[Mapping[str, str]] = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items()} for row in rows]
