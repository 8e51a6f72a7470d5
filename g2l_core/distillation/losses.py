"""Distillation losses: pure functions (student, teacher) -> scalar, computed in float32 whatever the autocast.

The default is the Log-Sum loss of Miles & Mikolajczyk (AAAI 2024, arXiv 2303.11098), as used by G2L
(arXiv 2510.11176): projected student and teacher features are first standardized with the batch's own statistics.

In the formulas s and t are the projected student's and the teacher's features, both of shape (n, d): n patches (rows,
indexed by n) of d dimensions (indexed by d). Every loss is a float32 scalar, and raises a UsageError if the two shapes
differ, because broadcasting would turn a wrong shape into a wrong loss.
"""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from g2l_core.distillation.spec import PATCH_LOSSES
from g2l_core.errors import UnknownNameError, UsageError

LossFn: TypeAlias = Callable[..., Tensor]
"""(student (n, d), teacher (n, d)) -> scalar; some also take `alpha`, `temperature` or `bank`."""

AnyLoss = TypeVar("AnyLoss", bound=LossFn)

# Keeps log and 1 / sum finite for a perfect student. At a mean error of only 0.01 standard deviations (alpha 4,
# 32 x 1536 entries) the sum is 1.5e-3, so this moves the loss by less than 1e-9.
_LOG_FLOOR = 1e-12
# |d|^alpha has no derivative at 0 where alpha < 1; an entry below this size gives no gradient.
_ENTRY_FLOOR = 1e-12


def _loss(function: AnyLoss) -> AnyLoss:
    """Make a function a loss: it gets student and teacher of one shape in float32, with autocast off."""

    @wraps(function)
    def loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        if student.shape != teacher.shape:
            raise UsageError(
                f"loss: expected student and teacher of one shape, got {tuple(student.shape)} and"
                f" {tuple(teacher.shape)}. Project the student to the teacher's dimension."
            )
        with torch.autocast(student.device.type, enabled=False):
            return function(student.float(), teacher.float(), **options)

    return cast(AnyLoss, loss)


def standardize(z: Float[Tensor, "n d"], eps: float = 1e-5) -> Float[Tensor, "n d"]:
    """Center and scale each dimension with the batch's own statistics: BatchNorm without affine part.

    (z - mean) / sqrt(variance + eps), with the biased variance over the batch. The reference applies it to the
    projected student and to the teacher alike, in training mode. Use batch statistics on both sides or on neither: a
    perfect student otherwise has a loss, the batch's sampling noise.

    Args:
        z: Features of one batch, (n, d), of any floating dtype.
        eps: Added to the variance. A dimension that is constant over the batch becomes 0 (to rounding).

    Returns:
        The standardized features in float32, (n, d).

    Raises:
        UsageError: The batch has fewer than two rows, so it has no variance.

    Example:
        >>> standardize(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """
    if len(z) < 2:
        raise UsageError(
            f"standardize: expected a batch of at least 2 rows, got {len(z)}. Raise the batch size, or drop the last"
            " incomplete batch."
        )
    with torch.autocast(z.device.type, enabled=False):
        return F.batch_norm(z.float(), None, None, training=True, eps=eps)


@_loss
def logsum(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0) -> Float[Tensor, ""]:
    """Log-Sum loss, form A: L = log sum_nd |s_nd - t_nd|^alpha.

    One logarithm over batch and dimensions together, no mean (arXiv 2303.11098, equation of D(Z_s, Z_t; W_p); the
    authors' ImageNet code). So L grows with log(n d); `ObjectiveSpec.comparable` takes that away for logs. The gradient
    is alpha d |d|^(alpha - 2) / sum, with d = s_nd - t_nd. Where student and teacher agree entirely, L is log 1e-12 and
    the gradient is 0.

    Args:
        student: Projected student features, already standardized, (n, d).
        teacher: Teacher features, already standardized, (n, d).
        alpha: Exponent, above 0. A larger one weighs the worst entries more.

    Returns:
        The loss, a float32 scalar.

    Raises:
        UsageError: The shapes differ, or alpha is not a positive finite number.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> logsum(student, teacher)  # log(1 + 16 + 0 + 81)
        tensor(4.5850)
        >>> logsum(student, teacher, alpha=2.0)  # log(1 + 4 + 0 + 9)
        tensor(2.6391)
    """
    return torch.log(_powers(student - teacher, alpha).sum() + _LOG_FLOOR)


