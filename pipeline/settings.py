"""How the stages run, as plain values that the command line is made from. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from g2l_core.distillation.spec import TrainSettings
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.options import DATA, ENCODER, MACHINE, OUTPUT, PATCHES, SLIDES, TRAINING, option

KEPT = ("last", "best")

TRUST_CODE = "A module that may run although a file names it: a store, run folder, spec file, recipe; repeatable."


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How stage one runs. None of it changes the features, except for the precision and compilation."""

    views: int = option(2, min=0, panel=PATCHES, help="Augmented views of each patch, beside the canonical one.")
    mpp_override: float | None = option(None, panel=SLIDES, help="um/px of slides whose header and manifest give none.")
    accept_mpp: bool = option(False, panel=SLIDES, help="Go on with um/px that the audit calls doubtful.")
    force_mpp: bool = option(
        False, panel=ENCODER, help="Encode patches at a scale that the encoder's card does not name."
    )
    precision: str = option(
        "auto", panel=ENCODER, help="auto (fp32 on CPU, the model card's on GPU), fp32, bf16 or fp16."
    )
    runtime: str = option(
        "auto",
        panel=ENCODER,
        help="What runs the student of a folder RUN: torch; or onnx or openvino, which run RUN-onnx or RUN-openvino of "
        "g2l export-student. auto is torch, and an exported folder's own runtime.",
    )
    compile: bool = option(False, panel=ENCODER, help="Compile the network: faster on a GPU, half a minute to start.")
    batch_size: int = option(32, min=1, panel=ENCODER, help="Views encoded together.")
    trust_code: tuple[str, ...] = option((), panel=ENCODER, help=TRUST_CODE)
    device: str = option("auto", panel=MACHINE, help="auto, cpu or cuda.")
    workers: int = option(2, min=1, panel=MACHINE, help="Threads that read and augment.")
    local_workers: int = option(
        0, min=0, panel=MACHINE, help="Processes on this machine that share the encoding; 0 encodes in this one."
    )
    scheduler: str | None = option(
        None, panel=MACHINE, help="Address of a dask scheduler whose workers share the encoding."
    )
    stage_dir: Path | None = option(None, panel=MACHINE, help="Copy the next slides to this fast local folder ahead.")
    stage_gb: float = option(50.0, min=0.001, panel=MACHINE, help="Maximum GB (1e9 bytes) of such copies at a time.")
    pictures: bool = option(
        True, panel=OUTPUT, help="Draw each slide's tissue and kept patches, and write GeoJSON, beside the store."
    )
    slide_timeout: float | None = option(
        None,
        min=0.001,
        panel=SLIDES,
        help="Seconds after which a slide fails if opening it, its tissue, or 64 patches take longer; none by default.",
    )
    retry_failed: bool = option(
        False, panel=SLIDES, help="Process only slides that failed and patches that could not be read."
    )

    def __post_init__(self) -> None:
        """Refuse two ways to share the encoding."""
        if self.local_workers and self.scheduler:
            raise UsageError(
                "--local-workers starts processes here, --scheduler uses those of others: give one of them"
            )

    @property
    def encoder_precision(self) -> str:
        """Precision and compilation in one word, as encoders and their digests have it."""
        return self.precision + "+compile" if self.compile else self.precision


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything that decides the student, except store, teacher and student."""

    train: TrainSettings
    batch_size: int = option(32, min=2, panel=TRAINING, help="Patches a step and rank.")
    pool_blocks: int = option(256, min=1, panel=DATA, help="Blocks of 64 patches that batches are drawn from.")
    where: tuple[str, ...] = option((), panel=DATA, help="Use only slides with COLUMN=PATTERN; repeatable.")
    hold_out: str = option("0.1", panel=DATA, help="Fraction of the patients to validate on, or COLUMN=PATTERN.")
    slides: int | None = option(None, min=1, panel=DATA, help="Train on so many slides; all if not given.")
    views: int | None = option(
        None,
        min=0,
        panel=DATA,
        help="Replay views 1 to this; all that are stored if not given; 0, with --online, new ones every epoch.",
    )
    online: bool = option(
        False, panel=DATA, help="Run the teacher on every batch in place of reading its features, for comparison."
    )
    precision: str = option("auto", panel=MACHINE, help="Precision of the student: auto (fp32), fp32 or bf16.")
    keep: str = option("last", panel=TRAINING, help="Which weights the student gets: last, or best by held-out CKA.")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.keep not in KEPT:
            raise UnknownNameError("weights to keep", self.keep, KEPT)
        if self.views is not None and self.views < (0 if self.online else 1):
            raise UsageError("--views must be at least 1; 0, new views every epoch, needs --online")
        if self.online and (self.train.objective.needs_statistics or self.train.objective.needs_bank):
            raise UsageError(
                "a live teacher has no stored targets to take statistics or a bank from: use teacher-norm batch"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What recipes, sweeps and the command line can say about a distillation."""

    epochs: int = option(10, min=1, panel=TRAINING, help="Passes over the training patches.")
    steps: int | None = option(None, min=1, panel=TRAINING, help="Steps, in place of --epochs.")
    settings: DistillSettings


@dataclass(frozen=True, kw_only=True)
class DistillHow:
    """How stage two runs. None of it changes the student, except for the device."""

    resume: bool = option(False, help="Go on with the run in --out.")
    trust_code: tuple[str, ...] = option((), panel=ENCODER, help=TRUST_CODE)
    device: str = option("auto", panel=MACHINE, help="auto, cpu or cuda.")
    workers: int = option(2, min=1, panel=MACHINE, help="Threads that read and augment.")
    targets_gb: float = option(4.0, panel=MACHINE, help="Targets of up to so many GB are held in memory.")
    pixel_cache: Path | None = option(None, panel=MACHINE, help="Keep decoded patches in this fast local folder.")
    pixel_cache_gb: float = option(50.0, panel=MACHINE, help="Maximum GB of decoded patches.")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo can be asked to do differently."""

    teacher: str = option("efficientnet-lite0@128", help="The teacher.")
    student: str = option("timm:mobilenetv3_small_100@128", help="The student, untrained.")
    steps: int = option(400, min=20, help="Steps of distillation.")
    mpp_override: float | None = option(None, help="um/px of slides whose header and manifest give none.")
    seed: int = option(0, help="Random seed.")
    workers: int = option(2, min=1, help="Threads that read and augment.")
