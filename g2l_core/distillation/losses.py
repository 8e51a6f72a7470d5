"""Distillation losses: pure functions (student, teacher) -> scalar, computed in float32 whatever the autocast.

The default is the Log-Sum loss of Miles & Mikolajczyk (AAAI 2024, arXiv 2303.11098), as used by G2L
(arXiv 2510.11176): projected student and teacher features are first standardized with the batch's own statistics.
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
"""(student (n, d), teacher (n, d)) -> scalar; some also take `alpha`, `temperature` or `bank`."""

# Keeps log and 1 / sum finite for a perfect student. At a mean error of only 0.01 standard deviations (alpha 4,
# 32 x 1536 entries) the sum is 1.5e-3, so this moves the loss by less than 1e-9.
_LOG_FLOOR = 1e-12
# |d|^alpha has no derivative at 0 where alpha < 1; an entry below this size gives no gradient.
_ENTRY_FLOOR = 1e-12


def standardize(z: Float[Tensor, "n d"], eps: float = 1e-5) -> Float[Tensor, "n d"]:
    """Center and scale each dimension with the batch's mean and biased variance: BatchNorm without affine part.

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
        student: Projected student features, already standardized.
        teacher: Teacher features, already standardized.
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


def _powers(difference: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, "*shape"]:
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


def logsum_corr(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0
) -> Float[Tensor, ""]:
    """Log-Sum loss, form B: L = log(sum_d |1 - c_d|^alpha + 1e-5) with c_d = mean_n s_nd t_nd.

    The authors' transformer code (roymiles/Simple-Recipe-Distillation, deit/; the exponent and 1e-5 are theirs). With
    both sides standardized over the batch, 1 - c_d is half the mean squared error of dimension d: form B punishes badly
    matched dimensions, form A badly matched entries. They are not interchangeable.

    Args:
        student: Projected student features, standardized with batch statistics.
        teacher: Teacher features, standardized with batch statistics.
        alpha: Exponent, above 0.

    Returns:
        The loss in float32.

    Raises:
        UsageError: shapes that differ, or an alpha that is not a positive finite number.
    """
    if not 0 < alpha < math.inf:
        raise UsageError(f"logsum_corr: expected a finite alpha above 0, got {alpha}. The authors' is 4.")
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return torch.log(_powers(1 - (student * teacher).mean(dim=0), alpha).sum() + 1e-5)


def logsum_per_sample(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0
) -> Float[Tensor, ""]:
    """The mean over patches of log sum_d |s_nd - t_nd|^alpha: not the paper's, every patch weighs the same.

    Args and raises as `logsum`.
    """
    if not 0 < alpha < math.inf:
        raise UsageError(f"logsum: expected a finite alpha above 0, got {alpha}. The paper's is 4.")
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return torch.log(_powers(student - teacher, alpha).sum(dim=1) + _LOG_FLOOR).mean()


def kl(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, temperature: float = 1.0) -> Float[Tensor, ""]:
    """KL divergence of softmax over the feature dimensions: Hinton et al. 2015 (arXiv 1503.02531), features for logits.

    T^2 mean_n sum_d p_nd log(p_nd / q_nd), p and q the softmax of teacher and student at temperature T; T^2 keeps the
    gradient's size (their section 2).

    Args:
        student: Projected student features.
        teacher: Teacher features.
        temperature: T, above 0.

    Returns:
        The loss in float32, at least 0.

    Raises:
        UsageError: shapes that differ, or a temperature not above 0.
    """
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return _divergence(student, teacher, temperature) * temperature**2


def kl_queue(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    *,
    bank: Float[Tensor, "k d"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """KL divergence of the softmax of cosine similarities to a bank of teacher features.

    SEED (Fang et al. 2021, arXiv 2101.04731, equations 3 to 5), as lightly's distillation uses it; the bank is drawn
    once from the whole store in place of a queue of recent batches.

    Args:
        student: Projected student features.
        teacher: Teacher features, in the bank's scale.
        bank: Teacher features of other patches.
        temperature: T, above 0.

    Returns:
        The loss in float32, at least 0.

    Raises:
        UsageError: shapes that differ, or a temperature not above 0.
    """
    student, teacher = _same_shape(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        keys = F.normalize(bank.float(), dim=1)
        s, t = (F.normalize(z, dim=1) @ keys.T for z in (student, teacher))
        return _divergence(s, t, temperature)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if not 0 < temperature < math.inf:
        raise UsageError(f"expected a finite temperature above 0, got {temperature}")
    q, p = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def rkd(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Relational knowledge distillation: distances between patches and angles among triples (Park et al., CVPR 2019).

    Their equations 5 to 10 with the weights of section 4: distance loss plus twice the angle loss, each the Huber loss
    of Girshick between student and teacher. Distances are divided by their mean over the batch.

    Args:
        student: Projected student features.
        teacher: Teacher features.

    Returns:
        The loss in float32, at least 0.

    Raises:
        UsageError: shapes that differ, or fewer than three rows, which have no angle.
    """
    student, teacher = _same_shape(student, teacher)
    if len(student) < 3:
        raise UsageError(f"rkd: expected a batch of at least 3 rows, got {len(student)}. Raise the batch size.")
    with torch.autocast(student.device.type, enabled=False):
        distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        return distance + 2 * F.smooth_l1_loss(_angles(student), _angles(teacher))


def _relative_distances(z: Tensor) -> Tensor:
    """Distances of all pairs over their mean, (n (n - 1) / 2,)."""
    found = F.pdist(z)
    return found / found.mean().clamp_min(_LOG_FLOOR)


def _angles(z: Tensor) -> Tensor:
    """Cosines of the angles at every patch between every two others, (n, n, n); 0 where two are the same."""
    directions = F.normalize(z[None] - z[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


LOSSES: Mapping[str, LossFn] = MappingProxyType(
    {
        "logsum": logsum,
        "logsum_corr": logsum_corr,
        "mse": mse,
        "smooth_l1": smooth_l1,
        "cosine": cosine,
        "kl": kl,
        "kl_queue": kl_queue,
        "rkd": rkd,
    }
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
