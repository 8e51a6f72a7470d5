"""Decide which squares of a slide become patches, and in which order they are stored.

Pure arithmetic. All lengths are level-0 pixels unless a name says otherwise; a scale is rounded once, in
`patch_side_level0`, and every coordinate of the grid is a whole multiple of that side. Given coordinates are anywhere.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int32, Int64

from g2l_core.errors import MppError
from g2l_core.patches.spec import ARTIFACTS as ARTIFACTS
from g2l_core.patches.spec import GridSpec as GridSpec
from g2l_core.patches.spec import parse_artifacts as parse_artifacts
from g2l_core.rng import keyed_generator
from g2l_core.types import Coords, Level0Px, Mpp, TissueMask

MAX_UPSAMPLING = 1.1
"""A slide may be this much coarser than the wanted mpp. Beyond it, patches would consist of invented pixels."""


def patch_side_level0(spec: GridSpec, slide_mpp: Mpp) -> Level0Px:
    """Side of a patch in level-0 pixels: patch_px * mpp / slide_mpp, halves rounded up.

    256 px at 0.5 um/px are 512 level-0 px at 0.25 um/px and 257 at 0.499.

    Raises:
        MppError: The slide is more than `MAX_UPSAMPLING` times coarser than the patches.
    """
    side = int(spec.patch_px * spec.mpp / slide_mpp + 0.5)
    if side * MAX_UPSAMPLING < spec.patch_px:
        raise MppError(
            f"its finest level has {slide_mpp:g} um/px, coarser than the {spec.mpp:g} um/px wanted: "
            f"patches would be enlarged {spec.patch_px / max(side, 1):.2f} times. "
            "Choose a coarser --mpp, in a store of its own"
        )
    return Level0Px(side)


def grid_coords(
    level0_size: tuple[int, int],
    side: Level0Px,
    tissue: TissueMask | None,
    mask_downsample: float,
    spec: GridSpec,
    slide_id: str,
) -> Coords:
    """Coordinates of the patches of a slide, in stored order.

    Args:
        level0_size: Width and height of the slide in level-0 pixels.
        side: Side of a patch in level-0 pixels.
        tissue: Tissue mask, whose pixel covers `mask_downsample` level-0 pixels; None keeps every patch.
        mask_downsample: Level-0 pixels per mask pixel.
        spec: The grid.
        slide_id: The slide, on which the random order depends.

    Returns:
        int32 (n, 2): x, y of the top-left corners, level-0 pixels. Patches lie wholly inside the slide.
    """
    columns, rows = level0_size[0] // side, level0_size[1] // side
    y, x = np.divmod(np.arange(columns * rows), max(columns, 1))
    coords = np.stack([x, y], axis=1).astype(np.int32) * np.int32(side)
    if tissue is not None:
        share = tissue_share(coords, side, tissue, mask_downsample)
        coords = coords[share >= spec.min_tissue if spec.min_tissue > 0 else share > 0]
    return stored_coords(coords, side, spec, slide_id)


def stored_coords(coords: Coords, side: Level0Px, spec: GridSpec, slide_id: str) -> Int32[np.ndarray, "kept 2"]:
    """The patches of a slide that are kept, at most `spec.max_patches`, in stored order."""
    if spec.max_patches is not None and len(coords) > spec.max_patches:
        chosen = keyed_generator("max_patches", spec.seed, slide_id).permutation(len(coords))
        coords = coords[np.sort(chosen[: spec.max_patches])]
    return coords[cell_order(coords, side, spec, slide_id)]


def coords_in_boxes(
    level0_size: tuple[int, int], side: Level0Px, corners: Int64[np.ndarray, "box 2"], sizes: Int64[np.ndarray, "box 2"]
) -> Coords:
    """Coordinates of the grid's patches that lie wholly inside one of some boxes, row by row.

    Args:
        level0_size: Width and height of the slide in level-0 pixels.
        side: Side of a patch in level-0 pixels.
        corners: x and y of the boxes' top-left corners, level-0 pixels.
        sizes: Width and height of the boxes, level-0 pixels.
    """
    shape = level0_size[1] // side, level0_size[0] // side
    inside = np.zeros(shape, bool)
    first = -(-np.maximum(corners, 0) // side)
    stop = np.maximum(corners + sizes, 0) // side
    for (left, top), (right, bottom) in zip(first.tolist(), stop.tolist(), strict=True):
        inside[top:bottom, left:right] = True
    return (np.argwhere(inside)[:, ::-1] * side).astype(np.int32)


def tissue_share(coords: Coords, side: Level0Px, tissue: TissueMask, mask_downsample: float) -> np.ndarray:
    """Share of each patch that is tissue, float64 (n,), from the mask pixels its edges round to."""
    height, width = tissue.shape
    integral = np.zeros((height + 1, width + 1), np.int64)
    np.cumsum(np.cumsum(tissue, axis=0, dtype=np.int64), axis=1, out=integral[1:, 1:])
    low = np.rint(coords / mask_downsample).astype(np.int64)
    high = np.maximum(np.rint((coords + side) / mask_downsample).astype(np.int64), low + 1)
    x0, x1 = np.clip(low[:, 0], 0, width), np.clip(high[:, 0], 0, width)
    y0, y1 = np.clip(low[:, 1], 0, height), np.clip(high[:, 1], 0, height)
    inside = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    return inside / np.maximum((high - low).prod(axis=1), 1)


def _cell_index(coords: Coords, side: int, spec: GridSpec) -> Int64[np.ndarray, " patch"]:
    cell = coords.astype(np.int64) // (side * spec.cell_patches)
    return cell[:, 1] * (1 << 31) + cell[:, 0]


def cell_order(coords: Coords, side: Level0Px, spec: GridSpec, slide_id: str) -> Int64[np.ndarray, " patch"]:
    """The order in which patches are stored: cells in random order, and patches of a cell in the order given.

    A run of rows then samples the whole slide, and a slide's tiles are decoded once per cell.
    """
    _, cell = np.unique(_cell_index(coords, side, spec), return_inverse=True)
    rank = keyed_generator("cells", spec.seed, slide_id).permutation(cell.max(initial=-1) + 1)
    return np.argsort(rank[cell], kind="stable")


def image_order(n: int, spec: GridSpec, slide_id: str) -> Int64[np.ndarray, " patch"]:
    """The stored order of `n` patch images. It is entirely random, since no two images share a tile."""
    return keyed_generator("cells", spec.seed, slide_id).permutation(n)


def blocks(coords: Coords, side: Level0Px, spec: GridSpec) -> list[tuple[int, int]]:
    """Row ranges [start, stop) read together: the stored cells, cut at `cell_patches` squared rows.

    Patch images, whose coordinates are all 0, fall into runs of that length.
    """
    longest = spec.cell_patches**2
    cell = _cell_index(coords, side, spec)
    starts: Bool[np.ndarray, " patch"] = np.concatenate([[True], cell[1:] != cell[:-1]])[: len(cell)]
    edges = [*np.flatnonzero(starts).tolist(), len(cell)]
    return [
        (start, min(start + longest, stop))
        for cell_start, stop in pairwise(edges)
        for start in range(cell_start, stop, longest)
    ]
