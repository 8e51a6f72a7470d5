"""How close a student is to its teacher on held-out patches, and warnings from a run's curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64

from g2l_core.distillation.distiller import Distiller, HeadLayout
from g2l_core.distillation.held_out import HeldOutSet
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.moments import cka_center, cka_moments
from g2l_core.metrics.similarity import linear_cka

OVERLAP_K = 10
"""Neighbors of the mutual overlap, as in Huh et al. 2024 (arXiv 2405.07987)."""

Restored: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

DEAD = 1e-3
"""Dimensions whose deviation is a smaller fraction than this of the largest one are ignored."""

OF_PARTS = ("cka_debiased", "r2_projected", "knn_overlap")
"""The metrics that are given for each of several teachers and widths, beside the mean of all."""

STALLED_VALIDATIONS = 5
STALLED_GAIN = 0.005
DIVERGED_VALIDATIONS = 3
LOSS_PARTS = 10
"""The first and the last of so many parts of a run are compared to see whether its loss fell."""


def held_out_metrics(
    distiller: Distiller,
    held_out: HeldOutSet,
    device: torch.device,
    batch_size: int,
    *,
    layout: HeadLayout | None = None,
    restored: Mapping[str, Restored] | None = None,
    is_projected: bool = True,
) -> dict[str, float]:
    """Measure how close the student is to the teacher on held-out canonical views.

    Args:
        distiller: Student and projector.
        held_out: Pixels and the teacher's features of them.
        device: Where the distiller is.
        batch_size: Patches that are encoded at a time.
        layout: Which columns are whose, where there are several teachers or widths.
        restored: By teacher, what takes projected features back to the teacher's own space; as they are by default.
        is_projected: Whether there are features in the teacher's space. Of a student that has no teacher there are
            none, and the layout then says whose features to compare with.

    Returns:
        Metric values by name. Of student and teacher: linear CKA, debiased and biased, and the mutual kNN overlap. Of
        projected student and teacher: the same CKA; and, both standardized over the held-out patches, the mean cosine
        and the explained variance R^2, which is the squared correlation of each dimension, averaged. Of several
        teachers, these are means over the teachers, and METRIC:TEACHER is each one's. METRIC@WIDTH is the mean for the
        student's first so many features; both for `OF_PARTS` alone.
    """
    student, projected = _encode(distiller, held_out, device, batch_size)
    layout = layout or HeadLayout(teachers=("",), dims=(projected.shape[1],), widths=(student.shape[1],))
    parts = layout.split(torch.from_numpy(projected)) if is_projected else None
    found = dict[tuple[str, int], dict[str, float]]()
    ends = np.cumsum(layout.dims)
    for i, teacher in enumerate(layout.teachers):
        targets = held_out.targets[:, ends[i] - layout.dims[i] : ends[i]]
        there = ~np.isnan(targets[:, 0])
        undo = (restored or {}).get(teacher, _as_it_is)
        for j, width in enumerate(layout.widths):
            back = undo(parts[i][j][torch.from_numpy(there)]).numpy() if parts else None
            found[teacher, width] = _closeness(student[there, :width], back, targets[there].astype(np.float32))
    return _summarized(found, layout)


def _as_it_is(projected: torch.Tensor) -> torch.Tensor:
    return projected


def _summarized(found: Mapping[tuple[str, int], Mapping[str, float]], layout: HeadLayout) -> dict[str, float]:
    """The means over teachers at all features, then each teacher's, then the means at smaller widths."""
    full = layout.widths[-1]
    names = list(found[layout.teachers[0], full])

    def mean(name: str, width: int) -> float:
        return sum(found[teacher, width][name] for teacher in layout.teachers) / len(layout.teachers)

    several = layout.teachers if len(layout.teachers) > 1 else ()
    of_parts = [name for name in OF_PARTS if name in names]
    return {
        **{name: mean(name, full) for name in names},
        **{f"{name}:{teacher}": found[teacher, full][name] for teacher in several for name in of_parts},
        **{f"{name}@{width}": mean(name, width) for width in layout.widths[:-1] for name in of_parts},
    }


def _closeness(
    student: Float32[np.ndarray, "n dim"],
    projected: Float32[np.ndarray, "n d"] | None,
    teacher: Float32[np.ndarray, "n d"],
) -> dict[str, float]:
    """The metrics of one teacher at one width."""
    if projected is None:
        return {**_cka(student, teacher, ""), "knn_overlap": neighbor_overlap(student, teacher, OVERLAP_K)}
    alive = teacher.std(axis=0) > DEAD * teacher.std(axis=0).max()  # a constant dimension explains nothing
    s, t = (_standardized(z[:, alive]) for z in (projected, teacher))
    cosines = (s * t).sum(axis=1) / np.maximum(np.linalg.norm(s, axis=1) * np.linalg.norm(t, axis=1), 1e-12)
    return {
        **_cka(student, teacher, ""),
        **_cka(projected, teacher, "_projected"),
        "cosine_projected": float(cosines.mean()),
        "r2_projected": float(np.square((s * t).mean(axis=0)).mean()),
        "knn_overlap": neighbor_overlap(student, teacher, OVERLAP_K),
    }


def _standardized(z: Float32[np.ndarray, "n dim"]) -> Float64[np.ndarray, "n dim"]:
    """Each dimension with mean 0 and variance 1; a constant dimension becomes 0."""
    centered = z.astype(np.float64) - z.mean(axis=0, dtype=np.float64)
    deviation = centered.std(axis=0)
    return centered / np.where(deviation > 0, deviation, 1)


