"""What decides a distillation, as plain values: loss, optimizer, training. Imports no torch, for quick help pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, log

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.options import DATA, LOSS, MACHINE, OPTIMIZER, TRAINING, option

LOSSES = ("logsum", "logsum_corr", "mse", "smooth_l1", "cosine", "kl", "kl_queue", "rkd")
"""The names of `losses.LOSSES`."""

TEACHER_NORMS = ("auto", "batch", "dataset", "phi-s", "none")
STUDENT_NORMS = ("auto", "batch", "none")
REDUCTIONS = ("global", "per-rank", "per-sample")
STATISTICS = ("per-rank", "global")
ALPHA_LOSSES = ("logsum", "logsum_corr")
"""The losses that `alpha` changes."""

PATCH_LOSSES = ("mse", "smooth_l1", "cosine", "kl", "kl_queue")
"""The losses that are means over patches, so that each patch has its own; logsum is one with reduce = per-sample."""

BALANCES = ("fixed", "running", "dropping")
MISSING = ("refuse", "mask")

TEMPERATURES = {"kl": 1.0, "kl_queue": 0.07}
"""The losses that a temperature changes, with the one that they take where none is given."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """The loss and all that it is computed from. Defaults are the paper's (arXiv 2510.11176)."""

    loss: str = option(
        "logsum",
        panel=LOSS,
        help="logsum, logsum_corr, mse, smooth_l1, cosine, kl, kl_queue or rkd. Of several teachers, one for all, or "
        "TEACHER=LOSS by comma beside it, as in logsum,uni=mse.",
    )
    alpha: float = option(4.0, panel=LOSS, help="Exponent of the Log-Sum losses.")
    temperature: float | None = option(
        None, panel=LOSS, help="Temperature of kl (1 if not given) and kl_queue (0.07 if not given)."
    )
    teacher_norm: str = option(
        "auto",
        panel=LOSS,
        help="How targets are standardized: over the batch, over the dataset (the store's training patches), by phi-s "
        "(over the dataset too, by a rotation and one scale), or none. auto is batch, but dataset for kl_queue, whose "
        "bank has no batch.",
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
        if self.is_of_several:
            self._check_several()
            return
        for name, known in (
            ("loss", LOSSES), ("teacher_norm", TEACHER_NORMS), ("student_norm", STUDENT_NORMS),
            ("reduce", REDUCTIONS), ("batch_statistics", STATISTICS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UnknownNameError(name.replace("_", "-"), getattr(self, name), known)
        self._check_numbers()
        self._check_norms()

    def _check_several(self) -> None:
        used = {part.loss for part in self.parts}
        if self.temperature is not None and not used & set(TEMPERATURES):
            raise UsageError(f"a temperature is for {', '.join(TEMPERATURES)}, which --loss {self.loss} has not")

    @property
    def is_of_several(self) -> bool:
        """Whether the loss is a text of losses for several teachers. Only `with_loss` gives one to compute with."""
        return "=" in self.loss or "," in self.loss

    def losses_by_teacher(self) -> tuple[Mapping[str, str], str | None]:
        """The losses that `loss` gives to teachers by their names, and the one for all others; None where it has none.

        Raises:
            UsageError: A teacher has two, or there are two for all others.
        """
        named: dict[str, str] = {}
        rest: list[str] = []
        for part in (part.strip() for part in self.loss.split(",")):
            teacher, equals, loss = part.rpartition("=")
            if equals and teacher.strip() in named:
                raise UsageError(f"--loss {self.loss} gives {teacher.strip()} two losses: leave one out")
            if equals:
                named[teacher.strip()] = loss.strip()
            else:
                rest.append(part)
        if len(rest) > 1:
            raise UsageError(
                f"--loss {self.loss}: expected one loss for all teachers that it does not name, not "
                f"{' and '.join(rest)}"
            )
        return named, rest[0] if rest else None

    @property
    def parts(self) -> tuple["ObjectiveSpec", ...]:
        """The objectives that it stands for: itself, or one for each loss that a teacher may have."""
        if not self.is_of_several:
            return (self,)
        named, rest = self.losses_by_teacher()
        return tuple(self.with_loss(loss) for loss in dict.fromkeys([*filter(None, (rest,)), *named.values()]))

    def with_loss(self, loss: str) -> "ObjectiveSpec":
        """The objective of one teacher among several: with this loss, and the temperature if that has one.

        Raises:
            UsageError: The other settings do not fit the loss.
        """
        return replace(self, loss=loss, temperature=self.temperature if loss in TEMPERATURES else None)

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
        return self.norms[1] in {"dataset", "phi-s"}

    @property
    def has_patch_losses(self) -> bool:
        """Whether the loss is a mean over patches, so that each patch has one of its own."""
        return self.loss in PATCH_LOSSES or self.reduce == "per-sample"

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
class TeachersSpec:
    """How the losses of several teachers become one, see `joint.JointObjective`."""

    weights: tuple[str, ...] = option(
        (),
        panel=LOSS,
        name="teacher_weight",
        help="How much a teacher's loss counts among several, as TEACHER=NUMBER; 1 if not given; repeatable.",
    )
    balance: str = option(
        "fixed",
        panel=LOSS,
        help="How several teachers' losses are balanced: fixed, by their weights; running, each over its running mean; "
        "dropping, of each patch the teacher with the largest loss stays and others are left out half of the time.",
    )
    missing: str = option(
        "refuse",
        panel=DATA,
        name="missing_targets",
        help="Slides without one of several teachers' features: refuse them, or mask that teacher's loss there.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that are unknown or contradict each other."""
        for name, known in (("balance", BALANCES), ("missing", MISSING)):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        if self.weights and self.balance == "dropping":
            raise UsageError("dropping compares losses patch by patch and has no weights: leave --teacher-weight out")
        self.weight_by_teacher()

    def weight_by_teacher(self) -> dict[str, float]:
        """The weights by the names that the user gave.

        Raises:
            UsageError: One is no TEACHER=NUMBER above 0, or a teacher has two.
        """
        found: dict[str, float] = {}
        for text in self.weights:
            teacher, _, number = text.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = 0.0
            if not teacher.strip() or not 0 < weight < inf:
                raise UsageError(
                    f"--teacher-weight {text}: expected TEACHER=NUMBER with a number above 0, as in uni=0.5"
                )
            if teacher.strip() in found:
                raise UsageError(f"--teacher-weight gives {teacher.strip()} two weights: leave one out")
            found[teacher.strip()] = weight
        return found


def read_widths(text: str) -> tuple[int, ...]:
    """The widths in a text such as 64,128,256; none of "none".

    Raises:
        UsageError: A part is no whole number.
    """
    parts = [] if text.strip() in {"", "none"} else [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise UsageError(f"--nested {text}: expected whole numbers by comma, as in 64,128,256, not {wrong[0]!r}")
    return tuple(map(int, parts))


@dataclass(frozen=True, kw_only=True)
class RobustnessSpec:
    """Terms beside the loss that make features depend less on stain and center, see `robustness`."""

    stain_weight: float = option(
        0.0,
        min=0,
        panel=LOSS,
        help="Weight of a term that pulls together views of a patch that differ only in stain; the store must be made "
        "with --stain-jitter.",
    )
    center_weight: float = option(
        0.0,
        min=0,
        panel=LOSS,
        help="Weight of a term that pulls together the features of different centers (maximum mean discrepancy).",
    )
    center_label: str = option(
        "medical_center", panel=LOSS, help="Column of the store's labels that names a slide's or patch's center."
    )

    def __post_init__(self) -> None:
        """Refuse weights that are none, and a column that nothing reads."""
        if not (0 <= self.stain_weight < inf and 0 <= self.center_weight < inf):
            raise UsageError(
                "expected --stain-weight and --center-weight of at least 0, not "
                f"{self.stain_weight} and {self.center_weight}"
            )
        if self.center_label != RobustnessSpec.center_label and not self.center_weight:
            raise UsageError(f"--center-label {self.center_label} is for --center-weight: give that, or leave it out")


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
    teachers: TeachersSpec = field(default_factory=TeachersSpec)
    robustness: RobustnessSpec = field(default_factory=RobustnessSpec)
    nested: tuple[int, ...] = option(
        (),
        panel=LOSS,
        parse=read_widths,
        help="Widths, as 64,128,256: the student's first so many features alone shall do too (Matryoshka).",
    )
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
        self._check_nested()
        objective = self.objective
        is_global = "global" in {objective.reduce, objective.batch_statistics}
        if is_global and (self.teachers.missing == "mask" or self.teachers.balance == "dropping"):
            raise UsageError(
                "masked and dropped targets leave ranks with different numbers of rows, which global statistics and "
                "reductions cannot join: use --reduce and --batch-statistics per-rank"
            )

    def _check_nested(self) -> None:
        twice = sorted({width for width in self.nested if self.nested.count(width) > 1})
        if twice:
            raise UsageError(f"--nested names the width {twice[0]} twice: leave one out")
        if self.nested and min(self.nested) < 1:
            raise UsageError(f"--nested: expected widths of at least 1, not {min(self.nested)}")
