"""What a distillation minimizes: how both sides are normalized, which loss, and how it is reduced over ranks.

Teacher and student are normalized alike or not at all. Batch statistics on one side only give a perfect student a loss:
against targets standardized by the whole store, mean d^2 is 0.047 at a batch of 32, since the batch's own sampling
noise no longer cancels.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.losses import logsum_per_sample, loss_by_name, standardize
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
    bank: Float[Tensor, "k dim"] | None = None
    """Teacher features of random patches, not normalized."""


class Objective(nn.Module):
    """The loss of projected student features against stored teacher features, on this rank's batch."""

    def __init__(
        self, spec: ObjectiveSpec, statistics: TargetStatistics | None = None, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.spec, self._group = spec, group or ProcessGroup()
        if (spec.needs_statistics or spec.needs_bank) and statistics is None:
            raise UsageError(f"the loss {spec.loss} with teacher-norm dataset needs the targets' statistics")
        for name in ("mean", "deviation", "bank"):
            self.register_buffer(name, getattr(statistics, name) if statistics else None, persistent=False)

    def forward(self, student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """The loss in float32. Its gradient averaged over ranks is the gradient of the loss as `reduce` defines it.

        A loss computed from gathered rows is the same on every rank, and every rank sends its gradient to the ranks
        that the rows came from: `world` times in all. The mean over ranks of data-parallel training undoes that.
        """
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
        return self._loss(s, t)

    def _normalized(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        match self.spec.norms[1]:
            case "batch":
                return standardize(student), standardize(teacher)
            case "dataset":
                return student, self._to_dataset_scale(teacher)
            case _:
                return student, teacher

    def _to_dataset_scale(self, teacher: Tensor) -> Tensor:
        return (teacher - self.get_buffer("mean")) / self.get_buffer("deviation")

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        spec = self.spec
        if spec.reduce == "per-sample":
            return logsum_per_sample(student, teacher, alpha=spec.alpha)
        options: dict[str, object] = {}
        if spec.loss in ALPHA_LOSSES:
            options["alpha"] = spec.alpha
        if spec.loss in TEMPERATURES:
            options["temperature"] = spec.temperature or TEMPERATURES[spec.loss]
        if spec.needs_bank:
            bank = self.get_buffer("bank")
            options["bank"] = self._to_dataset_scale(bank) if spec.needs_statistics else bank
        return loss_by_name(spec.loss)(student, teacher, **options)
