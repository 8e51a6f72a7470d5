"""Stain jitter: the amounts of hematoxylin, eosin and a rest, scaled and shifted, on uint8 images.

Integer and table arithmetic only, as in `color`, so that the pixels are the same on every processor.
"""

from collections.abc import Sequence
from math import log10

import numpy as np
from jaxtyping import UInt8

STAINS = ("hematoxylin", "eosin", "rest")
"""The stains, in the order of their scales and shifts."""

HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Red, green and blue optical densities of hematoxylin, eosin and DAB, which stands for the rest: Ruifrok & Johnston
2001 (Anal. Quant. Cytol. Histol. 23:291-299), as scikit-image's `rgb_from_hed` has them, which are not normalized."""

_DENSITY = 8192
"""Steps of one unit of optical density: a step is at most 0.08 gray levels."""
_WEIGHT = 1 << 14
"""Steps of one in the matrix."""
_LEVELS = 256
_DENSEST = round(_DENSITY * log10(_LEVELS))


def stain_jitter(
    view: UInt8[np.ndarray, "h w 3"], scales: Sequence[float], shifts: Sequence[float]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with each stain's amount c turned into scale * c + shift (Tellez et al. 2018, arXiv 1808.05896).

    Optical densities are D = -log10((level + 1) / 256) for each channel, between 0 and 2.41. The stains' amounts are
    c = D M^-1 with the matrix M of `HED` (Ruifrok & Johnston 2001), and D' = (scale * c + shift) M gives the new
    levels 256 * 10^-D' - 1, rounded and clipped. So a scale leaves white as it is, and a shift of one stain
    by 0.05 changes white by up to 28 levels; by up to 38 in the paper's own code, whose D is -ln(level / 255 + 2).

    Args:
        view: RGB; not changed.
        scales: Of each of `STAINS`.
        shifts: Of each of `STAINS`, in units of decadic optical density.
    """
    matrix, offset = _in_densities(scales, shifts)
    red, green, blue = (_DENSITIES[view[..., channel]] for channel in range(3))
    out = np.empty_like(view)
    for channel in range(3):
        total = red * matrix[0][channel]
        total += green * matrix[1][channel]
        total += blue * matrix[2][channel]
        total += offset[channel]
        total >>= _WEIGHT.bit_length() - 1
        np.maximum(total, 0, out=total)
        np.minimum(total, _DENSEST, out=total)
        out[..., channel] = _LEVEL_OF[total]
    return out


def _in_densities(scales: Sequence[float], shifts: Sequence[float]) -> tuple[list[list[np.int32]], list[np.int32]]:
    """M^-1 diag(scale) M and shift M, in whole steps; the second with one half, so that shifting down rounds.

    In Python's floats, one operation after the other: a matrix product may round otherwise on another processor.
    """
    matrix = [
        [
            np.int32(round(_WEIGHT * sum(_INVERSE[i][k] * scales[k] * HED[k][j] for k in range(3))))
            for j in range(3)
        ]
        for i in range(3)
    ]  # fmt: skip
    moved = [sum(shifts[k] * HED[k][j] for k in range(3)) for j in range(3)]
    return matrix, [np.int32(round(_DENSITY * d) * _WEIGHT + _WEIGHT // 2) for d in moved]


def _inverse(m: Sequence[Sequence[float]]) -> list[list[float]]:
    """The inverse of a 3 x 3 matrix by its cofactors."""
    (a, b, c), (d, e, f), (g, h, i) = m
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    cofactors = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    return [[value / determinant for value in row] for row in cofactors]


_INVERSE = _inverse(HED)
_DENSITIES = np.array([round(-_DENSITY * log10((level + 1) / _LEVELS)) for level in range(_LEVELS)], np.int32)
_LEVEL_OF = np.array(
    [min(255, max(0, round(_LEVELS * 10 ** (-k / _DENSITY) - 1))) for k in range(_DENSEST + 1)], np.uint8
)
