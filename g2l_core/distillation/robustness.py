"""Terms beside the loss that make a student's features depend less on stain and on the center.

Both are taken of the student's own features, before any projector, on this rank's batch, and have no state.
"""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.joint import JointObjective
from g2l_core.distillation.losses import standardize
from g2l_core.distillation.objective import Objective
from g2l_core.distillation.spec import RobustnessSpec

FEWEST = 2
"""Rows of a center in a batch, without which its distance to others is not estimated."""


def stain_consistency(z: Float[Tensor, "n d"], twin: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """How far apart the features of two views of each patch are, relative to how far apart patches are.

    The mean over patches and dimensions of (a - b)^2 / 2, with a and b the features of both views, standardized
    together over their 2 n rows. It is the invariance term of VICReg (Bardes et al. 2022, arXiv 2105.04906, equation
    5) in units of each dimension's variance, and so the mean over dimensions of 1 - r, with the intraclass
    correlation r of the two views (Fisher 1925): 0 where views are alike, 1 where they have nothing in common.

    Args:
        z: Features of one view of each patch.
        twin: Features of the other view of the same patches.
    """
    a, b = standardize(torch.cat([z.float(), twin.float()])).chunk(2)
    return (a - b).square().mean() / 2


def center_mmd(z: Float[Tensor, "n d"], centers: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The squared maximum mean discrepancy between centers, averaged over all pairs of centers in the batch.

    Of x with m rows and y with n rows it is the unbiased estimate of Gretton et al. 2012 (J. Mach. Learn. Res. 13:
    723-773, equation 3), which can be below 0:

        sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1)) - 2 sum_ij k(x_i, y_j) / (m n)

    with k(a, b) = exp(-|a - b|^2 / (2 s^2)) and s the median distance of all rows that have a center (their median
    heuristic, section 8), through which no gradient flows. With it, the scale of the features does not matter.

    Args:
        z: Features.
        centers: The number of each row's center; NaN where it has none.

    Returns:
        The mean; NaN where fewer than two centers have two rows.
    """
    has = ~centers.isnan()
    z, centers = z.float()[has], centers[has]
    found, counts = torch.unique(centers, return_counts=True)
    masks = [centers == center for center in found[counts >= FEWEST]]
    if len(masks) < 2:
        return torch.full((), float("nan"), device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        z = z - z.mean(dim=0)  # distances stay, and cancel less below
        square = z.square().sum(dim=1)
        distance = (square[:, None] + square[None] - 2 * z @ z.T).clamp_min(0)
        above = torch.triu(torch.ones_like(distance, dtype=torch.bool), diagonal=1)
        scale = distance.detach()[above].median().clamp_min(1e-12)
        kernel = torch.exp(-distance / (2 * scale))
        kernel = kernel.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), 0)
    return torch.stack([_mmd(kernel, x, y) for x, y in combinations(masks, 2)]).mean()


def _mmd(kernel: Float[Tensor, "n n"], x: Tensor, y: Tensor) -> Float[Tensor, ""]:
    """The estimate from a kernel matrix without its diagonal, and from which rows are whose."""
    m, n = int(x.sum()), int(y.sum())
    within = kernel[x][:, x].sum() / (m * (m - 1)) + kernel[y][:, y].sum() / (n * (n - 1))
    return within - 2 * kernel[x][:, y].mean()


class RobustObjective(nn.Module):
    """A loss with terms beside it: L + w_s `stain_consistency` + w_c `center_mmd`.

    A batch without two centers of two rows each has no second term.

    Args of the constructor:
        inner: The loss L of projected features.
        spec: The weights.
        group: The processes that train together.
    """

    def __init__(
        self, inner: Objective | JointObjective, spec: RobustnessSpec, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.inner, self.spec, self._group = inner, spec, group or ProcessGroup()
        self._logged: dict[str, Tensor] = {}

    def forward(
        self, projected: Float[Tensor, "n all"], targets: Float[Tensor, "n columns"], features: Float[Tensor, "rows d"]
    ) -> Float[Tensor, ""]:
        """The loss in float32.

        Args:
            projected: Projected features of each patch's shown view.
            targets: The teachers' features of it; where there is a center's term, with the center's number behind.
            features: The student's features, each patch's views behind one another, the shown one first.
        """
        spec, centers = self.spec, targets[:, -1]
        if spec.center_weight:
            targets = targets[:, :-1]
        loss: Tensor = self.inner(projected, targets)
        logged = self.inner.logged() or {"loss_per_element": self._comparable(loss, targets)}
        by_view = features.float().unflatten(0, (len(targets), -1))
        if spec.stain_weight:
            term = stain_consistency(by_view[:, 0], by_view[:, 1])
            loss, logged = loss + spec.stain_weight * term, {**logged, "term:stain": term.detach()}
        if spec.center_weight:
            term = center_mmd(by_view[:, 0], centers)
            loss, logged = loss + spec.center_weight * term.nan_to_num(), {**logged, "term:center": term.detach()}
        self._logged = logged
        return loss

    def _comparable(self, loss: Tensor, targets: Tensor) -> Tensor:
        """One teacher's loss as a value that does not grow with the batch."""
        assert isinstance(self.inner, Objective)
        spec = self.inner.spec
        rows = len(targets) * (self._group.world if spec.reduce == "global" else 1)
        return loss.detach() + spec.comparable(0.0, rows, targets.shape[1])

    def logged(self) -> dict[str, Tensor]:
        """Of the last batch: what the loss itself logs, `loss_per_element` among it, then the terms, not weighted."""
        return self._logged