@_loss
def logsum_corr(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0
) -> Float[Tensor, ""]:
    """Log-Sum loss, form B: L = log(sum_d |1 - c_d|^alpha + 1e-5) with c_d = mean_n s_nd t_nd.

    The authors' transformer code (roymiles/Simple-Recipe-Distillation, deit/; the exponent and 1e-5 are theirs). With
    both sides standardized over the batch, 1 - c_d is half the mean squared error of dimension d: form B punishes badly
    matched dimensions, form A badly matched entries. They are not interchangeable.

    Args:
        student: Projected student features, standardized with batch statistics, (n, d).
        teacher: Teacher features, standardized with batch statistics, (n, d).
        alpha: Exponent, above 0.

    Returns:
        The loss, a float32 scalar.

    Raises:
        UsageError: The shapes differ, or alpha is not a positive finite number.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> logsum_corr(student, teacher)  # correlations 1 and -1: log(0^4 + 2^4)
        tensor(2.7726)
    """
    return torch.log(_powers(1 - (student * teacher).mean(dim=0), alpha).sum() + 1e-5)


@_loss
def logsum_per_sample(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, alpha: float = 4.0
) -> Float[Tensor, ""]:
    """Log-Sum loss of each patch: L = mean_n log sum_d |s_nd - t_nd|^alpha.

    This is not the paper's (arXiv 2303.11098): every patch weighs the same here, however large its error.

    Args:
        student: Projected student features, already standardized, (n, d).
        teacher: Teacher features, already standardized, (n, d).
        alpha: Exponent, above 0.

    Returns:
        The loss, a float32 scalar.

    Raises:
        UsageError: The shapes differ, or alpha is not a positive finite number.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> logsum_per_sample(student, teacher)  # (log 17 + log 81) / 2
        tensor(3.6138)
    """
    return torch.log(_powers(student - teacher, alpha).sum(dim=1) + _LOG_FLOOR).mean()


def _powers(difference: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, "*shape"]:
    """|difference|^alpha, elementwise."""
    if not 0 < alpha < math.inf:
        raise UsageError(f"expected a finite alpha above 0, got {alpha}. The paper's is 4.")
    if alpha == 4:
        squared = difference * difference  # exact and fast where pow is neither
        return squared * squared
    return difference.abs().clamp_min(_ENTRY_FLOOR).pow(alpha)


@_loss
def mse(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared error: L = mean_nd (s_nd - t_nd)^2, as `torch.nn.functional.mse_loss`.

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, (n, d).

    Returns:
        The loss, a float32 scalar.

    Raises:
        UsageError: The shapes differ.

    Example:
        >>> mse(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 2.0]]))  # (1 + 4) / 2
        tensor(2.5000)
    """
    return F.mse_loss(student, teacher)


@_loss
def smooth_l1(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Smooth L1 loss: L = mean_nd h(s_nd - t_nd) with h(x) = x^2 / 2 where |x| < 1, else |x| - 1/2.

    Girshick, ICCV 2015 (arXiv 1504.08083), equation 3.

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, (n, d).

    Returns:
        The loss, a float32 scalar.

    Raises:
        UsageError: The shapes differ.

    Example:
        >>> smooth_l1(torch.tensor([[3.0, 0.5]]), torch.tensor([[1.0, 0.0]]))  # (1.5 + 0.125) / 2
        tensor(0.8125)
    """
    return F.smooth_l1_loss(student, teacher)


