"""One loss of several teachers' losses, at every width of the student's features.

The projected student and the targets come as one array each, of which every teacher has its columns (`HeadLayout`). A
target that is missing is NaN: its teacher's loss ignores that patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from g2l_core.distillation.distiller import HeadLayout
from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.objective import Objective
from g2l_core.errors import UsageError

DROP = 0.5
"""The probability with which a teacher is left out of a patch's loss. UNIC's (arXiv 2408.05088)."""

RUNNING = 0.99
"""Decay of the running mean of a loss: a half-life of 69 batches."""

LOG_LOSSES = ("logsum", "logsum_corr")
"""Losses whose gradient does not change with the scale of their errors, since d log S = dS / S."""

ROWS = {"rkd": 3}
"""The fewest rows that a loss can be computed from; 2 for all others, which standardize over the batch."""


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How the losses of several teachers become one."""

    kind: str
    """One of `spec.BALANCES`."""
    weights: tuple[float, ...]
    """Of each teacher's loss."""
    masked: bool = False
    """Whether targets may be missing."""


class JointObjective(nn.Module):
    """The loss of several teachers, or at several widths, or both.

    With s_im the student's first m features as teacher i's projector of that width maps them, and L_i(s, t) the loss of
    teacher i's objective, L_i = mean_m L_i(s_im, t_i) over the widths: Matryoshka representation learning with equal
    importances (Kusupati et al. 2022, arXiv 2205.13147, equation 1), with a projector of its own for each width. Then

    - fixed: L = sum_i w_i f_i L_i / sum_i w_i f_i, with the weights w and the share f of the patches that have teacher
      i's target, which is 1 where none is missing.
    - running: as fixed, but each L_i is divided by the running mean r of |L_i|, this batch's included: over all ranks,
      r <- 0.99 r + 0.01 |L_i|, corrected for its start as r / (1 - 0.99^steps). So each teacher's loss is about 1, and
      its gradient relative to what is left to learn: the loss ratio of Groenendijk et al. 2021 (arXiv 2009.01717) with
      a decay. A Log-Sum loss is not divided, since the gradient of a logarithm is relative already.
    - dropping: UNIC's (Sariyildiz et al. 2024, arXiv 2408.05088, and their program): of each patch n the
      teacher with the largest loss l_in has the coefficient c_in = 1, every other has 0 with probability 1/2, else 1;
      L = sum_in c_in l_in / sum_in c_in.

    Args of the constructor:
        layout: Whose columns are whose.
        objectives: Of each teacher.
        balance: How they become one loss.
        group: The processes that train together.
    """

    def __init__(
        self,
        layout: HeadLayout,
        objectives: Sequence[Objective],
        balance: Balance,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.balance, self._group = layout, balance, group or ProcessGroup()
        self.objectives = nn.ModuleList(objectives)
        specs = [objective.spec for objective in objectives]
        if balance.kind == "dropping" and (without := [spec.loss for spec in specs if not spec.has_patch_losses]):
            raise UsageError(
                f"--balance dropping compares the losses of each patch, and {without[0]} has none: use mse, smooth_l1, "
                "cosine, kl or kl_queue, or logsum with --reduce per-sample"
            )
        self._is_relative = [spec.loss in LOG_LOSSES for spec in specs]
        if balance.kind == "running" and all(self._is_relative):
            raise UsageError(
                "--balance running changes nothing of Log-Sum losses, whose gradients are relative to their size "
                "already: use fixed, or another --loss"
            )
        if balance.kind == "running":
            self.register_buffer("running", torch.zeros(len(specs), dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(len(specs), dtype=torch.float64))
        self._logged: dict[str, Tensor] = {}

    def forward(self, projected: Float[Tensor, "n all"], targets: Float[Tensor, "n dims"]) -> Float[Tensor, ""]:
        """The loss in float32."""
        layout = self.layout
        parts = layout.split(projected)
        by_teacher = targets.split(list(layout.dims), dim=1)
        present = [~target[:, 0].isnan() for target in by_teacher] if self.balance.masked else [None] * len(by_teacher)
        if self.balance.kind == "dropping":
            loss = self._dropped(parts, by_teacher, present)
        else:
            loss = self._weighted(parts, by_teacher, present)
        # A projector that had no patch in this batch takes part with a gradient of zero: ranks wait for one of each.
        return loss + 0 * projected.float().sum() if self.balance.masked else loss

    def logged(self) -> dict[str, Tensor]:
        """Of the last batch: `loss_per_element` of all, `loss:TEACHER` and `share:TEACHER`, and `loss@WIDTH`.

        A teacher that no patch of the batch had is NaN.
        """
        return self._logged

    def _weighted(
        self, parts: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], present: Sequence[Tensor | None]
    ) -> Tensor:
        found = [self._losses(i, parts[i], targets[i], present[i]) for i in range(len(parts))]
        at_widths = torch.stack([losses for losses, _, _ in found])  # (teacher, width)
        offsets = torch.tensor([offset for _, offset, _ in found], device=at_widths.device)
        fractions = torch.tensor([fraction for _, _, fraction in found], device=at_widths.device)
        losses = at_widths.mean(dim=1)
        weights = fractions * torch.tensor(self.balance.weights, device=losses.device)
        shares = weights / weights.sum().clamp_min(1e-12)
        coefficients = shares / self._scales(losses, fractions) if self.balance.kind == "running" else shares
        self._log(at_widths - offsets[:, None], fractions, coefficients)
        return (coefficients * losses).sum()

    def _losses(
        self, i: int, parts: Sequence[Tensor], target: Tensor, present: Tensor | None
    ) -> tuple[Tensor, float, float]:
        """Teacher i's losses at each width, what makes them comparable, and the share of patches that have it."""
        objective = self.objectives[i]
        assert isinstance(objective, Objective)
        n = len(target)
        if present is not None and not bool(present.all()):
            parts, target = [part[present] for part in parts], target[present]
        if len(target) < ROWS.get(objective.spec.loss, 2):
            return torch.zeros(len(parts), device=target.device), 0.0, 0.0
        losses = torch.stack([objective(part, target) for part in parts])
        rows = len(target) * (self._group.world if objective.spec.reduce == "global" else 1)
        return losses, -objective.spec.comparable(0.0, rows, target.shape[1]), len(target) / n

    @torch.no_grad()
    def _scales(self, losses: Tensor, fractions: Tensor) -> Tensor:
        """The running mean of each loss, this batch included; 1 for losses that are relative already."""
        running, seen = self.get_buffer("running"), self.get_buffer("seen")
        for i, (loss, fraction) in enumerate(zip(losses.tolist(), fractions.tolist(), strict=True)):
            total, ranks = self._group.mean(abs(loss) * (fraction > 0)), self._group.mean(float(fraction > 0))
            if self.training and ranks:
                running[i] = RUNNING * running[i] + (1 - RUNNING) * total / ranks
                seen[i] += 1
        means = torch.where(seen > 0, running / (1 - RUNNING**seen), 1.0).clamp_min(1e-12)
        relative = torch.tensor(self._is_relative, device=means.device)
        return torch.where(relative, 1.0, means).to(losses.device, losses.dtype)

    def _dropped(
        self, parts: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], present: Sequence[Tensor | None]
    ) -> Tensor:
        at_widths = torch.stack([self._by_patch(i, parts[i], targets[i], present[i]) for i in range(len(parts))])
        losses = at_widths.mean(dim=1)  # (teacher, patch); NaN where the target is missing
        has = ~losses.isnan()
        kept = drop(losses.detach().nan_to_num(nan=float("-inf")), has)
        total = kept.sum().clamp_min(1)
        means = at_widths.nan_to_num().sum(dim=2) / has.sum(dim=1, keepdim=True).clamp_min(1)
        self._log(means, has.float().mean(dim=1), kept.sum(dim=1) / total)
        loss = torch.where(kept, losses, 0).sum() / total
        self._logged["loss_per_element"] = loss.detach()
        return loss

    def _by_patch(self, i: int, parts: Sequence[Tensor], target: Tensor, present: Tensor | None) -> Tensor:
        """Teacher i's loss of each patch, (width, patch); NaN where the target is missing."""
        objective = self.objectives[i]
        assert isinstance(objective, Objective)
        if present is None or bool(present.all()):
            return torch.stack([objective.by_patch(part, target) for part in parts])
        out = torch.full((len(parts), len(target)), float("nan"), device=target.device)
        if int(present.sum()) >= 2:
            found = torch.stack([objective.by_patch(part[present], target[present]) for part in parts])
            out = out.masked_scatter(present.expand_as(out), found)
        return out

    @torch.no_grad()
    def _log(self, comparable: Tensor, fractions: Tensor, shares: Tensor) -> None:
        """Keep what log.csv shows, from each teacher's comparable loss at each width and its share of the sum."""
        names, widths, has = self.layout.teachers, self.layout.widths, fractions > 0
        by_teacher = comparable.detach().mean(dim=1)
        self._logged = {"loss_per_element": (shares * by_teacher).sum()}
        if len(names) > 1:
            shown = torch.where(has, by_teacher, float("nan"))
            self._logged |= {f"loss:{name}": shown[i] for i, name in enumerate(names)}
        if len(names) > 1 and self.balance.kind != "fixed":
            shares = shares / shares.sum().clamp_min(1e-12)
            self._logged |= {f"share:{name}": shares[i] for i, name in enumerate(names)}
        if len(widths) > 1:
            by_width = comparable.detach()[has].mean(dim=0)
            self._logged |= {f"loss@{width}": by_width[m] for m, width in enumerate(widths)}


def drop(losses: Float[Tensor, "teacher n"], has: Bool[Tensor, "teacher n"]) -> Bool[Tensor, "teacher n"]:
    """Which teachers a patch keeps: the one with the largest loss, and every other with probability 1 - `DROP`.

    The draws come from torch's generator of the CPU, whose state a checkpoint holds.

    Args:
        losses: The loss of each teacher and patch; -inf where there is none.
        has: Where there is one.
    """
    kept = (torch.rand(losses.shape) >= DROP).to(losses.device)
    largest = torch.zeros_like(kept).scatter_(0, losses.argmax(dim=0, keepdim=True), True)
    return (kept | largest) & has
