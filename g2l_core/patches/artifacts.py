"""Find the artifacts that a patch shows: pen, the black of a scan's border, blur. The limits let all H&E pass.

The limits were measured on 1,294 real H&E patches of 224 px (oral mucosa through a microscope's camera, colorectum at
0.5 um/px), 236 patches of two scanned slides and 192 drawn ones; none of them is flagged.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Float32

from g2l_core.patches.grid import ARTIFACTS
from g2l_core.store.schema import STATUS
from g2l_core.types import PatchStatus, Rgb

Plane: TypeAlias = Float32[np.ndarray, "height width"]

CELLS = 16
"""Pen is looked for in the mean colors of this many squares along each side: ink is wide, a nucleus is not."""

COLORED_SHARE = 0.1
"""Minimum fraction of squares in red or green ink; real H&E has under 0.5 %."""

BLUE_SHARE = 0.3
"""Minimum fraction of squares in blue or black ink; a bluish hematoxylin reaches 15 %, a dark field 10 %."""

BLACK_LEVEL = 25
"""A pixel darker than this in red, green and blue lies outside the area that was scanned."""

BLACK_SHARE = 0.2
"""Minimum fraction of such pixels; real H&E has under 1 %."""

SHARP_RATIO = 0.21
"""Below this ratio the detail of about 2 px is too weak for that of about 8 px: see `_is_blurred`."""

SHARPNESS_MPP = 0.5
"""Finer patches are judged at this scale: at 0.25 um/px optics leave little of 2 px (0.5 um), in focus or not."""

MIN_CONTRAST = 8.0
"""Gray levels between the darkest and the brightest tenth of a patch below which it is too empty to be judged: glass,
and a corner of tissue on glass."""

ROUNDING_VARIANCE = 0.06
"""What rounding to whole gray levels leaves in the finest detail: 1/12, less what the filter takes."""


@dataclass(frozen=True, kw_only=True)
class ArtifactSpec:
    """What to look for in a patch."""

    names: Sequence[str]
    """Some of `grid.ARTIFACTS`; they are looked for in the order of that table."""
    mpp: float = SHARPNESS_MPP
    """Micrometers per pixel of the patch."""


def artifact_of(patch: Rgb, spec: ArtifactSpec) -> int:
    """The reason code of the first artifact that a patch has, 0 where it has none.

    Args:
        patch: uint8 (height, width, 3).
        spec: What to look for.

    Returns:
        A code of `patch_status`.
    """
    names = (name for name in ARTIFACTS if name in spec.names)
    return next((STATUS[name] for name in names if _CHECKS[name](patch, spec.mpp)), STATUS["ok"])


def count_artifacts(status: PatchStatus) -> dict[str, int]:
    """How many patches were left out for each artifact that occurs, by its name, and for pixels that are absent.

    They are not losses: a run that leaves them out is complete. Patches that could not be read are not counted.
    """
    counts = Counter(status.tolist())
    return {name: counts[STATUS[name]] for name in (*ARTIFACTS, "absent") if counts[STATUS[name]]}


def _has_black(patch: Rgb, _: float) -> bool:
    black = cv2.countNonZero(cv2.inRange(patch, (0, 0, 0), (BLACK_LEVEL,) * 3))
    return black >= BLACK_SHARE * patch.shape[0] * patch.shape[1]


def _has_pen(patch: Rgb, _: float) -> bool:
    """Ink of a color that hematoxylin and eosin do not give, over enough of the patch."""
    squares = cv2.resize(patch, (CELLS, CELLS), interpolation=cv2.INTER_AREA).astype(np.int16)
    colored = _is_green(squares) | _is_red(squares)
    dark = _is_blue(squares) | _is_black_ink(squares)
    return float(colored.mean()) >= COLORED_SHARE or float(dark.mean()) >= BLUE_SHARE


def _is_green(rgb: np.ndarray) -> Bool[np.ndarray, "row column"]:
    """Hematoxylin and eosin both let less green through than red or blue: green never leads red clearly."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return _is_saturated(rgb, 100) & (green >= red + 40) & (green >= blue - 40)


def _is_red(rgb: np.ndarray) -> Bool[np.ndarray, "row column"]:
    """Eosin and blood let blue through as well; ink takes green and blue away alike."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return (red >= np.maximum(green, blue) + 120) & (np.maximum(green, blue) < 60)


def _is_blue(rgb: np.ndarray) -> Bool[np.ndarray, "row column"]:
    """Ink takes red away more than green; hematoxylin takes green first, and is never that saturated over an area."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return _is_saturated(rgb, 180) & (blue >= red + 100) & (green >= red - 15)


def _is_black_ink(rgb: np.ndarray) -> Bool[np.ndarray, "row column"]:
    """Dark without any color: ink, or the border of a scan."""
    return (rgb.max(axis=-1) < 60) & (np.ptp(rgb, axis=-1) < 20)


def _is_saturated(rgb: np.ndarray, minimum: int) -> Bool[np.ndarray, "row column"]:
    """Whether the saturation of HSV, from 0 to 255, reaches the minimum."""
    return 255 * np.ptp(rgb, axis=-1).astype(np.int32) >= minimum * rgb.max(axis=-1).astype(np.int32)


def _is_blurred(patch: Rgb, mpp: float) -> bool:
    """Whether the finest detail is too weak for that of four times its size.

    The standard deviation of what a Gaussian of 1 px takes away, at full size and at a quarter of it (a Laplacian
    pyramid, Burt & Adelson 1983): a ratio, so that neither stain nor contrast matter. A Gaussian blur of 3 px leaves
    at most 0.20, sharp tissue has 0.24 and more, 0.36 but for soft fat. Noise of a camera or strong JPEG compression
    after the blur is detail as well, and hides it.
    """
    gray: Plane = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32)
    if mpp < SHARPNESS_MPP:
        side = max(CELLS, round(gray.shape[0] * mpp / SHARPNESS_MPP))
        gray = np.asarray(cv2.resize(gray, (side, side), interpolation=cv2.INTER_AREA), np.float32)
    quarter = cv2.pyrDown(cv2.pyrDown(gray))
    fine, coarse = _detail_variance(gray), _detail_variance(quarter)
    dark, bright = np.percentile(quarter, (10, 90))
    return bool(bright - dark >= MIN_CONTRAST and fine - ROUNDING_VARIANCE < SHARP_RATIO**2 * coarse)


def _detail_variance(gray: Plane) -> float:
    return float(np.var(gray - cv2.GaussianBlur(gray, (5, 5), 1.0)))


_CHECKS: Mapping[str, Callable[[Rgb, float], bool]] = {"black": _has_black, "pen": _has_pen, "blurred": _is_blurred}
