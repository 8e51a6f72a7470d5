"""The network that is trained: student, projector, and optionally a moving average of their weights."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.errors import EncoderError, UnknownNameError

PROJECTORS = ("linear", "mlp")


class Distiller(nn.Module):
    """The student and the projector W_p on top of it. The projector is dropped after training (paper, 4)."""

    def __init__(
        self, student: PatchEncoder, student_dim: int, teacher_dim: int, seed: int, projector: str = "linear"
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = build_projector(projector, student_dim, teacher_dim, seed)

    def forward(self, pixels: Tensor) -> Float[Tensor, "batch dim"]:
        """Projected features, in the teacher's space, before any normalization."""
        return self.projector(self.student(pixels))


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
    if kind not in PROJECTORS:
        raise UnknownNameError("projector", kind, PROJECTORS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
