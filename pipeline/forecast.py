"""What stage one will cost, worked out from a few measured speeds. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

BYTES_PER_FEATURE = 2
STEP_RATIO = 1.23
"""Cost of the teacher's forward pass over the student's training step: H-optimus-0 and Hibou-L at 224 px and 261
tokens, 0.608 over 0.494 TFLOP a view, counted from their architectures."""

RUNS = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds measured on this machine."""

    patches: int
    """How many patches were read for it."""
    read: float
    """A patch, in one thread."""
    augment: float
    """A view, in one thread."""
    encode: Mapping[str, float]
    """A view, by encoder."""
    shares_cores: bool
    """Whether reading and encoding run on the same processor."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a cohort costs with a number of views."""

    hours: float
    bottleneck: str
    """encode or read."""
    patches_needed: float
    """Patches a second that keep the encoders busy."""
    patches_read: float
    """Patches a second that this number of threads reads and augments."""
    enough_workers: int


def forecast(speeds: Speeds, patches: int, n_views: int, workers: int) -> Forecast:
    """Hours and bottleneck of `patches` patches with `n_views` views each, the canonical one included.

    Reading overlaps with encoding, so the slower of the two sets the pace; where both run on the same cores
    their times add up.
    """
    encode = sum(speeds.encode.values()) * n_views
    read = speeds.read + speeds.augment * n_views
    seconds = encode + read / workers if speeds.shares_cores else max(encode, read / workers)
    return Forecast(
        hours=patches * seconds / 3600,
        bottleneck="encode" if encode >= read / workers else "read",
        patches_needed=1 / encode if encode else inf,
        patches_read=workers / read if read else inf,
        enough_workers=max(1, ceil(read / encode)) if encode else workers,
    )


def speed_up(views: int, epochs: int, runs: int, ratio: float = STEP_RATIO) -> float:
    """How many times less a cached teacher costs than one that runs in every step.

    With t the teacher's forward over the student's step, R runs of E epochs cost (t + 1) R E online and t V + R E
    from V stored views: every view is encoded once. V = E sees as many distinct views as online distillation.
    """
    return (ratio + 1) * runs * epochs / (ratio * views + runs * epochs)


def gigabytes(patches: int, n_views: int, dims: Sequence[int]) -> float:
    """Size of the features in GB (1e9 bytes)."""
    return patches * n_views * sum(dims) * BYTES_PER_FEATURE / 1e9


def third(epochs: int) -> int:
    """A third of the epochs, in whole views."""
    return max(1, round(epochs / 3))


def view_choices(epochs: int) -> list[int]:
    """The numbers of augmented views worth comparing: 1, 2, 4, a third of the epochs and as many as epochs."""
    return sorted({1, 2, 4, third(epochs), epochs})
