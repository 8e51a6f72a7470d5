"""Lay given patches on a slide, or refuse those that are not of this slide or of the store's size."""

import numpy as np

from g2l_core.errors import MppError, ReadError
from g2l_core.patches.grid import GridSpec, coords_in_boxes, grid_coords, stored_coords
from g2l_core.slides.notes import Note
from g2l_core.slides.slide import Slide
from g2l_core.tissue.coord_files import GivenPatches
from g2l_core.tissue.methods import FoundTissue
from g2l_core.tissue.thresholds import THUMBNAIL_MPP
from g2l_core.types import Coords, Level0Px

SIZE_TOLERANCE = 0.02
"""Maximum relative difference of the size that a file gives its patches from what they have in the store."""


def patch_coords(
    slide: Slide, side: Level0Px, found: FoundTissue, grid: GridSpec, slide_id: str
) -> tuple[Coords, tuple[Note, ...]]:
    """The patches of a slide in stored order, in its tissue or where they are given; and what was left out of these.

    Args:
        slide: Open.
        side: Side of a patch in level-0 pixels.
        found: The tissue, or the patches that are given.
        grid: The patches.
        slide_id: On which the order depends.

    Raises:
        MppError: The given patches have another size.
        ReadError: They are of another slide, or lie outside of it.
    """
    given = found.given
    if given is None:
        downsample = slide.thumbnail_frame(THUMBNAIL_MPP).downsample
        return grid_coords(slide.level0_size, side, found.mask, downsample, grid, slide_id), ()
    _require_on_slide(given, slide.level0_size)
    if given.box_sizes is not None:
        coords = coords_in_boxes(slide.level0_size, side, given.corners, given.box_sizes)
        return stored_coords(coords, side, grid, slide_id), ()
    _require_size(given, slide, grid)
    inside = given.corners[(given.corners + side <= slide.level0_size).all(axis=1)]
    beyond = len(given.corners) - len(inside)
    note = Note(text="given patches cross the slide's edge and are left out", detail=f"{beyond:,}")
    return stored_coords(inside.astype(np.int32), side, grid, slide_id), (note,) if beyond else ()


def _require_on_slide(given: GivenPatches, level0_size: tuple[int, int]) -> None:
    width, height = level0_size
    if given.level0_size is not None and given.level0_size != level0_size:
        raise ReadError(
            "its coordinates are of a slide of {} x {} px, and it has {} x {}: give those of this slide".format(
                *given.level0_size, width, height
            )
        )
    outside = given.corners[((given.corners < 0) | (given.corners >= level0_size)).any(axis=1)]
    if len(outside):
        x, y = outside[0].tolist()
        raise ReadError(
            f"{len(outside):,} of its {len(given.corners):,} coordinates lie outside of its {width} x {height} px, "
            f"such as {x}, {y}: expected the upper left corners in level-0 pixels of this slide"
        )


def _require_size(given: GivenPatches, slide: Slide, grid: GridSpec) -> None:
    meant = grid.patch_px * grid.mpp / slide.mpp
    other = [side for side in given.sides if abs(side - meant) > SIZE_TOLERANCE * meant]
    if other:
        patch_px, mpp = max(1, round(other[0] * slide.mpp / grid.mpp)), other[0] * slide.mpp / grid.patch_px
        raise MppError(
            f"its coordinates are of patches of {other[0]:g} level-0 px, but --patch-px {grid.patch_px} at --mpp "
            f"{grid.mpp:g} means {meant:.4g} on its {slide.mpp:.4g} um/px. What matches is --patch-px {patch_px}, or "
            f"--mpp {mpp:.4g}; each in a store of its own"
        )
