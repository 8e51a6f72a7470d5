"""The grid: one rounding rule, hand-drawn masks, and the laws of the stored order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from g2l_core.errors import MppError, UsageError
from g2l_core.patches.grid import (
    MAX_UPSAMPLING,
    GridSpec,
    blocks,
    cell_order,
    grid_coords,
    image_order,
    patch_side_level0,
    tissue_share,
)

SMALL = GridSpec(patch_px=16, min_tissue=0.5, cell_patches=2)


def mask_of(drawing: str) -> np.ndarray:
    """A tissue mask from a drawing: # is tissue."""
    return np.array([[mark == "#" for mark in line.strip()] for line in drawing.strip().splitlines()])


def lay(drawing: str, spec: GridSpec, *, side: int = 20, downsample: float = 10.0, slide_id: str = "a") -> np.ndarray:
    """Lay a slide that the drawn mask covers exactly."""
    mask = mask_of(drawing)
    size = int(mask.shape[1] * downsample), int(mask.shape[0] * downsample)
    return grid_coords(size, side, mask, downsample, spec, slide_id)


def as_set(coords: np.ndarray) -> set[tuple[int, int]]:
    return set(map(tuple, coords.tolist()))


# ---- scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slide_mpp", "side"),
    [(0.25, 512), (0.499, 257), (0.5, 256), (0.501, 255), (0.2525, 507), (0.55, 233), (1 / 3, 384), (0.125, 1024)],
)
def test_side_of_a_256_px_patch_at_half_a_micrometer(slide_mpp, side):
    assert patch_side_level0(GridSpec(), slide_mpp) == side


def test_halves_are_rounded_up():
    """Not to even, as Python's `round` would: 22.5 gives 23."""
    assert patch_side_level0(GridSpec(patch_px=18, mpp=1.25), 1.0) == 23
    assert patch_side_level0(GridSpec(patch_px=18, mpp=1.75), 1.0) == 32  # 31.5


@given(slide_mpp=st.floats(0.05, 2.0), wanted=st.floats(0.1, 4.0), patch_px=st.integers(16, 1024))
def test_side_is_the_nearest_whole_number(slide_mpp, wanted, patch_px):
    spec, exact = GridSpec(mpp=wanted, patch_px=patch_px), patch_px * wanted / slide_mpp
    assume(exact * MAX_UPSAMPLING > patch_px + 1)
    side = patch_side_level0(spec, slide_mpp)
    assert isinstance(side, int)
    assert abs(side - exact) <= 0.5 + 1e-9
    assert abs(side * slide_mpp - patch_px * wanted) <= slide_mpp / 2 + 1e-9


def test_a_slide_too_coarse_is_refused_at_ten_percent():
    assert patch_side_level0(GridSpec(), 0.549) == 233
    with pytest.raises(MppError, match=r"has 0\.56 um/px, coarser than the 0\.5 um/px wanted.*--mpp"):
        patch_side_level0(GridSpec(), 0.56)
    with pytest.raises(MppError, match="enlarged 256"):
        patch_side_level0(GridSpec(mpp=0.05), 20.0)


@pytest.mark.parametrize(
    "field",
    [
        {"mpp": 0.0},
        {"mpp": float("nan")},
        {"patch_px": 8},
        {"min_tissue": 1.5},
        {"min_tissue": -0.1},
        {"max_patches": 0},
        {"cell_patches": 0},
    ],
)
def test_a_grid_that_cannot_be_laid_is_refused(field):
    with pytest.raises(UsageError, match=next(iter(field))):
        GridSpec(**field)


# ---- masks drawn by hand ------------------------------------------------------------------------------------


def test_patches_of_a_drawn_mask():
    """Each patch is 2 x 2 mask pixels; half of it must be tissue."""
    coords = lay(
        """
        ##..##
        ##....
        ..#...
        .#....
        ......
        #.####
        """,
        SMALL,
    )
    assert as_set(coords) == {(0, 0), (40, 0), (20, 40), (40, 40)}
    assert coords.dtype == np.int32


