"""How patches look from afar: a few numbers of each, from a thumbnail, for the price of no network."""

import cv2
import numpy as np
from jaxtyping import Float64, Int64

from g2l_core.rng import keyed_generator
from g2l_core.types import Coords, Rgb

FITTED_ROWS = 20_000
"""Patches that groups are fitted on; all others join the nearest group."""
ROUNDS = 20
"""Rounds of k-means. Groups need to be alike inside, not optimal."""


def appearance(thumbnail: Rgb, downsample: float, coords: Coords, side: int) -> Float64[np.ndarray, "patch 7"]:
    """Describe each patch by color, stain and texture on a thumbnail.

    Args:
        thumbnail: uint8 (height, width, 3) of the whole slide; at 8 um/px a patch of 128 um has 16 x 16 pixels.
        downsample: Level-0 pixels per pixel of it.
        coords: (patch, 2) top-left corners in level-0 pixels.
        side: Of a patch, in level-0 pixels.

    Returns:
        (patch, 7): mean and deviation of the optical density of red, green and blue, and the mean steepness of gray;
        each with mean 0 and deviation 1 over the patches, or all 0 where it is the same for all.
    """
    density = -np.log((thumbnail.astype(np.float32) + 1) / 256)
    gray = density.mean(axis=2)
    steep = np.hypot(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
    height, width = gray.shape
    low = np.minimum(np.floor(coords / downsample).astype(int), [width - 1, height - 1])
    high = np.maximum(np.ceil((coords + side) / downsample).astype(int), low + 1)
    found = np.empty((len(coords), 7))
    for i, ((left, top), (right, bottom)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        own = density[top:bottom, left:right].reshape(-1, 3).astype(np.float64)
        found[i] = *own.mean(axis=0), *own.std(axis=0), float(steep[top:bottom, left:right].mean())
    spread = found.std(axis=0)
    return (found - found.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)


def groups_of(looks: Float64[np.ndarray, "patch look"], count: int, *key: str | int) -> Int64[np.ndarray, " patch"]:
    """Group patches that look alike by k-means, whose first centers are far apart.

    Args:
        looks: From `appearance`.
        count: Most groups; there are fewer where fewer patches look different.
        key: What the draws are a function of.

    Returns:
        (patch,) the group of each, from 0; none is empty.

    References:
        Arthur & Vassilvitskii, k-means++: the advantages of careful seeding (2007).
    """
    rng = keyed_generator("groups", *key)
    rows = looks if len(looks) <= FITTED_ROWS else looks[np.sort(rng.choice(len(looks), FITTED_ROWS, replace=False))]
    centers = [rows[rng.integers(len(rows))]]
    while len(centers) < count:
        nearest = _distances(rows, np.array(centers)).min(axis=1)
        if nearest.sum() <= 0:
            break
        centers.append(rows[rng.choice(len(rows), p=nearest / nearest.sum())])
    found = np.array(centers)
    for _ in range(ROUNDS):
        group = _distances(rows, found).argmin(axis=1)
        moved = np.array([rows[group == g].mean(axis=0) if (group == g).any() else c for g, c in enumerate(found)])
        if np.array_equal(moved, found):
            break
        found = moved
    return np.unique(_distances(looks, found).argmin(axis=1), return_inverse=True)[1]


def _distances(rows: Float64[np.ndarray, "row look"], centers: Float64[np.ndarray, "center look"]) -> np.ndarray:
    """Squared distances (row, center), from differences: no product of matrices, whose last bits depend on threads."""
    return np.stack([np.square(rows - center).sum(axis=1) for center in centers], axis=1)
