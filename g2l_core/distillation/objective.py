"""What a distillation minimizes: how both sides are normalized, which loss, and how it is reduced over ranks.

Teacher and student are normalized alike or not at all. Batch statistics on one side only give a perfect student a loss:
against targets standardized by the whole store, mean d^2 is 0.047 at a batch of 32, since the batch's own sampling
noise no longer cancels.
"""

from dataclasses import dataclass
from math import log
from typing import Any

from jaxtyping import Float
from torch import Tensor, autocast, nn

from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.losses import logsum_per_sample, loss_by_name, losses_by_patch, standardize
from g2l_core.distillation.spec import ALPHA_LOSSES, TEMPERATURES, ObjectiveSpec
from g2l_core.errors import UsageError

BANK_ROWS = 8192
"""Teacher features that `kl_queue` compares with."""


@dataclass(frozen=True, kw_only=True)
class TargetStatistics:
    """Statistics of the teacher's features over all training patches and replayed views, or over a sample of them."""

    mean: Float[Tensor, " dim"]
    deviation: Float[Tensor, " dim"]
    """At least 1e-3 of the largest: a dimension that is dead in the teacher must not explode."""
    phi_s: Float[Tensor, "dim dim"] | None = None
    """The matrix of `phi_s.phi_s_matrix`, where it is asked for."""
    bank: Float[Tensor, "k dim"] | None = None
    """Teacher features of random patches, not normalized."""

    def restored(self, targets: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Features from what PHI-S made of them: mu + M^T y / |m|^2, to 1e-5 in float32.

        Raises:
            UsageError: There is no such matrix.
        """
        if self.phi_s is None:
            raise UsageError("these statistics have no matrix of PHI-S")
        matrix = self.phi_s.double()
        back = targets.double() @ matrix / matrix[0].square().sum() + self.mean.double()
        return back.to(targets.dtype)


class Objective(nn.Module):
    """The loss of projected student features against stored teacher features, on this rank's batch."""

    def __init__(
        self, spec: ObjectiveSpec, statistics: TargetStatistics | None = None, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.spec, self._group = spec, group or ProcessGroup()
        if (spec.needs_statistics or spec.needs_bank) and statistics is None:
            raise UsageError(f"the loss {spec.loss} with teacher-norm {spec.norms[1]} needs the targets' statistics")
        for name in ("mean", "deviation", "phi_s", "bank"):
            self.register_buffer(name, getattr(statistics, name) if statistics else None, persistent=False)

    def forward(self, student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """The loss in float32. Its gradient averaged over ranks is the gradient of the loss as `reduce` defines it.

        A loss computed from gathered rows is the same on every rank, and every rank sends its gradient to the ranks
        that the rows came from: `world` times in all. The mean over ranks of data-parallel training undoes that.
        """
        return self._loss(*self._compared(student, teacher))

    def by_patch(self, student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The loss of each patch of this rank, as a value that compares across widths; their mean is the loss.

        The loss must be one that `ObjectiveSpec.has_patch_losses` allows.
        """
        s, t = self._compared(student, teacher)
        found = losses_by_patch(self.spec.loss, s, t, **self._options())
        return found - log(s.shape[1]) if self.spec.loss == "logsum" else found

    def _compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides as the loss compares them: normalized, and of the ranks that it is taken over."""
        spec, group = self.spec, self._group
        s, t = student.float(), teacher.float()
        all_ranks = spec.batch_statistics == "global" and spec.norms[1] == "batch"
        if all_ranks:
            s, t = group.gather(s), group.gather(t)
        s, t = self._normalized(s, t)
        if spec.reduce == "global" and not all_ranks:
            s, t = group.gather(s), group.gather(t)
        elif spec.reduce != "global" and all_ranks:
            s, t = group.local(s), group.local(t)
        return s, t

    def logged(self) -> dict[str, Tensor]:
        """What a row of log.csv has beside the loss: nothing for one teacher."""
        return {}

    def _normalized(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        match self.spec.norms[1]:
            case "batch":
                return standardize(student), standardize(teacher)
            case "dataset" | "phi-s":
                return student, self._to_dataset_scale(teacher)
            case _:
                return student, teacher

    def _to_dataset_scale(self, teacher: Tensor) -> Tensor:
        centered = teacher - self.get_buffer("mean")
        if self.spec.norms[1] == "phi-s":
            with autocast(centered.device.type, enabled=False):
                return centered @ self.get_buffer("phi_s").T
        return centered / self.get_buffer("deviation")

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        spec = self.spec
        if spec.reduce == "per-sample":
            return logsum_per_sample(student, teacher, alpha=spec.alpha)
        return loss_by_name(spec.loss)(student, teacher, **self._options())

    def _options(self) -> dict[str, Any]:
        """What the loss takes beside student and teacher."""
        spec, options = self.spec, dict[str, Any]()
        if spec.loss in ALPHA_LOSSES:
            options["alpha"] = spec.alpha
        if spec.loss in TEMPERATURES:
            options["temperature"] = spec.temperature or TEMPERATURES[spec.loss]
        if spec.needs_bank:
            bank = self.get_buffer("bank")
            options["bank"] = self._to_dataset_scale(bank) if spec.needs_statistics else bank
        return options