def test_least_share_of_tissue_is_inclusive_and_zero_means_any():
    drawing = """
        #...
        ....
        ####
        #.##
    """
    for least, kept in [
        (1.0, {(20, 20)}),
        (0.75, {(0, 20), (20, 20)}),
        (0.25, {(0, 0), (0, 20), (20, 20)}),
        (0.0, {(0, 0), (0, 20), (20, 20)}),
    ]:
        assert as_set(lay(drawing, GridSpec(min_tissue=least, patch_px=16))) == kept


def test_a_mask_pixel_in_the_middle_of_nothing_and_no_tissue_at_all():
    assert as_set(lay("....\n.#..\n....\n....", SMALL)) == set()
    assert lay("....\n....", GridSpec(min_tissue=0.0)).shape == (0, 2)


def test_the_uncovered_rest_of_a_slide_has_no_patch():
    """65 x 45 level-0 px hold 3 x 2 whole patches of 20."""
    every = grid_coords((65, 45), 20, None, 1.0, SMALL, "a")
    assert as_set(every) == {(x, y) for x in (0, 20, 40) for y in (0, 20)}
    assert grid_coords((19, 500), 20, None, 1.0, SMALL, "a").shape == (0, 2)
    assert grid_coords((500, 19), 20, None, 1.0, SMALL, "a").shape == (0, 2)


def test_share_where_edges_fall_between_mask_pixels():
    """Side 25 at 10 px a mask pixel: edges round to 0, 2, 5 (ties to even), so shares are of 2 and of 3 pixels."""
    mask = mask_of("#....\n#....")
    corners = np.array([[0, 0], [25, 0]], np.int32)
    np.testing.assert_allclose(tissue_share(corners, 25, mask, 10.0), [2 / 4, 0])


@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 99), width=st.integers(1, 4))
def test_share_equals_counting_when_patches_are_whole_mask_pixels(shape, seed, width):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    columns, lines = mask.shape[1] // width, mask.shape[0] // width
    assume(columns and lines)
    corners = np.array([[x * width * 7, y * width * 7] for y in range(lines) for x in range(columns)], np.int32)
    counted = [mask[y * width : (y + 1) * width, x * width : (x + 1) * width].mean()
               for y in range(lines) for x in range(columns)]  # fmt: skip
    np.testing.assert_allclose(tissue_share(corners, 7 * width, mask, 7.0), counted)


# ---- laws ---------------------------------------------------------------------------------------------------

slides = st.tuples(st.integers(1, 900), st.integers(1, 900))
specs = st.builds(
    GridSpec,
    min_tissue=st.sampled_from([0.0, 0.25, 1.0]),
    cell_patches=st.integers(1, 9),
    seed=st.integers(0, 3),
    max_patches=st.none() | st.integers(1, 200),
)


@given(size=slides, side=st.integers(16, 200), spec=specs, seed=st.integers(0, 99), downsample=st.floats(1.0, 64.0))
def test_patches_lie_in_the_slide_on_the_grid_once_and_on_tissue(size, side, spec, seed, downsample):
    shape = max(1, int(size[1] / downsample)), max(1, int(size[0] / downsample))
    mask = np.random.default_rng(seed).random(shape) < 0.4
    coords = grid_coords(size, side, mask, downsample, spec, "a")
    assert (coords >= 0).all()
    assert (coords + side <= size).all()
    assert (coords % side == 0).all()
    assert len(as_set(coords)) == len(coords)
    for x, y in coords.tolist():
        x0, x1, y0, y1 = (round(edge / downsample) for edge in (x, x + side, y, y + side))
        part = mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        area = max(y1 - y0, 1) * max(x1 - x0, 1)
        assert part.any()
        assert part.sum() / area >= spec.min_tissue - 1e-12