@_loss
def cosine(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Cosine distance of each row, averaged: L = 1 - mean_n <s_n, t_n> / (|s_n| |t_n|).

    The cosine is that of `torch.nn.functional.cosine_similarity`.

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, (n, d).

    Returns:
        The loss, a float32 scalar in [0, 2].

    Raises:
        UsageError: The shapes differ.

    Example:
        >>> cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))  # 1 - 24 / 25
        tensor(0.0400)
    """
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


@_loss
def kl(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], *, temperature: float = 1.0) -> Float[Tensor, ""]:
    """KL divergence of softmax over the dimensions: L = T^2 mean_n sum_d p_nd log(p_nd / q_nd).

    Hinton et al. 2015 (arXiv 1503.02531), with features for logits: p = softmax(t / T) and q = softmax(s / T). The
    factor T^2 keeps the gradient's size (their section 2).

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, (n, d).
        temperature: T, above 0.

    Returns:
        The loss, a float32 scalar of at least 0.

    Raises:
        UsageError: The shapes differ, or the temperature is not above 0.

    Example:
        >>> teacher = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/4, 3/4
        >>> kl(torch.zeros(1, 2), teacher)  # 1/4 log(1/2) + 3/4 log(3/2)
        tensor(0.1308)
    """
    return _divergence(student, teacher, temperature) * temperature**2


@_loss
def kl_queue(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    *,
    bank: Float[Tensor, "k d"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """KL divergence of softmax over a bank's rows: L = mean_n sum_k p_nk log(p_nk / q_nk).

    p_n = softmax_k(cos(t_n, b_k) / T) and q_n = softmax_k(cos(s_n, b_k) / T). SEED (Fang et al. 2021, arXiv 2101.04731,
    equations 3 to 5), as lightly's distillation uses it; the bank is drawn once from the whole store in place of a
    queue of recent batches.

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, in the bank's scale, (n, d).
        bank: b, teacher features of other patches, (k, d).
        temperature: T, above 0.

    Returns:
        The loss, a float32 scalar of at least 0.

    Raises:
        UsageError: The shapes differ, or the temperature is not above 0.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> kl_queue(student, teacher, bank=torch.eye(2), temperature=1.0)
        tensor(0.1109)
    """
    keys = F.normalize(bank.float(), dim=1)
    s, t = (F.normalize(z, dim=1) @ keys.T for z in (student, teacher))
    return _divergence(s, t, temperature)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if not 0 < temperature < math.inf:
        raise UsageError(f"expected a finite temperature above 0, got {temperature}")
    q, p = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@_loss
def rkd(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Relational knowledge distillation: distances between patches, and angles among triples of patches.

    L = mean_ij h(D(s)_ij - D(t)_ij) + 2 mean_ijk h(A(s)_ijk - A(t)_ijk), with h as in `smooth_l1`. D_ij is the distance
    of patches i and j over the mean of all distances, A_ijk the cosine of the angle at patch i between j and k. Park et
    al., CVPR 2019 (arXiv 1904.05068), equations 5 to 10 with the weights of section 4. As there, pairs and triples are
    of different patches. The authors' program, and torchdistill after it, divide by n^2 and n^3 instead, so that their
    terms are (n - 1) / n and (n - 1) (n - 2) / n^2 times these.

    Args:
        student: Projected student features, (n, d).
        teacher: Teacher features, (n, d).

    Returns:
        The loss, a float32 scalar of at least 0.

    Raises:
        UsageError: The shapes differ, or there are fewer than three rows, which have no angle.

    Example:
        >>> triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> bool(rkd(10 * triangle + 1, triangle) < 1e-6)  # neither shift nor scale matters
        True
        >>> rkd(torch.tensor([[0.0, 0.0], [3.0, 0.0], [6.0, 0.0]]), triangle)
        tensor(1.1633)
    """
    if len(student) < 3:
        raise UsageError(f"rkd: expected a batch of at least 3 rows, got {len(student)}. Raise the batch size.")
    distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
    n = len(student)
    angle = F.smooth_l1_loss(_angles(student), _angles(teacher)) * n**2 / ((n - 1) * (n - 2))
    return distance + 2 * angle


def _relative_distances(z: Tensor) -> Tensor:
    """Distances of all pairs over their mean, (n (n - 1) / 2,)."""
    distances = F.pdist(z)
    return distances / distances.mean().clamp_min(_LOG_FLOOR)


def _angles(z: Tensor) -> Tensor:
    """Cosines of the angles at every patch between every two others, (n, n, n); 0 where two are the same."""
    directions = F.normalize(z[None] - z[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def losses_by_patch(
    name: str,
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    *,
    alpha: float = 4.0,
    temperature: float = 1.0,
    bank: Float[Tensor, "k d"] | None = None,
) -> Float[Tensor, " n"]:
    """The loss of each patch, for losses that are means over patches: the mean of these is the loss.

    Args:
        name: One of `spec.PATCH_LOSSES`; or logsum, of which this is the form of `logsum_per_sample`.
        student: Projected student features, float32, (n, d).
        teacher: Teacher features, float32, (n, d).
        alpha: As for `logsum`.
        temperature: As for `kl` and `kl_queue`.
        bank: As for `kl_queue`.

    Raises:
        UnknownNameError: The loss is no mean over patches.
    """
    with torch.autocast(student.device.type, enabled=False):
        match name:
            case "mse":
                return (student - teacher).square().mean(dim=1)
            case "smooth_l1":
                return F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=1)
            case "cosine":
                return 1 - F.cosine_similarity(student, teacher, dim=1)
            case "logsum":
                return torch.log(_powers(student - teacher, alpha).sum(dim=1) + _LOG_FLOOR)
            case "kl":
                return _divergences(student, teacher, temperature) * temperature**2
            case "kl_queue" if bank is not None:
                keys = F.normalize(bank.float(), dim=1)
                s, t = (F.normalize(z, dim=1) @ keys.T for z in (student, teacher))
                return _divergences(s, t, temperature)
    raise UnknownNameError("loss of single patches", name, PATCH_LOSSES)


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


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
        name: A name of the table.

    Returns:
        The loss function.

    Raises:
        UnknownNameError: The name is not in the table. The message suggests the nearest.

    Example:
        >>> loss_by_name("mse") is mse
        True
    """
    if name not in LOSSES:
        raise UnknownNameError("loss", name, LOSSES)
    return LOSSES[name]
