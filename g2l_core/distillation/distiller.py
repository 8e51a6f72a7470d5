"""The network that is trained: student, projector, and optionally a moving average of their weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.errors import EncoderError, UnknownNameError, UsageError

PROJECTORS = ("linear", "mlp")


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Which projectors there are, and where their outputs lie behind one another: teacher by teacher, then by width."""

    teachers: tuple[str, ...]
    """The teachers' keys."""
    dims: tuple[int, ...]
    """The width of each teacher's features."""
    widths: tuple[int, ...]
    """How many of the student's first features are projected, increasing; the last is all of them."""

    @property
    def is_single(self) -> bool:
        """Whether there is one projector, as in the paper."""
        return len(self.teachers) == len(self.widths) == 1

    def split(self, projected: Float[Tensor, "n all"]) -> list[tuple[Tensor, ...]]:
        """Each teacher's projected features at each width."""
        n = len(self.widths)
        parts = projected.split([dim for dim in self.dims for _ in range(n)], dim=1)
        return [parts[i * n : (i + 1) * n] for i in range(len(self.dims))]


def head_layout(teachers: Sequence[str], dims: Sequence[int], nested: Sequence[int], student_dim: int) -> HeadLayout:
    """The layout of a run. All of the student's features are always among the widths.

    Args:
        teachers: The teachers' keys.
        dims: The width of each teacher's features.
        nested: Widths at which the student shall do too.
        student_dim: Dimensions of the student's features.

    Raises:
        UsageError: A width is larger than the student's features are.
    """
    if nested and max(nested) > student_dim:
        raise UsageError(
            f"--nested: a width of {max(nested)} is more than the {student_dim} features of the student: leave it out"
        )
    return HeadLayout(teachers=tuple(teachers), dims=tuple(dims), widths=tuple(sorted({*nested, student_dim})))


class Distiller(nn.Module):
    """The student and the projector W_p on top of it. The projector is dropped after training (paper, 4)."""

    def __init__(
        self,
        student: PatchEncoder,
        student_dim: int,
        teacher_dim: int | HeadLayout,
        seed: int,
        projector: str = "linear",
    ) -> None:
        super().__init__()
        self.student = student
        if isinstance(teacher_dim, HeadLayout) and not teacher_dim.is_single:
            self.projector: nn.Module = Projectors(teacher_dim, projector, seed)
        else:
            dim = teacher_dim.dims[0] if isinstance(teacher_dim, HeadLayout) else teacher_dim
            self.projector = build_projector(projector, student_dim, dim, seed)

    def forward(self, pixels: Tensor) -> Float[Tensor, "batch dim"]:
        """Projected features, in the teacher's space, before any normalization; of several, one behind the other."""
        return self.projector(self.student(pixels))


class Projectors(nn.Module):
    """A projector for every teacher and width.

    Each width has its own, which is what Kusupati et al. 2022 (arXiv 2205.13147) do with their classifiers. Their other
    way is one map of which each width uses the first columns. It has fewer weights, but the best map from the first
    features is not a part of the best map from all of them unless features are uncorrelated, so that it would
    constrain the student; and as projectors are dropped, their weights cost nothing later.
    """

    def __init__(self, layout: HeadLayout, kind: str, seed: int) -> None:
        super().__init__()
        self.layout = layout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                new_projector(kind, width, dim) for dim in layout.dims for width in layout.widths
            )

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch all"]:
        """All projected features, in the order of the layout."""
        widths = self.layout.widths * len(self.layout.dims)
        return torch.cat([head(features[:, :width]) for head, width in zip(self.heads, widths, strict=True)], dim=1)


def build_projector(kind: str, student_dim: int, teacher_dim: int, seed: int) -> nn.Module:
    """Build W_p.

    Args:
        kind: linear, the paper's, is one linear map. mlp is two, with GELU between them and the teacher's width.
        student_dim: Dimensions of the student's features.
        teacher_dim: Dimensions of the teacher's features.
        seed: Random seed of the initial weights.

    Raises:
        UnknownNameError: There is no such projector.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_projector(kind, student_dim, teacher_dim)


def new_projector(kind: str, student_dim: int, teacher_dim: int) -> nn.Module:
    """A projector as `build_projector` makes it, with initial weights from torch's generator."""
    if kind not in PROJECTORS:
        raise UnknownNameError("projector", kind, PROJECTORS)
    if kind == "linear":
        return _initialized(nn.Linear(student_dim, teacher_dim))
    first, second = nn.Linear(student_dim, teacher_dim), nn.Linear(teacher_dim, teacher_dim)
    return nn.Sequential(_initialized(first), nn.GELU(), _initialized(second))


def _initialized(layer: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def checkpoint_gradients(student: PatchEncoder) -> None:
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients.

    Raises:
        EncoderError: The architecture does not support it.
    """
    enable = getattr(student.network, "set_grad_checkpointing", None)
    if enable is None:
        raise EncoderError("this student's architecture has no gradient checkpointing; leave the option out")
    enable(True)


class Average:
    """An exponential moving average of a network's weights. Buffers are copied from the network, not averaged."""

    def __init__(self, network: Distiller, decay: float) -> None:
        self.decay = decay
        self.network: Distiller = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update from the network: average = decay average + (1 - decay) weight."""
        for average, weight in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(weight, 1 - self.decay)
        for copied, latest in zip(self.network.buffers(), network.buffers(), strict=True):
            copied.copy_(latest)
