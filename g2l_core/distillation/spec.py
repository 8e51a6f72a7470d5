"""What decides a distillation, as plain values: loss, optimizer, training. Imports no torch, for quick help pages."""

from dataclasses import dataclass, field
from math import inf, log

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.options import LOSS, MACHINE, OPTIMIZER, TRAINING, option

LOSSES = ("logsum", "logsum_corr", "mse", "smooth_l1", "cosine", "kl", "kl_queue", "rkd")
"""The names of `losses.LOSSES`."""

TEACHER_NORMS = ("auto", "batch", "dataset", "none")
STUDENT_NORMS = ("auto", "batch", "none")
REDUCTIONS = ("global", "per-rank", "per-sample")
STATISTICS = ("per-rank", "global")
ALPHA_LOSSES = ("logsum", "logsum_corr")
"""The losses that `alpha` changes."""

TEMPERATURES = {"kl": 1.0, "kl_queue": 0.07}
"""The losses that a temperature changes, with the one that they take where none is given."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """The loss and all that it is computed from. Defaults are the paper's (arXiv 2510.11176)."""

    loss: str = option("logsum", panel=LOSS, help="logsum, logsum_corr, mse, smooth_l1, cosine, kl, kl_queue or rkd.")
    alpha: float = option(4.0, panel=LOSS, help="Exponent of the Log-Sum losses.")
    temperature: float | None = option(
        None, panel=LOSS, help="Temperature of kl (1 if not given) and kl_queue (0.07 if not given)."
    )
    teacher_norm: str = option(
        "auto",
        panel=LOSS,
        help="How targets are standardized: over the batch, over the dataset (the store's training patches), or none. "
        "auto is batch, but dataset for kl_queue, whose bank has no batch.",
    )
    student_norm: str = option(
        "auto", panel=LOSS, help="How the student's features are standardized: batch or none. auto follows the teacher."
    )
    reduce: str = option(
        "per-rank",
        panel=LOSS,
        help="How the Log-Sum losses of several ranks become one: per-rank is the mean of each rank's, global is one "
        "logarithm over all of them, per-sample is one logarithm a patch on any number of ranks.",
    )
    batch_statistics: str = option(
        "per-rank", panel=LOSS, help="Whether a batch's mean and variance are per-rank or global, over all ranks."
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot be computed or contradict each other."""
        for name, known in (
            ("loss", LOSSES), ("teacher_norm", TEACHER_NORMS), ("student_norm", STUDENT_NORMS),
            ("reduce", REDUCTIONS), ("batch_statistics", STATISTICS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UnknownNameError(name.replace("_", "-"), getattr(self, name), known)
        self._check_numbers()
        self._check_norms()

    def _check_numbers(self) -> None:
        if not 0 < self.alpha < inf:
            raise UsageError(f"expected a finite alpha above 0, got {self.alpha}. The paper's is 4")
        if self.temperature is not None and (self.loss not in TEMPERATURES or not 0 < self.temperature < inf):
            raise UsageError(f"a temperature is for {', '.join(TEMPERATURES)} and must be above 0")
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
        """The loss as a value that does not grow with the batch: the log of a mean in place of a sum."""
        match self.loss:
            case "logsum":
                return loss - log(dim) if self.reduce == "per-sample" else loss - log(n * dim)
            case "logsum_corr":
                return loss - log(dim)
            case _:
                return loss


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW and its schedule. Defaults are the paper's (arXiv 2510.11176, method 6 and 7); the rest is off."""

    lr: float = option(1e-4, panel=OPTIMIZER, help="Learning rate at the start; cosine-annealed.")
    weight_decay: float = option(0.05, panel=OPTIMIZER, help="Weight decay at the start; cosine-annealed.")
    warmup: int = option(0, min=0, panel=OPTIMIZER, help="Steps over which the learning rate rises to --lr, linearly.")
    clip: float = option(0.0, min=0, panel=OPTIMIZER, help="Largest norm of all gradients together; 0 clips nothing.")
    accumulate: int = option(1, min=1, panel=OPTIMIZER, help="Batches whose gradients make one step.")
    layer_decay: float = option(
        1.0,
        panel=OPTIMIZER,
        help="Each block's learning rate is this fraction of the next one's (BEiT, arXiv 2106.08254).",
    )
    ema: float = option(
        0.0,
        panel=OPTIMIZER,
        help="Decay of a moving average of the weights, which is then what is validated and kept; 0 keeps none.",
    )
    early_stop_patience: int = option(
        10,
        min=0,
        panel=TRAINING,
        name="early_stop",
        help="Stop after more than this many steps in a row with a loss above the mean of the steps before; 0 never "
        "stops early.",
    )
    early_stop_window: int = option(100, min=1, panel=TRAINING, help="Steps that this mean is taken over.")

    def __post_init__(self) -> None:
        """Refuse values that cannot run."""
        if self.lr <= 0 or self.weight_decay < 0:
            raise UsageError(f"expected lr > 0 and weight decay >= 0, not {self.lr} and {self.weight_decay}")
        if self.warmup < 0 or self.clip < 0 or self.accumulate < 1:
            raise UsageError("expected warmup >= 0, clip >= 0 and accumulate >= 1")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.ema < 1:
            raise UsageError(f"expected 0 < layer decay <= 1 and 0 <= ema < 1, not {self.layer_decay} and {self.ema}")
        if self.early_stop_window < 1 or self.early_stop_patience < 0:
            raise UsageError("expected early-stop window >= 1 and patience >= 0")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the student is trained."""

    steps: int
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    projector: str = option("linear", panel=LOSS, help="Maps the student's features to the teacher's: linear or mlp.")
    grad_checkpoint: bool = option(
        False, panel=MACHINE, help="Recompute activations in the backward pass: less memory, slower."
    )
    validate_every: int = option(200, min=1, panel=TRAINING, help="Steps between validations.")
    checkpoint_every: int = option(200, min=1, panel=TRAINING, help="Steps between checkpoints.")
    best_by: str = option(
        "cka_debiased",
        panel=TRAINING,
        recipe_only=True,
        help="The held-out metric whose highest value marks the best checkpoint.",
    )
    seed: int = option(0, panel=TRAINING, help="Random seed.")

    def __post_init__(self) -> None:
        """Refuse a loop that cannot run."""
        if self.steps < 1 or self.validate_every < 1 or self.checkpoint_every < 1:
            raise UsageError("steps, validate_every and checkpoint_every must be at least 1")
