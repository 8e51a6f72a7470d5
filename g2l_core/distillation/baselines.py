"""What baselines without a teacher minimize: NT-Xent of two views (SimCLR), and cross-entropy on labels."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from g2l_core.distillation.joint import JointObjective
from g2l_core.distillation.objective import Objective
from g2l_core.distillation.robustness import RobustObjective

CONTRAST_DIM = 128
"""Features behind SimCLR's head, as in the paper."""


def nt_xent(z: Float[Tensor, "rows dim"], temperature: float) -> Float[Tensor, ""]:
    """The normalized temperature-scaled cross-entropy of pairs of views (Chen et al. 2020, arXiv 2002.05709, eq. 1).

    With the cosine s_ij of rows i and j, and p(i) the other view of row i's patch, it is the mean over rows of
    -log(exp(s_ip(i) / t) / sum_{k != i} exp(s_ik / t)). All rows of other patches are negatives.

    Args:
        z: Features of two views of each patch, one behind the other: rows 2i and 2i + 1 are a pair. float32.
        temperature: t, above 0.

    Returns:
        The loss: log(rows - 1) where all rows are alike, about 0 where pairs are alike and all else is opposite.
    """
    unit = functional.normalize(z, dim=1)
    similarity = unit @ unit.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    pairs = torch.arange(len(z), device=z.device) ^ 1
    return functional.cross_entropy(similarity, pairs)


def contrast_head(dim: int, seed: int) -> nn.Module:
    """SimCLR's head: one hidden layer as wide as the features, ReLU, then `CONTRAST_DIM` (paper, section 2.1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, CONTRAST_DIM))


class BaselineObjective(nn.Module):
    """The loss of a baseline, on this rank's batch: negatives are those of the rank."""

    def __init__(self, kind: str, temperature: float) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature
        self._last = torch.zeros(())

    def forward(self, projected: Float[Tensor, "rows dim"], targets: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """NT-Xent of the head's outputs; or cross-entropy of logits, where targets are (n, 1) numbers of classes."""
        if self.kind == "simclr":
            loss = nt_xent(projected.float(), self.temperature)
        else:
            loss = functional.cross_entropy(projected.float(), targets[:, 0].long())
        self._last = loss.detach()
        return loss

    def logged(self) -> dict[str, Tensor]:
        """The loss, which is a mean over rows already."""
        return {"loss_per_element": self._last}


Minimized: TypeAlias = Objective | JointObjective | RobustObjective | BaselineObjective
"""What a training loop can minimize."""
