"""Tissue on a thumbnail."""

from collections.abc import Callable, Mapping

import cv2
import numpy as np

from g2l_core.errors import UnknownNameError
from g2l_core.types import Mpp, Rgb, TissueMask

THUMBNAIL_MPP = Mpp(8.0)
"""Scale at which tissue is looked for: a 128 um patch is 16 mask pixels wide."""

SATURATION_LIMITS = (15, 40)
"""Otsu's threshold is held between these (of 255). On a slide without background it would otherwise split
the tissue in two, on an empty slide the noise; glass and paper-white stay under 15, most stroma over 40."""

SMALLEST_TISSUE_UM2 = 50_000.0
"""Fragments smaller than about three patches of 128 um are dust, and such holes are filled."""

CLOSING_UM = 48.0
"""Gaps between nuclei and fibres up to this width belong to the tissue."""


def otsu_tissue(thumbnail: Rgb, mpp: Mpp) -> TissueMask:
    """Tissue as what is coloured: Otsu's threshold on the HSV saturation, closed, small parts removed.

    Args:
        thumbnail: uint8 (height, width, 3).
        mpp: Its micrometres per pixel.

    Returns:
        bool (height, width).
    """
    saturation = cv2.medianBlur(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1], 5)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_OTSU)
    mask = (saturation > np.clip(otsu, *SATURATION_LIMITS)).astype(np.uint8)
    reach = max(1, round(CLOSING_UM / 2 / mpp))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc)
    smallest_px = SMALLEST_TISSUE_UM2 / mpp**2
    mask = _without_small_parts(mask, smallest_px)
    return _without_small_parts(1 - mask, smallest_px) == 0


def _without_small_parts(mask: np.ndarray, smallest_px: float) -> np.ndarray:
    """`mask` (uint8) without its connected parts of fewer than `smallest_px` pixels."""
    _, part, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest_px
    keep[0] = False
    return keep[part].astype(np.uint8)


METHODS: Mapping[str, Callable[[Rgb, Mpp], TissueMask] | None] = {"otsu": otsu_tissue, "none": None}
"""Tissue methods by name; `none` keeps the whole slide."""


def tissue_method(name: str) -> Callable[[Rgb, Mpp], TissueMask] | None:
    """The tissue method of that name, None for `none`.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in METHODS:
        raise UnknownNameError("tissue method", name, METHODS)
    return METHODS[name]
