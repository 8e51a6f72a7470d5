"""How the stages run, as plain values that the command line is made from. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from g2l_core.distillation.spec import TrainSettings
from g2l_core.distillation.trackers import AUTO, parse_trackers
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.options import DATA, ENCODER, MACHINE, OUTPUT, PATCHES, SLIDES, TRAINING, option
from g2l_core.patches.spec import ViewSpec

KEPT = ("last", "best")
CANONICAL = "canonical"
"""The word for the canonical view alone, where a number of augmented views is asked for."""
BASELINES = ("simclr", "supervised", "start", "pca")

TRUST_CODE = "A module that may run although a file names it: a store, run folder, spec file, recipe; repeatable."


def parse_views(text: str) -> int | str:
    """The views to replay as a user writes them: a number, or `canonical`.

    Raises:
        UsageError: It is neither.
    """
    if text == CANONICAL or text.isdecimal():
        return text if text == CANONICAL else int(text)
    raise UsageError(f"--views {text}: expected the number of the last augmented view, or {CANONICAL}")


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


def require_stained_views(views: ViewSpec, settings: ExtractionSettings) -> None:
    """Refuse stain jitter that no view would have.

    Raises:
        UsageError: There are fewer than two augmented views.
    """
    if views.stain_jitter and settings.views < 2:
        raise UsageError(
            f"--stain-jitter {views.stain_jitter:g} changes views 2, 4, ..., and there are {settings.views} augmented "
            "ones: give --views 2 or more, or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class SpoolSettings:
    """How a store at an address is written."""

    spool: Path | None = option(
        None,
        panel=MACHINE,
        help="For a --store at an address: the folder here that slides are finished in, before each is sent; in "
        "~/.cache/g2l/spool if not given.",
    )
    keep_spool: bool = option(
        False, panel=MACHINE, help="Keep the features in the spool that are at the address already."
    )
    take_lock: bool = option(
        False, panel=MACHINE, help="Take over the lock at the address of a command elsewhere that was killed."
    )


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything that decides the student, except store, teacher and student."""

    train: TrainSettings
    batch_size: int = option(32, min=2, panel=TRAINING, help="Patches a step and rank.")
    pool_blocks: int = option(256, min=1, panel=DATA, help="Blocks of 64 patches that batches are drawn from.")
    where: tuple[str, ...] = option((), panel=DATA, help="Use only slides with COLUMN=PATTERN; repeatable.")
    hold_out: str = option("0.1", panel=DATA, help="Fraction of the patients to validate on, or COLUMN=PATTERN.")
    slides: int | None = option(None, min=1, panel=DATA, help="Train on so many slides; all if not given.")
    views: int | str | None = option(
        None,
        parse=parse_views,
        panel=DATA,
        help="Replay views 1 to this; all that are stored if not given; canonical, as of imported features, the "
        "canonical one alone; 0, with --online, new ones every epoch.",
    )
    online: bool = option(
        False, panel=DATA, help="Run the teacher on every batch in place of reading its features, for comparison."
    )
    precision: str = option("auto", panel=MACHINE, help="Precision of the student: auto (fp32), fp32 or bf16.")
    compile: bool = option(False, panel=MACHINE, help="Compile the student: faster steps on a GPU, a minute to start.")
    keep: str = option("last", panel=TRAINING, help="Which weights the student gets: last, or best by held-out CKA.")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.keep not in KEPT:
            raise UnknownNameError("weights to keep", self.keep, KEPT)
        if isinstance(self.views, int) and self.views < (0 if self.online else 1):
            raise UsageError("--views must be at least 1; 0, new views every epoch, needs --online")
        if self.online and self.train.teachers.missing == "mask":
            raise UsageError("a live teacher misses no targets: leave --missing-targets mask out")
        if self.online and any(part.needs_statistics or part.needs_bank for part in self.train.objective.parts):
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

    restart: bool = option(False, help="Begin anew, and remove the run that is in --out.")
    resume: bool = option(
        False, help="Go on with the run in --out, as is done in any case; only so that older scripts stay as they are."
    )
    permissive: bool = option(
        False, help="Refuse teachers, a start or slides whose terms would keep the student from being free for any use."
    )
    trust_code: tuple[str, ...] = option((), panel=ENCODER, help=TRUST_CODE)
    log_to: tuple[str, ...] = option(
        (AUTO,),
        panel=OUTPUT,
        parse=parse_trackers,
        help="Who gets the metric values beside the run folder: some of tensorboard, wandb, mlflow, with commas; or "
        "none. auto is tensorboard where it is installed.",
    )
    device: str = option("auto", panel=MACHINE, help="auto, cpu or cuda.")
    workers: int = option(2, min=1, panel=MACHINE, help="Threads that read and augment.")
    targets_gb: float = option(4.0, panel=MACHINE, help="Targets of up to so many GB are held in memory.")
    pixel_cache: Path | None = option(None, panel=MACHINE, help="Keep decoded patches in this fast local folder.")
    pixel_cache_gb: float = option(50.0, panel=MACHINE, help="Maximum GB of decoded patches.")

    def __post_init__(self) -> None:
        """Refuse to go on and to begin anew."""
        if self.restart and self.resume:
            raise UsageError("--restart begins anew, --resume goes on: give one of them")


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """What a baseline learns from in place of a teacher."""

    kind: str = option(
        "simclr",
        help="simclr (NT-Xent of two views), supervised (cross-entropy on --label), start (the student's start, "
        "untouched) or pca (principal components of the teacher's features).",
    )
    label: str = option("", help="Column of the store's labels that supervised learns.")
    temperature: float | None = option(None, help="Temperature of simclr; 0.1 if not given.")
    width: int | None = option(None, min=1, help="Components of pca; as many as the student has features if not given.")
    lr: float | None = option(None, help="Learning rate, in place of the run's.")

    def __post_init__(self) -> None:
        """Refuse a kind that is not known, and settings of another one."""
        if self.kind not in BASELINES:
            raise UnknownNameError("kind of baseline", self.kind, BASELINES)
        if self.kind == "supervised" and not self.label:
            raise UsageError("--kind supervised: expected the column of the labels, as in --label tissue")
        for name, kinds in (("label", ("supervised",)), ("temperature", ("simclr",)), ("width", ("pca",)),
                            ("lr", ("simclr", "supervised"))):  # fmt: skip
            if getattr(self, name) and self.kind not in kinds:
                raise UsageError(f"--{name} is for --kind {' or '.join(kinds)}: leave it out of {self.kind}")
        if (self.temperature is not None and self.temperature <= 0) or (self.lr is not None and self.lr <= 0):
            raise UsageError(f"expected a temperature and a learning rate above 0, not {self.temperature}, {self.lr}")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo can be asked to do differently."""

    teacher: str = option("efficientnet-lite0@128", help="The teacher.")
    student: str = option("timm:mobilenetv3_small_100@128", help="The student, untrained.")
    steps: int = option(400, min=20, help="Steps of distillation.")
    mpp_override: float | None = option(None, help="um/px of slides whose header and manifest give none.")
    seed: int = option(0, help="Random seed.")
    workers: int = option(2, min=1, help="Threads that read and augment.")


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What a view shows. Its bounds keep the page at a few MB whatever the store."""

    encoder: str = option("", help="Whose features; the store's first if not given.")
    slides: int = option(24, min=1, help="Slides that are shown, drawn by the seed if there are more.")
    patches: int = option(400, min=0, help="Patches that can be clicked, drawn from all slides shown; 0 for none.")
    seed: int = option(0, help="Random seed.")

    def __post_init__(self) -> None:
        """Refuse pages that are too large to be sent."""
        for name, most in (("slides", 100), ("patches", 2000)):
            if getattr(self, name) > most:
                raise UsageError(f"--{name} {getattr(self, name)}: at most {most}, so that the page can be sent")
