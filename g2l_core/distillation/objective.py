"""What a distillation minimizes: how both sides are normalized, which loss, and how it is reduced over ranks.

Teacher and student are normalized alike or not at all. Batch statistics on one side only give a perfect student a loss:
against targets standardized by the whole store, mean d^2 is 0.047 at a batch of 32, since the batch's own sampling
noise no longer cancels.
"""

from dataclasses import dataclass
from math import inf, log

from jaxtyping import Float
from torch import Tensor, nn

from g2l_core.distillation.distributed import Ranks
from g2l_core.distillation.losses import logsum_per_sample, loss_by_name, standardize
from g2l_core.errors import UnknownNameError, UsageError

TEACHER_NORMS = ("auto", "batch", "dataset", "none")
STUDENT_NORMS = ("auto", "batch", "none")
REDUCTIONS = ("global", "per-rank", "per-sample")
STATISTICS = ("per-rank", "global")
BANK_ROWS = 8192
_WITH_ALPHA = {"logsum", "logsum_corr"}
_WITH_TEMPERATURE = {"kl": 1.0, "kl_queue": 0.07}


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """The loss and all that it is computed from. Defaults are the paper's (arXiv 2510.11176)."""

    loss: str = "logsum"
    alpha: float = 4.0
    """Exponent of the Log-Sum losses."""
    temperature: float | None = None
    """Of `kl` (1 where None) and `kl_queue` (0.07)."""
    teacher_norm: str = "auto"
    """batch: standardized over the batch; dataset: over the training patches of the store; none. auto is batch, but
    dataset for kl_queue, whose bank has no batch."""
    student_norm: str = "auto"
    """batch or none; auto follows the teacher."""
    reduce: str = "per-rank"
    """How the Log-Sum loss of several ranks becomes one: the mean of each rank's (the authors' way), one logarithm over
    all of them, or, on any number of ranks, one logarithm a patch."""
    batch_statistics: str = "per-rank"
    """Whether a batch's mean and variance are a rank's own (the authors' way) or all ranks'."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, or means nothing."""
        loss_by_name(self.loss)
        for field_name, known in (
            ("teacher_norm", TEACHER_NORMS), ("student_norm", STUDENT_NORMS), ("reduce", REDUCTIONS),
            ("batch_statistics", STATISTICS),
        ):  # fmt: skip
            if getattr(self, field_name) not in known:
                raise UnknownNameError(field_name.replace("_", "-"), getattr(self, field_name), known)
        self._check_numbers()
        self._check_norms()

    def _check_numbers(self) -> None:
        if not 0 < self.alpha < inf:
            raise UsageError(f"expected a finite alpha above 0, got {self.alpha}. The paper's is 4")
        if self.temperature is not None and (self.loss not in _WITH_TEMPERATURE or not 0 < self.temperature < inf):
            raise UsageError(f"a temperature is for {', '.join(_WITH_TEMPERATURE)} and must be above 0")
        if self.reduce == "per-sample" and self.loss != "logsum":
            raise UsageError(f"reduce = per-sample is a form of the logsum loss; {self.loss} has none")

    def _check_norms(self) -> None:
        student, teacher = self.norms
        if (student == "batch") != (teacher == "batch"):
            raise UsageError(
                f"batch statistics on one side only (teacher {teacher}, student {student}): a perfect student would "
                "still have a loss, the batch's sampling noise. Use batch on both, or dataset or none with student none"
            )
        if self.loss == "logsum_corr" and teacher != "batch":
            raise UsageError("logsum_corr correlates standardized features: it needs teacher-norm batch")
        if self.loss == "kl_queue" and teacher == "batch":
            raise UsageError(
                "kl_queue compares with a bank that has no batch statistics: use teacher-norm dataset or none"
            )

    @property
    def norms(self) -> tuple[str, str]:
        """(student's, teacher's) normalization, auto resolved."""
        teacher = (
            ("dataset" if self.loss == "kl_queue" else "batch") if self.teacher_norm == "auto" else self.teacher_norm
        )
        student = ("batch" if teacher == "batch" else "none") if self.student_norm == "auto" else self.student_norm
        return student, teacher

    @property
    def needs_statistics(self) -> bool:
        """Whether the training targets' mean and deviation must be known."""
        return self.norms[1] == "dataset"

    @property
    def needs_bank(self) -> bool:
        """Whether a bank of teacher features must be drawn."""
        return self.loss == "kl_queue"

    def comparable(self, loss: float, n: int, dim: int) -> float:
        """The loss as a figure that does not grow with the batch: the log of a mean in place of a sum."""
        match self.loss:
            case "logsum":
                return loss - log(dim) if self.reduce == "per-sample" else loss - log(n * dim)
            case "logsum_corr":
                return loss - log(dim)
            case _:
                return loss


@dataclass(frozen=True, kw_only=True)
class TargetStatistics:
    """Of the teacher's features over all training patches and replayed views, or of a sample of them."""

    mean: Float[Tensor, " dim"]
    deviation: Float[Tensor, " dim"]
    """At least 1e-3 of the largest: a dimension that is dead in the teacher must not explode."""
    bank: Float[Tensor, "k dim"] | None = None
    """Teacher features of random patches, not normalized."""


class Objective(nn.Module):
    """The loss of projected student features against stored teacher features, on this rank's batch."""

    def __init__(
        self, spec: ObjectiveSpec, statistics: TargetStatistics | None = None, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        self.spec, self._ranks = spec, ranks or Ranks()
        if (spec.needs_statistics or spec.needs_bank) and statistics is None:
            raise UsageError(f"the loss {spec.loss} with teacher-norm dataset needs the targets' statistics")
        for name in ("mean", "deviation", "bank"):
            self.register_buffer(name, getattr(statistics, name) if statistics else None, persistent=False)

    def forward(self, student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """The loss, in float32. Averaged over ranks its gradient is that of the loss as `reduce` defines it.

        A loss computed from gathered rows is the same on every rank and each rank's gradient of it reaches the rows'
        own ranks, `world` times in all; the mean over ranks that data-parallel training takes undoes that.
        """
        spec, ranks = self.spec, self._ranks
        s, t = student.float(), teacher.float()
        everywhere = spec.batch_statistics == "global" and spec.norms[1] == "batch"
        if everywhere:
            s, t = ranks.gather(s), ranks.gather(t)
        s, t = self._normalized(s, t)
        if spec.reduce == "global" and not everywhere:
            s, t = ranks.gather(s), ranks.gather(t)
        elif spec.reduce != "global" and everywhere:
            s, t = ranks.own(s), ranks.own(t)
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
        if spec.loss in _WITH_ALPHA:
            options["alpha"] = spec.alpha
        if spec.loss in _WITH_TEMPERATURE:
            options["temperature"] = spec.temperature or _WITH_TEMPERATURE[spec.loss]
        if spec.needs_bank:
            bank = self.get_buffer("bank")
            options["bank"] = self._to_dataset_scale(bank) if spec.needs_statistics else bank
        return loss_by_name(spec.loss)(student, teacher, **options)
