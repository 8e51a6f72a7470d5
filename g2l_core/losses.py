"""Distillation losses: pure functions (student, teacher) -> scalar, computed in float32 whatever the autocast.

The default is the Log-Sum loss of Miles & Mikolajczyk (AAAI 2024, arXiv 2303.11098), as used by G2L
(arXiv 2510.11176): projected student and teacher features are first standardised with the batch's own statistics.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from g2l_core.errors import UnknownNameError, UsageError

LossFn: TypeAlias = Callable[..., Tensor]
"""(student (n, d), teacher (n, d)) -> scalar; `logsum` also takes `alpha`."""

# Keeps log and 1 / sum finite for a perfect student. At a mean error of only 0.01 standard deviations (alpha 4,
# 32 x 1536 entries) the sum is 1.5e-3, so this moves the loss by less than 1e-9.
_LOG_FLOOR = 1e-12
# |d|^alpha has no derivative at 0 where alpha < 1; an entry below this size gives no gradient.
_ENTRY_FLOOR = 1e-12


def standardize(z: Float[Tensor, "n d"], eps: float = 1e-5) -> Float[Tensor, "n d"]:
    """Centre and scale each dimension with the batch's mean and biased variance: BatchNorm without affine part.

    The reference applies it to the projected student and to the teacher alike, in training mode. Use batch
    statistics on both sides or on neither: a perfect student otherwise has a loss, the batch's sampling noise.

    Args:
        z: Features of one batch, any floating dtype.
        eps: Added to the variance; a dimension that is constant over the batch becomes 0 (to rounding).

    Returns:
        (z - mean) / sqrt(variance + eps) in float32.

    Raises:
        UsageError: a batch of fewer than two rows, which has no variance.
    """
    if len(z) < 2:
        raise UsageError(
            f"standardize: expected a batch of at least 2 rows, got {len(z)}. Raise the batch size, or drop the last"
            " incomplete batch."
        )
    with torch.autocast(z.device.type, enabled=False):
        return F.batch_norm(z.float(), None, None, training=True, eps=eps)


def logsum(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0) -> Float[Tensor, ""]:
    """Log-Sum loss, form A: L = log sum_{n,d} |s_nd - t_nd|^alpha.

    One logarithm over batch and dimensions together, no mean (arXiv 2303.11098, equation of D(Z_s, Z_t; W_p);
    the authors' ImageNet code). So L grows with log(n d); log `per_element` instead. Its gradient is
    alpha d |d|^(alpha - 2) / sum. Where student and teacher agree entirely, L is log 1e-12 and the gradient 0.

    Args:
        student: Projected student features, already standardised.
        teacher: Teacher features, already standardised.
        alpha: Exponent, above 0; larger ones weigh the worst entries more.

    Returns:
        The loss in float32.

    Raises:
        UsageError: shapes that differ, or an alpha that is not a positive finite number.
    """
    if not 0 < alpha < math.inf:
        raise UsageError(f"logsum: expected a finite alpha above 0, got {alpha}. The paper's is 4.")
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return torch.log(_powers(student - teacher, alpha).sum() + _LOG_FLOOR)


def _powers(difference: Float[Tensor, "n d"], alpha: float) -> Float[Tensor, "n d"]:
    if alpha == 4:
        squared = difference * difference  # exact and fast where pow is neither
        return squared * squared
    return difference.abs().clamp_min(_ENTRY_FLOOR).pow(alpha)


def per_element(loss: float, n: int, d: int) -> float:
    """The Log-Sum loss without the size of its batch: L - log(n d), the log of the mean instead of the sum.

    Args:
        loss: `logsum` of a batch.
        n: Rows of the batch.
        d: Feature dimensions.

    Returns:
        A figure comparable between batch sizes; log 12 = 2.485 for independent unit Gaussians and alpha 4.
    """
    return loss - math.log(n * d)


def mse(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared error over batch and dimensions.

    Args:
        student: Projected student features.
        teacher: Teacher features.

    Returns:
        The loss in float32.

    Raises:
        UsageError: shapes that differ.
    """
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(student, teacher)


def cosine(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """One minus the cosine of each row's student and teacher vectors, averaged over the batch.

    Args:
        student: Projected student features.
        teacher: Teacher features.

    Returns:
        The loss in float32, in [0, 2].

    Raises:
        UsageError: shapes that differ.
    """
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def smooth_l1(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean over batch and dimensions of d^2 / 2 where |d| < 1, else |d| - 1/2 (Girshick, ICCV 2015, equation 3).

    Args:
        student: Projected student features.
        teacher: Teacher features.

    Returns:
        The loss in float32.

    Raises:
        UsageError: shapes that differ.
    """
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(student, teacher)


LOSSES: Mapping[str, LossFn] = MappingProxyType(
    {"logsum": logsum, "mse": mse, "cosine": cosine, "smooth_l1": smooth_l1}
)
"""The losses by the name that the command line takes."""


def loss_by_name(name: str) -> LossFn:
    """Look a loss up in `LOSSES`.

    Args:
        name: As in the table.

    Returns:
        The loss function.

    Raises:
        UnknownNameError: a name that is not in the table; the message suggests the nearest.
    """
    if name not in LOSSES:
        raise UnknownNameError("loss", name, LOSSES)
    return LOSSES[name]


def _same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # broadcasting would turn a wrong shape into a wrong loss
    if student.shape != teacher.shape:
        raise UsageError(
            f"loss: expected student and teacher of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}."
            " Project the student to the teacher's dimension."
        )
    return student.float(), teacher.float()
