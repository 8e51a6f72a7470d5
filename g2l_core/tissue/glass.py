"""The color of a slide's glass, which tells colors that were decoded wrongly: glass is near white or gray."""

import numpy as np

from g2l_core.types import Rgb

BRIGHTEST = 0.1
"""Fraction of a thumbnail, its brightest part, that is taken for glass."""

MAX_CHROMA = 100
"""Gray levels between the highest and the lowest of the red, green and blue of glass. The brightest tenth of tissue
without any glass reaches 89 in 70 colorectal tiles; white glass whose color space was mistaken has 127 or more."""


def colored_glass(thumbnail: Rgb) -> tuple[int, int, int] | None:
    """The median color of the brightest part of a thumbnail, uint8 (height, width, 3); None if it is near gray."""
    pixels = thumbnail.reshape(-1, 3)
    brightness = pixels.sum(axis=1, dtype=np.int32)
    brightest = pixels[brightness >= np.quantile(brightness, 1 - BRIGHTEST)]
    red, green, blue = (int(level) for level in np.median(brightest, axis=0))
    return (red, green, blue) if max(red, green, blue) - min(red, green, blue) > MAX_CHROMA else None