@given(size=slides, side=st.integers(16, 60), spec=specs)
def test_without_a_mask_every_patch_is_there_in_contiguous_cells(size, side, spec):
    spec = GridSpec(cell_patches=spec.cell_patches, seed=spec.seed)
    coords = grid_coords(size, side, None, 1.0, spec, "a")
    raster = {(x * side, y * side) for x in range(size[0] // side) for y in range(size[1] // side)}
    assert as_set(coords) == raster
    assert len(coords) == len(raster)
    cells = [tuple(cell) for cell in (coords // (side * spec.cell_patches)).tolist()]
    changes = sum(a != b for a, b in pairwise(cells))
    assert changes == max(0, len(set(cells)) - 1)  # each cell is entered once
    for cell in set(cells):
        inside = [tuple(c) for c, of in zip(coords.tolist(), cells, strict=True) if of == cell]
        assert inside == sorted(inside, key=lambda c: (c[1], c[0]))  # in raster order


def test_order_is_random_named_by_slide_and_seed_and_knows_no_other_slide():
    def order(slide_id: str, seed: int) -> list[list[int]]:
        return grid_coords((3000, 3000), 100, None, 1.0, GridSpec(cell_patches=4, seed=seed), slide_id).tolist()

    first = order("a", 0)
    assert order("b", 0) != first
    assert order("a", 1) != first
    assert order("a", 0) == first
    cells = [(y // 400, x // 400) for x, y in first[::16]]
    assert cells != sorted(cells)


def test_cells_stand_in_every_order_equally_often():
    """Four cells of one patch: each is first in about a quarter of 2,000 slides (sigma 1 %)."""
    raster = np.array([[0, 0], [16, 0], [0, 16], [16, 16]], np.int32)
    spec = GridSpec(cell_patches=1, patch_px=16)
    first = np.bincount([cell_order(raster, 16, spec, f"s{i}")[0] for i in range(2000)], minlength=4) / 2000
    assert np.abs(first - 0.25).max() < 0.05


@given(size=slides, spec=specs, most=st.integers(1, 300))
def test_max_patches_keeps_a_subset_of_that_size(size, spec, most):
    common = {"cell_patches": spec.cell_patches, "seed": spec.seed, "min_tissue": 0.0}
    every = grid_coords(size, 16, None, 1.0, GridSpec(**common), "a")
    some = grid_coords(size, 16, None, 1.0, GridSpec(**common, max_patches=most), "a")
    assert len(some) == min(most, len(every))
    assert as_set(some) <= as_set(every)


def test_max_patches_samples_the_whole_slide():
    some = grid_coords((16_000, 16_000), 16, None, 1.0, GridSpec(max_patches=1000), "a")
    quarters = np.bincount((some[:, 0] >= 8000) * 2 + (some[:, 1] >= 8000))
    assert quarters.min() > 180  # 250 expected, sigma 14


def test_coordinates_of_a_gigapixel_slide_do_not_overflow():
    coords = grid_coords((200_000, 150_000), 512, None, 1.0, GridSpec(), "a")
    assert len(coords) == (200_000 // 512) * (150_000 // 512)
    assert coords.max(axis=0).tolist() == [(200_000 // 512 - 1) * 512, (150_000 // 512 - 1) * 512]
    share = tissue_share(coords, 512, np.ones((150_000 // 32, 200_000 // 32), bool), 32.0)
    assert (share == 1).all()


@given(size=slides, spec=specs, side=st.integers(16, 60))
def test_blocks_cover_every_row_once_each_within_a_cell(size, spec, side):
    coords = grid_coords(size, side, None, 1.0, spec, "a")
    found = blocks(coords, side, spec)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(len(coords)))
    cells = (coords // (side * spec.cell_patches)).tolist()
    for start, stop in found:
        assert 0 < stop - start <= spec.cell_patches**2
        assert all(cell == cells[start] for cell in cells[start:stop])
    assert len(found) == len({tuple(cell) for cell in cells})


def test_blocks_of_the_default_cell_and_of_patch_images():
    assert (
        max(b - a for a, b in blocks(grid_coords((9000, 9000), 256, None, 1.0, GridSpec(), "a"), 256, GridSpec())) == 64
    )
    assert blocks(np.zeros((130, 2), np.int32), 256, GridSpec()) == [(0, 64), (64, 128), (128, 130)]
    assert blocks(np.zeros((0, 2), np.int32), 256, GridSpec()) == []


@given(n=st.integers(0, 300), seed=st.integers(0, 9))
def test_patch_images_stand_in_a_permutation(n, seed):
    order = image_order(n, GridSpec(seed=seed), "a")
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, image_order(n, GridSpec(seed=seed), "a"))
    if n > 20:
        assert order.tolist() != list(range(n))
        assert order.tolist() != image_order(n, GridSpec(seed=seed), "b").tolist()


def test_the_default_grid_is_the_papers():
    spec = GridSpec()
    assert (spec.mpp, spec.patch_px, spec.cell_patches, spec.max_patches) == (0.5, 256, 8, None)
