"""The gate of converted students: how near an exported network's features are to the student's, and what suffices."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Shaped, UInt8

from g2l_core.errors import EncoderError, UsageError

MIN_COSINE = 0.99
"""Least cosine of a patch's features in an exported network to those of the student, in float32 in torch."""

MIN_PATCHES, MIN_SLIDES = 256, 3
"""Fewest held-out patches, and slides that they come from, on which an 8-bit network is judged."""

MAX_PROBE_LOSS = 0.01
"""Most that a probe on exported features may lose of its balanced accuracy."""

DOUBTFUL_CENTERED_COSINE = 0.95
"""Least cosine without the mean feature below which an export that no probe has judged is called doubtful."""

MAX_PROBABILITY_CHANGE = 0.01
"""Most that an exported classifier's probability of a class may differ from the head's."""

Encode = Callable[[UInt8[np.ndarray, "n height width 3"]], Float32[np.ndarray, "n dim"]]


@dataclass(frozen=True, kw_only=True)
class ProbeLoss:
    """What a probe gives on the student's features, and on the exported network's."""

    task: str
    metric: str
    patches: int
    student: float
    exported: float


@dataclass(frozen=True, kw_only=True)
class HeldOutPatches:
    """Patches that an export is judged on."""

    pixels: UInt8[np.ndarray, "n height width 3"]
    slides: Shaped[np.ndarray, " n"]
    """The slide of each."""
    origin: str
    """Where they come from, in words."""
    calibration: UInt8[np.ndarray, "m height width 3"]
    """Patches of other slides, from which 8-bit networks take their scales."""
    probe: Callable[[Encode, Encode], ProbeLoss] | None = None
    """Compares a probe on the features of the student with one on those of the exported network."""

    def require_enough(self) -> None:
        """Refuse too few patches to judge an 8-bit network by.

        Raises:
            UsageError: The message has the numbers.
        """
        slides = len(np.unique(self.slides))
        if len(self.pixels) < MIN_PATCHES or slides < MIN_SLIDES:
            raise UsageError(
                f"8-bit forms are judged on at least {MIN_PATCHES} patches of {MIN_SLIDES} slides that the student was "
                f"not trained on; there are {len(self.pixels):,} of {slides} ({self.origin}). Give --store with more "
                "held-out slides, such as another cohort, or export onnx or openvino"
            )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near an exported network is to its student."""

    patches: int
    slides: int
    origin: str
    min_cosine: float
    median_cosine: float
    min_centered_cosine: float
    """The least cosine after the student's mean feature is taken from both, which is what differs between patches."""
    probe: ProbeLoss | None = None

    @property
    def refusal(self) -> str:
        """Why the gate does not let the network pass; empty if it does."""
        reasons = []
        if not self.min_cosine >= MIN_COSINE:
            reasons.append(
                f"its features have a cosine of {self.min_cosine:.4f} at least and {self.median_cosine:.4f} at the "
                f"median to the student's; at least {MIN_COSINE} is wanted of every patch"
            )
        if self.probe is not None and not self.probe.student - self.probe.exported <= MAX_PROBE_LOSS:
            lost = self.probe
            reasons.append(
                f"a probe of {lost.task} falls from {lost.student:.4f} to {lost.exported:.4f} in {lost.metric}; at "
                f"most {MAX_PROBE_LOSS} may be lost"
            )
        return " and ".join(reasons)

    @property
    def doubt(self) -> str:
        """What the gate cannot see without a probe; empty if there is no doubt."""
        if self.probe is not None or self.min_centered_cosine >= DOUBTFUL_CENTERED_COSINE:
            return ""
        return (
            f"without the mean of all features, which patches have in common, the least cosine is "
            f"{self.min_centered_cosine:.3f}: judge it by a task, with --tasks"
        )

    def require_near(self, form: str) -> None:
        """Refuse a network whose features are not the student's.

        Raises:
            EncoderError: The message has the figures.
        """
        if self.refusal:
            raise EncoderError(
                f"the {form} export is refused: on {self.patches:,} patches of {self.slides} slides ({self.origin}) "
                f"{self.refusal}. Nothing is written; use onnx or openvino, which keep float32"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def cosines(student: Float[np.ndarray, "n dim"], exported: Float[np.ndarray, "n dim"]) -> Float64[np.ndarray, " n"]:
    """The cosine of each row's two features; NaN where one is zero or not finite.

    Examples:
        >>> cosines(np.array([[1.0, 0.0], [2.0, 2.0]]), np.array([[3.0, 0.0], [1.0, 0.0]])).round(3).tolist()
        [1.0, 0.707]
    """
    a, b = student.astype(np.float64), exported.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def compare(held_out: HeldOutPatches, student: Encode, exported: Encode) -> Agreement:
    """Encode the patches with both, and compare the features.

    Raises:
        EncoderError: The exported network gives another number of features, or fails.
    """
    wanted, found = student(held_out.pixels), exported(held_out.pixels)
    if wanted.shape != found.shape:
        raise EncoderError(f"the export gives {found.shape[1]} features, the student {wanted.shape[1]}; not written")
    mean = wanted.mean(axis=0)
    near, centered = cosines(wanted, found), cosines(wanted - mean, found - mean)
    return Agreement(
        patches=len(wanted),
        slides=len(np.unique(held_out.slides)),
        origin=held_out.origin,
        min_cosine=float(near.min()),
        median_cosine=float(np.median(near)),
        min_centered_cosine=float(centered.min()),
        probe=held_out.probe(student, exported) if held_out.probe else None,
    )
