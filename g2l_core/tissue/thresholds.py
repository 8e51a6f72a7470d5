"""Find tissue on a thumbnail by color only."""

import cv2
import numpy as np

from g2l_core.types import Mpp, Rgb, TissueMask

THUMBNAIL_MPP = Mpp(8.0)
"""Scale at which tissue is found. A patch of 128 um is 16 mask pixels wide."""

SATURATION_LIMITS = (15, 40)
"""Otsu's threshold is clipped to these (of 255). It would otherwise split the tissue of a slide without background in
two, and the noise of an empty slide. Glass and paper-white stay under 15, most stroma over 40."""

SMALLEST_TISSUE_UM2 = 50_000.0
"""Fragments that are smaller than about three patches of 128 um count as dust, and smaller holes are filled."""

CLOSING_UM = 48.0
"""Maximum width of gaps between nuclei and fibers that belong to the tissue."""

MIN_SATURATION = 20
"""HSV, of 255. At 8 um/px 1 to 5 % of the pixels of mucin, the palest tissue, lie below it; glass lies below 15."""

LUMA_LIMITS = (40, 210)
"""YUV's Y, of 255. Below: black ink and the black border of a scan (99 % of real tissue: from 44 up). Above: glass,
and the inside of fat cells: fat's median is 226, mucin's 161."""

MIN_V = 112
"""YUV's V, 128 without color: red less luma. Blue and green inks lie at 66 to 106, for they lack red; 99 % of the
pixels of whole-slide scanners' tissue at 125 or more, hematoxylin alone included."""

MIN_U = 116
"""YUV's U, 128 without color: blue less luma. Red ink lies lower; 99.9 % of scanned eosin and blood at 123 or more."""

MAJORITY_UM = 104.0
"""A pixel is tissue if half of the square of this side around it is. This closes gaps between nuclei. It also removes
thin ink, and the walls between fat cells, which are about this far apart."""


def otsu_tissue(thumbnail: Rgb, mpp: Mpp) -> TissueMask:
    """Find tissue as what is colored: Otsu's threshold on the HSV saturation, closed, without small parts.

    Args:
        thumbnail: uint8 (height, width, 3).
        mpp: Its micrometers per pixel.

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


def color_tissue(thumbnail: Rgb, mpp: Mpp) -> TissueMask:
    """Find tissue by the colors of H&E: limits on HSV saturation and on YUV, then a majority, without small parts.

    Fat, glass, pen of any color and black borders are left out. The limits were measured on real H&E of two
    scanners and on colorectal tiles of seven classes, at 8 um/px. A stain far bluer than theirs loses tissue.

    Args:
        thumbnail: uint8 (height, width, 3).
        mpp: Its micrometers per pixel.

    Returns:
        bool (height, width).
    """
    saturation = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1]
    luma, u, v = cv2.split(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2YUV))
    darkest, brightest = LUMA_LIMITS
    like_stain = (saturation >= MIN_SATURATION) & (v >= MIN_V) & (u >= MIN_U)
    mask = (like_stain & (luma >= darkest) & (luma <= brightest)).astype(np.float32)
    side = 2 * max(1, round(MAJORITY_UM / 2 / mpp)) + 1
    mask = (cv2.blur(mask, (side, side)) > 0.5).astype(np.uint8)
    smallest_px = SMALLEST_TISSUE_UM2 / mpp**2
    mask = _without_small_parts(mask, smallest_px)
    return _without_small_parts(1 - mask, smallest_px) == 0


def _without_small_parts(mask: np.ndarray, smallest_px: float) -> np.ndarray:
    """`mask` (uint8) without its connected parts of fewer than `smallest_px` pixels."""
    _, part, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest_px
    keep[0] = False
    return keep[part].astype(np.uint8)