def _encode(
    distiller: Distiller, held_out: HeldOutSet, device: torch.device, batch_size: int
) -> tuple[Float32[np.ndarray, "n dim"], Float32[np.ndarray, "n teacher_dim"]]:
    """Features of the student, and projected features."""
    was_training = distiller.training
    distiller.eval()
    features, projected = [], []
    with torch.inference_mode():
        for start in range(0, len(held_out.pixels), batch_size):
            pixels = torch.from_numpy(held_out.pixels[start : start + batch_size]).to(device)
            encoded = distiller.student(pixels)
            features.append(encoded.float().cpu().numpy())
            projected.append(distiller.projector(encoded).float().cpu().numpy())
    distiller.train(was_training)
    return np.concatenate(features), np.concatenate(projected)


def _cka(x: np.ndarray, y: np.ndarray, suffix: str) -> dict[str, float]:
    moments = cka_moments(x, y, center=cka_center(x, y))
    return {f"cka_{kind}{suffix}": linear_cka(moments, debiased=kind == "debiased") for kind in ("debiased", "biased")}


def neighbor_overlap(x: Float[np.ndarray, "n dim_x"], y: Float[np.ndarray, "n dim_y"], k: int) -> float:
    """Mean fraction of each row's k nearest rows (cosine) in `x` that are among its k nearest in `y`.

    Args:
        x: Features of n rows.
        y: Other features of the same rows.
        k: Neighbors; n - 1 at most.
    """
    k = min(k, len(x) - 1)
    nearest_x, nearest_y = (nearest(z, None, k).indices for z in (x, y))
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(nearest_x, nearest_y, strict=True)]) / k)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The curves of a run so far."""

    validations: Sequence[Mapping[str, float]]
    """The rows of validation.csv."""
    losses: Sequence[float]
    """The comparable loss of every step."""
    steps: int
    """Steps of the whole run."""
    is_over: bool = False
    """Whether the run has ended."""


def training_warnings(curves: Curves) -> list[str]:
    """Warnings from the curves of a run (the failure signs of the paper's summary).

    - CKA stalls: it is below 0.9 and has not gained 0.005 over the last five validations. This is checked in the run's
      first three quarters, since the annealed learning rate leaves no room for a gain later.
    - Training and held-out curves diverge: over the last three validations the training loss fell, and the held-out
      explained variance fell each time. What was not learned cannot be learned by heart, so CKA must have gained 0.005
      before.
    - The run ended with a CKA that is not above the one before training, or with a loss that has not fallen.
    """
    warnings = []
    cka = [row["cka_debiased"] for row in curves.validations]
    last = curves.validations[-1]["step"] if curves.validations else 0
    if len(cka) > STALLED_VALIDATIONS and cka[-1] < 0.9 and last < 0.75 * curves.steps:
        before = max(cka[:-STALLED_VALIDATIONS])
        if max(cka[-STALLED_VALIDATIONS:]) < before + STALLED_GAIN:
            warnings.append(
                f"CKA to the teacher has stalled at {cka[-1]:.3f} for {STALLED_VALIDATIONS} validations: "
                "more slides, more views or a larger student may help"
            )
    if _has_learned(cka) and _diverged(curves):
        warnings.append(
            f"training loss falls while held-out R^2 has fallen {DIVERGED_VALIDATIONS} times in a row: "
            "the student learns its training slides by heart; more slides or views help, or checkpoints/best.pt"
        )
    return warnings + (_ends_without_gain(curves) if curves.is_over else [])


def _has_learned(cka: Sequence[float]) -> bool:
    return bool(cka) and max(cka) >= cka[0] + STALLED_GAIN


def _ends_without_gain(curves: Curves) -> list[str]:
    warnings = []
    cka = {int(row["step"]): row["cka_debiased"] for row in curves.validations}
    steps = list(cka)
    if len(cka) > 1 and not cka[steps[-1]] > cka[steps[0]]:
        best = max(steps, key=lambda step: (cka[step] == cka[step], cka[step]))
        what = "nothing was learned" if best == steps[0] else "what was learned is lost again"
        warnings.append(
            f"{what}: CKA to the teacher was {cka[steps[0]]:.3f} before training and is {cka[steps[-1]]:.3f} at the "
            f"end, best at step {best:,}. Lower --lr, or check the teacher's features with g2l store verify"
        )
    part = len(curves.losses) // LOSS_PARTS
    first, last = (float(np.mean(span)) if part else 0.0 for span in (curves.losses[:part], curves.losses[-part:]))
    if part and not last < first:
        warnings.append(
            f"loss has not fallen: {first:.3f} over the first {part:,} steps, {last:.3f} over the last. "
            "Change --lr, or train for more steps"
        )
    return warnings


def _diverged(curves: Curves) -> bool:
    """Whether the training loss has fallen while the held-out explained variance fell at every recent validation."""
    recent = curves.validations[-DIVERGED_VALIDATIONS - 1 :]
    if len(recent) <= DIVERGED_VALIDATIONS:
        return False
    falling = all(later["r2_projected"] < earlier["r2_projected"] for earlier, later in pairwise(recent))
    steps = [int(row["step"]) for row in recent]
    spans = [curves.losses[a:b] for a, b in pairwise(steps)]
    means = [float(np.mean(span)) for span in spans if len(span)]
    return falling and len(means) > 1 and means[-1] < means[0]
