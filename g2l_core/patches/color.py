"""The four color adjustments of a view, on uint8 images: torchvision's semantics to within a few gray levels."""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8


def brightness(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """The image with every level multiplied by `factor`."""
    return _look_up(view, np.arange(256, dtype=np.float32) * np.float32(factor))


def contrast(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """The image blended with the mean of its gray image: `factor` times the image, the rest the mean."""
    # OpenCV rounds the gray image, torchvision truncates it: half a level lower on average
    mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0] - 0.5
    return _look_up(view, np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32((1 - factor) * mean))


def _look_up(view: UInt8[np.ndarray, "h w 3"], table: Float32[np.ndarray, "256"]) -> UInt8[np.ndarray, "h w 3"]:
    return cv2.LUT(view, np.clip(table, 0, 255).astype(np.uint8))


def saturation(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """The image blended with its gray image: `factor` times the image, the rest gray."""
    # OpenCV keeps the matrix in 1/1024; rows that sum to one there leave gray gray. It rounds where torchvision
    # truncates, twice: the gray image and the blend; the last term keeps whole levels off the tie.
    gray = np.rint((1 - factor) * _GRAY * 1024) / 1024
    truncation = -(1 - factor) / 2 - 1 / 2 + 1 / 1024
    blend = np.column_stack((gray + (1 - gray.sum()) * np.eye(3), np.full(3, truncation)))
    return cv2.transform(view, blend)


def hue(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its hue turned by `factor` turns, at most 1/6; see `turn_hue`."""
    # In halves, because arrays this small stay in the allocator's free lists; larger ones are mapped by the
    # kernel at every call, which doubles the time.
    return np.concatenate([turn_hue(half, factor) for half in np.array_split(view, 2)])


def turn_hue(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
    """Turn the hue by `factor` turns, |factor| <= 1/6, without leaving RGB.

    In HSV a channel is low + chroma * clip(2 - angle, 0, 1): low and chroma stay, and angle, in sixths of a turn,
    is how far the hue lies from that channel's own (red 0, green 2, blue 4). Times the chroma no division is
    left: with the sum of the three channels, chroma * angle = sum + chroma - low - 2 * channel (true in each of
    the six sextants). The hue lies after the channel's own where the next channel (red, green, blue, red) is the
    larger of the other two, so turning adds to the angle there and takes from it elsewhere. All of it is kept in
    1/32 of a gray level: 3 * 255 * 32 + 255 * 32 still fits int16.

    torchvision scales its result by 255.999 and truncates; value + value / 256, truncated, is the same.
    """
    planes = np.ascontiguousarray(view.transpose(2, 0, 1))
    dark = planes.min(axis=0)
    span = planes.max(axis=0) - dark
    turn = cv2.LUT(span, np.rint(np.arange(256) * (6 * 32 * factor)).astype(np.int16))
    low, chroma = dark.astype(np.int16) << 5, span.astype(np.int16) << 5
    high = low + chroma
    total = (planes.sum(axis=0, dtype=np.int16) << 5) + chroma - low
    turned = []
    for channel in range(3):
        angle = (planes[channel - 2] < planes[channel - 1]).astype(np.int16)
        angle *= -2
        angle += 1
        angle *= turn
        angle += total
        angle -= planes[channel].astype(np.int16) << 6
        value = np.subtract(high, np.abs(angle, out=angle), out=angle)
        value += chroma
        value = np.minimum(np.maximum(value, low, out=value), high, out=value)
        value += value >> 8
        turned.append((value >> 5).astype(np.uint8))
    return cv2.merge(turned)


_GRAY = np.array((0.2989, 0.587, 0.114))  # torchvision's weights
