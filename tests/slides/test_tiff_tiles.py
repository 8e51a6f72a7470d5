"""Tiles decoded from their own bytes: the pixels that OpenSlide reads, or none."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import ReadError
from g2l_core.slides.readers import open_handle
from g2l_core.slides.slide import open_slide
from g2l_core.slides.tiff_tiles import open_tiles
from tests.patches.test_views import he_patch

WIDTH, HEIGHT = 1100, 830

CODINGS = {
    "420": {"compression": "jpeg", "subsampling": (2, 2), "photometric": "rgb"},
    "422": {"compression": "jpeg", "subsampling": (2, 1), "photometric": "rgb"},
    "444": {"compression": "jpeg", "subsampling": (1, 1), "photometric": "rgb"},
    "rgb": {"compression": "jpeg", "photometric": "rgb", "compressionargs": {"outcolorspace": "RGB"}},
    "deflate": {"compression": "adobe_deflate", "photometric": "rgb"},
}
DECODED = {"420", "422", "444", "rgb"}


def picture(width=WIDTH, height=HEIGHT):
    rows = [np.concatenate([he_patch(seed + 9 * row) for seed in range(width // 256 + 1)], axis=1) for row in range(5)]
    return np.ascontiguousarray(np.concatenate(rows)[:height, :width])


def write(path, coding, tile=256, levels=(1, 2), **more):
    """A tiled TIFF whose tiles are coded one by one by tifffile."""
    image = picture()
    with tifffile.TiffWriter(path, **more) as tiff:
        for factor in levels:
            level = np.ascontiguousarray(image[::factor, ::factor])
            tiff.write(
                level,
                tile=(tile, tile),
                resolution=(2e4 / factor, 2e4 / factor),
                resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1),
                metadata=None,
                **CODINGS[coding],
            )
    return path


def openslide_pixels(path, level, x, y, width, height):
    with openslide.OpenSlide(path) as slide:
        d = slide.level_downsamples[level]
        return np.asarray(slide.read_region((round(x * d), round(y * d)), level, (width, height)))[..., :3]


@pytest.mark.parametrize("tile", [64, 240, 512])
@pytest.mark.parametrize("coding", CODINGS)
def test_the_whole_level_is_what_openslide_reads(tmp_path, coding, tile):
    path = write(tmp_path / "x.tiff", coding, tile)
    with openslide.OpenSlide(path) as slide:
        sizes = slide.level_dimensions
    tiles = open_tiles(path, sizes)
    if coding not in DECODED:
        assert tiles.read(0, 0, 0, 64, 64) is None
        return
    for level, (width, height) in enumerate(sizes[:1] if WIDTH % 2 or HEIGHT % 2 else sizes):
        found = tiles.read(level, 0, 0, width, height)
        assert np.array_equal(found, openslide_pixels(path, level, 0, 0, width, height))


def test_big_tiff(tmp_path):
    path = write(tmp_path / "x.tiff", "420", bigtiff=True)
    found = open_tiles(path, [(WIDTH, HEIGHT)]).read(0, 100, 50, 700, 600)
    assert np.array_equal(found, openslide_pixels(path, 0, 100, 50, 700, 600))


@pytest.mark.parametrize("slide", ["real_slide", "slide_without_mpp"])
def test_real_slides_jpeg_and_jpeg2000(slide, request):
    path = request.getfixturevalue(slide)
    with openslide.OpenSlide(path) as opened:
        sizes = opened.level_dimensions
    tiles = open_tiles(path, sizes)
    rng = np.random.default_rng(0)
    for level, (width, height) in enumerate(sizes):
        downsample = 1 if level == 0 else 2
        for _ in range(6):
            x, y = (int(rng.integers(0, (side - 400) // downsample)) * downsample for side in (width, height))
            found = tiles.read(level, x, y, 390, 300)
            if level == 0:
                assert np.array_equal(found, openslide_pixels(path, 0, x, y, 390, 300))
            assert found.shape == (300, 390, 3)


@pytest.mark.parametrize("slide", ["real_slide", "slide_without_mpp"])
def test_patches_of_real_slides_do_not_depend_on_the_path(slide, request):
    path = request.getfixturevalue(slide)
    with open_slide(path, mpp_override=0.25) as fast, open_slide(path, mpp_override=0.25, own_tiles=False) as slow:
        assert open_tiles(path, open_handle(path).level_dimensions) is not None
        for x, y in [(0, 0), (512, 512), (1026, 771), (1500, 2000)]:
            for side, patch_px in ((512, 256), (257, 256), (256, 256), (600, 224)):
                assert np.array_equal(fast.read_patch(x, y, side, patch_px), slow.read_patch(x, y, side, patch_px))
        assert np.array_equal(fast.read_thumbnail(8.0).image, slow.read_thumbnail(8.0).image)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write(tmp_path_factory.mktemp("drawn") / "x.tiff", "420", 240)


@given(x=st.integers(-50, WIDTH + 50), y=st.integers(-50, HEIGHT + 50), w=st.integers(1, 700), h=st.integers(1, 700))
def test_any_region_is_openslide_s_or_left_to_it(drawn, x, y, w, h):
    found = open_tiles(drawn, [(WIDTH, HEIGHT)], cache_bytes=5 * 240 * 240 * 3).read(0, x, y, w, h)
    inside = x >= 0 and y >= 0 and x + w <= WIDTH and y + h <= HEIGHT
    assert (found is not None) == inside
    if inside:
        assert np.array_equal(found, openslide_pixels(drawn, 0, x, y, w, h))


def test_every_tile_is_decoded_once_and_few_are_kept(drawn, monkeypatch):
    tiles = open_tiles(drawn, [(WIDTH, HEIGHT)], cache_bytes=12 * 240 * 240 * 3)
    decoded, decode = [], imagecodecs.jpeg8_decode
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", lambda *a, **more: decoded.append(a) or decode(*a, **more))
    for y in range(0, 700, 100):  # patches row by row, as in a cell: two rows of five tiles are in use
        for x in range(0, 1000, 100):
            tiles.read(0, x, y, 100, 100)
    assert len(decoded) == 5 * 3
    tiles.read(0, 900, 600, 100, 100)
    assert len(decoded) == 5 * 3
    tiles.read(0, 0, 0, 100, 100)  # of the fifteen tiles twelve are kept
    assert len(decoded) == 5 * 3 + 1


def test_many_threads_read_what_one_reads(drawn):
    tiles = open_tiles(drawn, [(WIDTH, HEIGHT)], cache_bytes=3 * 240 * 240 * 3)
    places = [(x, y) for y in range(0, 600, 97) for x in range(0, 800, 101)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: tiles.read(0, *place, 200, 200), places))
    whole = openslide_pixels(drawn, 0, 0, 0, WIDTH, HEIGHT)
    assert all(np.array_equal(f, whole[y : y + 200, x : x + 200]) for f, (x, y) in zip(found, places, strict=True))


def tile_bytes(path):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def damaged(path, drawn, change):
    """A copy of the drawn slide whose seventh tile (of 240 px, at 240, 240) has other bytes."""
    shutil.copy(drawn, path)
    offset, count = tile_bytes(drawn)[6]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = change(content[offset : offset + count])
    path.write_bytes(content)
    return path


def flipped(seed):
    def change(content):
        rng = np.random.default_rng(seed)
        for place in rng.integers(0, len(content), 20):
            content[place] ^= 1 << rng.integers(8)
        return content

    return change


def outcome(path, own_tiles):
    with open_slide(path, own_tiles=own_tiles) as slide:
        try:
            return slide.read_patch(240, 240, 256, 256)
        except ReadError:
            return None


@pytest.mark.parametrize("change", [lambda b: bytes(len(b)), *(flipped(seed) for seed in range(12))])
def test_a_damaged_tile_gives_what_openslide_gives(tmp_path, drawn, change):
    path = damaged(tmp_path / "x.tiff", drawn, change)
    ours, theirs = outcome(path, True), outcome(path, False)
    assert (ours is None) == (theirs is None)
    assert ours is None or np.array_equal(ours, theirs)


def test_a_zeroed_tile_is_refused(tmp_path, drawn):
    assert outcome(damaged(tmp_path / "x.tiff", drawn, lambda b: bytes(len(b))), True) is None


def test_a_truncated_file_gives_no_filled_up_pixels(tmp_path, drawn):
    path = shutil.copy(drawn, tmp_path / "x.tiff")
    offset, count = tile_bytes(path)[6]
    tiles = open_tiles(path, [(WIDTH, HEIGHT)])
    with path.open("r+b") as file:
        file.truncate(offset + count - 40)
    assert tiles.read(0, 240, 240, 240, 240) is None
    assert tiles.read(0, 0, 0, 240, 240) is not None


def test_closed_tiles_read_nothing(drawn):
    tiles = open_tiles(drawn, [(WIDTH, HEIGHT)])
    tiles.close()
    assert tiles.read(0, 0, 0, 10, 10) is None


def test_what_is_no_tiled_tiff_is_left_alone(tmp_path):
    (tmp_path / "x.svs").write_text("no slide")
    tifffile.imwrite(tmp_path / "strips.tiff", picture(), photometric="rgb")
    assert open_tiles(tmp_path / "x.svs", [(10, 10)]) is None
    assert open_tiles(tmp_path / "strips.tiff", [(WIDTH, HEIGHT)]) is None
