"""Slides: coordinates to the pixel, one resampling, and files that are no slides, broken or without a scale."""

import shutil
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from g2l_core.errors import G2LError, MppError, NotASlideError, ReadError
from g2l_core.slides import slide as slides
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.readers import open_handle
from g2l_core.slides.slide import Slide, open_slide
from g2l_core.synthetic.cohort import write_pyramid
from g2l_core.types import Mpp

WIDTH, HEIGHT = 2048, 1536


def painted(width: int, height: int) -> np.ndarray:
    """An image whose every pixel says its own x and y (below 4096): red and green their low, blue their high bits."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x & 255, y & 255, (x >> 8) << 4 | y >> 8], axis=2).astype(np.uint8)


def positions(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The x and y that painted pixels say."""
    red, green, blue = np.moveaxis(pixels.astype(int), 2, 0)
    return red + ((blue >> 4) << 8), green + ((blue & 15) << 8)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def overlaps(n: int, m: int) -> np.ndarray:
    """float64 (m, n): what share of each of m equal stretches of [0, n) every unit interval has."""
    edges = np.arange(m + 1) * n / m
    units = np.arange(n)
    shared = np.minimum(units + 1, edges[1:, None]) - np.maximum(units, edges[:-1, None])
    return np.maximum(shared, 0) * m / n


def area_average(image: np.ndarray, side: int) -> np.ndarray:
    """The image resampled to `side` squared, each source pixel weighed by its overlap; not rounded."""
    rows, columns = overlaps(image.shape[0], side), overlaps(image.shape[1], side)
    return np.stack([rows @ image[..., c].astype(float) @ columns.T for c in range(3)], axis=2)


@pytest.fixture(scope="module")
def painted_slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("painted") / "painted.tiff"
    write_pyramid(path, painted(WIDTH, HEIGHT), mpp=0.25, downsamples=(1, 2, 4), quality=None)
    with open_slide(path) as slide:
        yield slide


@pytest.fixture(scope="module")
def noise_slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "noise.tiff"
    write_pyramid(path, noise(1028, 771), mpp=0.499, downsamples=(1,), quality=None)
    with open_slide(path) as slide:
        yield slide


class Recorder:
    """A slide's handle that notes which regions are read."""

    def __init__(self, handle):
        self.handle, self.regions = handle, []

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def read_region(self, *region):
        self.regions.append(region)
        return self.handle.read_region(*region)


# ---- where a patch lies -------------------------------------------------------------------------------------


@given(x=st.integers(0, WIDTH - 64), y=st.integers(0, HEIGHT - 64))
def test_a_patch_of_level_0_pixels_is_exactly_where_it_should_be(painted_slide, x, y):
    found_x, found_y = positions(painted_slide.read_patch(x, y, 64, 64))
    np.testing.assert_array_equal(found_x, np.broadcast_to(x + np.arange(64), (64, 64)))
    np.testing.assert_array_equal(found_y, np.broadcast_to((y + np.arange(64))[:, None], (64, 64)))


@given(factor=st.sampled_from([2, 4, 8]), column=st.integers(0, 7), row=st.integers(0, 5), shift=st.integers(0, 7))
def test_a_shrunk_patch_averages_exactly_its_own_blocks(painted_slide, factor, column, row, shift):
    """Each pixel averages `factor` squared level-0 pixels; the position that it says must lie in its block."""
    side = 32 * factor
    x, y = column * side + shift, row * side + shift
    found_x, found_y = positions(painted_slide.read_patch(x, y, side, 32))
    # A block that straddles a multiple of 256 mixes high and low bits: it is left out.
    clear = np.array([(start % 256) + factor <= 256 for start in x + factor * np.arange(32)])
    clear_down = np.array([(start % 256) + factor <= 256 for start in y + factor * np.arange(32)])
    offset_x = (found_x - (x + factor * np.arange(32)))[np.ix_(clear_down, clear)]
    offset_y = (found_y - (y + factor * np.arange(32))[:, None])[np.ix_(clear_down, clear)]
    middle = (factor - 1) / 2
    assert np.abs(offset_x - middle).max() <= 0.5 + 0.5 * (factor > 4)  # a level is rounded, then its mean
    assert np.abs(offset_y - middle).max() <= 0.5 + 0.5 * (factor > 4)


@pytest.mark.parametrize(
    ("x", "y", "side", "level", "region"),
    [
        (512, 256, 256, 0, 256),
        (512, 256, 512, 1, 256),
        (1024, 512, 1024, 2, 256),
        (0, 0, 514, 1, 257),  # divides by 2 only
        (514, 0, 514, 1, 257),
        (513, 0, 513, 0, 513),  # divides by nothing: level 0, resampled once
        (2, 0, 1024, 1, 512),  # the corner lies between two pixels of level 2
        (1, 0, 1024, 0, 1024),
        (0, 0, 300, 0, 300),  # level 1 would be coarser than the patch
    ],
)
def test_a_patch_comes_from_the_nearest_finer_level_it_divides(painted_slide, x, y, side, level, region):
    handle = Recorder(open_handle(painted_slide.path))
    Slide(painted_slide.path, handle, painted_slide.mpp, "override").read_patch(x, y, side, 256)
    assert handle.regions == [((x, y), level, (region, region))]


def test_a_level_whose_downsample_is_not_whole_is_not_used_for_patches(tmp_path):
    """1001 px shrunk to 250 is 4.004: read from there, every patch would be shifted by a share of a pixel."""
    image = painted(1001, 1001)
    path = tmp_path / "uneven.tiff"
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate((image, image[:1000:4, :1000:4])):
            resolution = (1e4 / 0.125 / 4**i,) * 2
            tiff.write(level, tile=(256, 256), photometric="rgb", subfiletype=i, resolution=resolution,
                       resolutionunit="CENTIMETER", metadata=None)  # fmt: skip
    with open_slide(path) as slide:
        assert open_handle(path).level_downsamples[1] == pytest.approx(4.004)
        expected = area_average(image[512:768, 512:768], 64)
        assert np.abs(slide.read_patch(512, 512, 256, 64) - expected).max() <= 1


# ---- what a patch holds -------------------------------------------------------------------------------------


def test_an_unscaled_patch_equals_tifffiles_reading(noise_slide):
    level0 = tifffile.imread(noise_slide.path)
    assert level0.shape == (771, 1028, 3)
    np.testing.assert_array_equal(noise_slide.read_patch(257, 514, 257, 257), level0[514:771, 257:514])


@pytest.mark.parametrize(("side", "patch_px"), [(257, 256), (512, 256), (128, 64), (300, 100), (257, 64), (70, 69)])
def test_shrinking_equals_an_independent_area_average(noise_slide, side, patch_px):
    level0 = tifffile.imread(noise_slide.path)
    expected = area_average(level0[40 : 40 + side, 30 : 30 + side], patch_px)
    if side % patch_px == 0:
        n = side // patch_px
        blocks = level0[40 : 40 + side, 30 : 30 + side].reshape(patch_px, n, patch_px, n, 3).mean((1, 3))
        np.testing.assert_allclose(expected, blocks)
    found = noise_slide.read_patch(30, 40, side, patch_px)
    assert np.abs(found - expected).max() <= 0.501


def test_enlarging_keeps_center_and_colors(noise_slide):
    """1.06 times: the corners stay, and no value leaves the range of the source (bicubic would overshoot)."""
    level0 = tifffile.imread(noise_slide.path)[:240, :240]
    found = noise_slide.read_patch(0, 0, 240, 256)
    np.testing.assert_array_equal(found[[0, 0, -1, -1], [0, -1, 0, -1]], level0[[0, 0, -1, -1], [0, -1, 0, -1]])
    assert found.shape == (256, 256, 3)
    assert abs(found.mean() - level0.mean()) < 1


def test_real_slide_equals_tifffiles_reading_at_257_to_256(real_slide):
    """Both decode Aperio's JPEG tiles with libjpeg-turbo: level 0 is equal here, another build may differ by 2."""
    level0 = tifffile.imread(real_slide, key=0)
    with open_slide(real_slide) as slide:
        assert slide.level0_size == (2220, 2967)
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.499), "header: openslide.mpp-x")
        for x, y in [(0, 0), (257, 514), (1285, 1542), (1799, 2570)]:
            direct = slide.read_patch(x, y, 257, 257).astype(int)
            assert np.abs(direct - level0[y : y + 257, x : x + 257]).max() <= 2
            expected = area_average(level0[y : y + 257, x : x + 257], 256)
            assert np.abs(slide.read_patch(x, y, 257, 256) - expected).max() <= 2.5


def test_what_lies_outside_a_slide_is_background(painted_slide):
    patch = painted_slide.read_patch(WIDTH - 16, HEIGHT - 16, 32, 32)
    np.testing.assert_array_equal(patch[:16, :16], painted(WIDTH, HEIGHT)[-16:, -16:])
    assert (patch[16:] == 255).all()
    assert (patch[:, 16:] == 255).all()


def test_transparent_pixels_are_composited_on_the_background_of_the_header(monkeypatch):
    pixels = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    pixels.paste((10, 20, 30, 255), (0, 0, 2, 4))
    handle = openslide.ImageSlide(pixels)
    monkeypatch.setattr(openslide.ImageSlide, "properties", {"openslide.background-color": "F0E0D0"})
    patch = Slide(Path("x"), handle, Mpp(0.5), "header: openslide.mpp-x").read_patch(0, 0, 4, 4)
    assert (patch[:, :2] == (10, 20, 30)).all()
    assert (patch[:, 2:] == (0xF0, 0xE0, 0xD0)).all()


def test_half_transparent_pixels_are_blended(tmp_path):
    Image.new("RGBA", (32, 32), (0, 100, 200, 51)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp_override=0.5) as slide:
        wanted = 0.2 * np.array([0, 100, 200]) + 0.8 * 255
        assert np.abs(slide.read_patch(0, 0, 32, 32) - wanted).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_many_threads_read_the_same_pixels(tmp_path, suffix):
    """All threads begin at once: the first decoding of a plain image is where Pillow is not thread-safe."""
    image = noise(512, 512)
    path = tmp_path / f"a{suffix}"
    if suffix == ".tiff":
        write_pyramid(path, image, mpp=0.5, downsamples=(1,), quality=None)
    else:
        Image.fromarray(image).save(path)
    start, equal = threading.Barrier(8), []

    def read(x: int) -> None:
        start.wait()
        equal.append(np.array_equal(slide.read_patch(x, 64, 64, 64), image[64:128, x : x + 64]))

    with open_slide(path, mpp_override=0.5) as slide:
        threads = [threading.Thread(target=read, args=(64 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert equal == [True] * 8


# ---- the scale ----------------------------------------------------------------------------------------------


def tiff_with_resolution(path: Path, resolution: tuple[float, float] | None, unit: str) -> Path:
    tifffile.imwrite(path, noise(256, 256), tile=(256, 256), photometric="rgb", resolution=resolution,
                     resolutionunit=unit, metadata=None)  # fmt: skip
    return path


def test_the_manifest_goes_before_the_header_and_that_before_the_override(tmp_path, painted_slide):
    with open_slide(painted_slide.path, manifest_mpp=0.4, mpp_override=0.3) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "manifest (header: 0.25)")
    with open_slide(painted_slide.path, mpp_override=0.3) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.25), "header: openslide.mpp-x")
    bare = tiff_with_resolution(tmp_path / "bare.tiff", (1, 1), "NONE")
    with open_slide(bare, manifest_mpp=0.4, mpp_override=0.3) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "manifest")
    with open_slide(bare, mpp_override=0.3) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.3, "override")


def test_without_any_scale_the_message_says_how_to_give_it(tmp_path):
    bare = tiff_with_resolution(tmp_path / "bare.tiff", (1, 1), "NONE")
    with pytest.raises(MppError, match=r"header has no.*--mpp-override.*manifest's column mpp"):
        open_slide(bare)


def test_real_slide_without_scale(slide_without_mpp):
    with pytest.raises(MppError, match="--mpp-override"):
        open_slide(slide_without_mpp)
    with open_slide(slide_without_mpp, mpp_override=0.25) as slide:
        assert slide.mpp_source == "override"
        assert slide.read_patch(2000, 1500, 512, 256).std() > 5


def test_the_72_dpi_of_a_camera_are_no_scale(tmp_path):
    """25,400 um an inch / 72 = 352.8 um/px: counts as no scale at all, so another source can give it."""
    path = tiff_with_resolution(tmp_path / "dpi.tiff", (72, 72), "INCH")
    with pytest.raises(MppError, match=r"352\.778 um/px, outside the plausible range.*--mpp-override"):
        open_slide(path)
    with open_slide(path, mpp_override=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "override")


@pytest.mark.parametrize("figure", [0.0, -0.5, 50.0, float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["manifest", "override"])
def test_implausible_scale_from_the_user(tmp_path, figure, source):
    bare = tiff_with_resolution(tmp_path / "bare.tiff", (1, 1), "NONE")
    keyword = {"manifest": "manifest_mpp", "override": "mpp_override"}[source]
    with pytest.raises(MppError, match=f"its {source} gives .* outside the plausible range 0.05 to 20"):
        open_slide(bare, **{keyword: figure})


def test_pixels_that_are_not_square(tmp_path):
    """The mean is used; the audit tells them, and the manifest's figure goes first where there is one."""
    path = tiff_with_resolution(tmp_path / "oblong.tiff", (20000, 40000), "CENTIMETER")
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5 + 0.25) / 2)
    with open_slide(path, manifest_mpp=0.25, mpp_override=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "manifest (header: 0.375)")
    nearly = tiff_with_resolution(tmp_path / "nearly.tiff", (20000, 20100), "CENTIMETER")
    with open_slide(nearly, manifest_mpp=0.5) as slide:
        assert slide.mpp == pytest.approx((0.5 + 1e4 / 20100) / 2)


# ---- files that are no slides, and broken ones ----------------------------------------------------------------


def test_not_a_slide(tmp_path):
    for name, content in {"words.svs": b"slide,path\n" * 50, "empty.tiff": b"", "zeros.ndpi": bytes(5000)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotASlideError, match="neither a slide that OpenSlide reads"):
            open_slide(tmp_path / name)
    with pytest.raises(NotASlideError, match="No such file"):
        open_slide(tmp_path / "absent.svs")
    with pytest.raises(NotASlideError, match="directory"):
        open_slide(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_plain_image_is_a_slide_of_one_level(tmp_path, suffix):
    image = noise(300, 200)
    Image.fromarray(image).save(tmp_path / f"a{suffix}")
    with pytest.raises(MppError, match="--mpp-override"):
        open_slide(tmp_path / f"a{suffix}")
    with open_slide(tmp_path / f"a{suffix}", mpp_override=0.5) as slide:
        assert slide.level0_size == (300, 200)
        np.testing.assert_array_equal(slide.read_patch(50, 60, 128, 128), image[60:188, 50:178])
        assert slide.read_thumbnail(2.0).image.shape == (50, 75, 3)


def test_images_that_8_bits_cannot_hold_are_refused(tmp_path):
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(NotASlideError, match="more than 8 bits"):
        open_slide(tmp_path / "deep.png", mpp_override=0.5)


def test_an_image_too_large_is_refused(tmp_path, monkeypatch):
    Image.fromarray(noise(300, 200)).save(tmp_path / "a.png")
    monkeypatch.setenv("G2L_MAX_IMAGE_PIXELS", "59999")
    with pytest.raises(NotASlideError, match="300 x 200 px by its header.*set G2L_MAX_IMAGE_PIXELS to more"):
        open_slide(tmp_path / "a.png", mpp_override=0.5)


def read_grid(path: Path, side: int) -> dict[tuple[int, int], np.ndarray]:
    """Every patch that can be read; {} if the file is no slide. Only SlideErrors may come."""
    patches = {}
    try:
        slide = open_slide(path, mpp_override=0.5)
    except NotASlideError:
        return patches
    with slide:
        for x in range(0, slide.level0_size[0] - side + 1, side):
            for y in range(0, slide.level0_size[1] - side + 1, side):
                try:
                    patches[x, y] = slide.read_patch(x, y, side, side)
                except ReadError:
                    continue
    return patches


def assert_no_invented_pixels(whole: Path, tmp_path: Path, shares: list[float], side: int) -> list[int]:
    """Cut a file at shares of its length: what is still read must equal the whole file's. Counts of read patches."""
    wanted, data = read_grid(whole, side), whole.read_bytes()
    cut, counts = tmp_path / f"cut{whole.suffix}", []
    for share in shares:
        cut.write_bytes(data[: int(share * len(data))])
        found = read_grid(cut, side)
        assert all(np.array_equal(patch, wanted[place]) for place, patch in found.items())
        counts.append(len(found))
    assert counts[0] == 0 < len(wanted)
    return counts


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("name", "quality"), [("a.tiff", None), ("a.tiff", 80), ("a.png", None), ("a.jpg", None)])
def test_truncated_files_never_give_invented_pixels(tmp_path, name, quality):
    image = noise(1024, 512)
    if name == "a.tiff":
        write_pyramid(tmp_path / name, image, mpp=0.5, quality=quality)
    else:
        Image.fromarray(image).save(tmp_path / name)
    assert_no_invented_pixels(tmp_path / name, tmp_path, [0.0001, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], 256)


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
def test_truncated_real_slide(real_slide, tmp_path):
    assert_no_invented_pixels(real_slide, tmp_path, [0.001, 0.2, 0.5, 0.6, 0.7, 0.95], 720)


def slide_with_a_bad_tile(path: Path) -> np.ndarray:
    """A lossless slide of 4 x 2 tiles of 256 px whose tile at (256, 0) does not decode; its true pixels."""
    image = noise(1024, 512)
    write_pyramid(path, image, mpp=0.5, downsamples=(1,), quality=None)
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))
    return image


def test_reading_goes_on_after_a_bad_tile(tmp_path):
    """OpenSlide refuses every call after its first error, so the handle must be opened anew, each time."""
    image = slide_with_a_bad_tile(tmp_path / "bad.tiff")
    with open_slide(tmp_path / "bad.tiff") as slide:
        for _ in range(2):
            with pytest.raises(ReadError, match=r"cannot decode 256 x 256 px at \(256, 0\), level 0"):
                slide.read_patch(256, 0, 256, 256)
            for x, y in [(0, 0), (512, 0), (256, 256)]:
                np.testing.assert_array_equal(slide.read_patch(x, y, 256, 256), image[y : y + 256, x : x + 256])
        with pytest.raises(ReadError):
            slide.read_thumbnail(8.0)


def test_a_file_that_goes_away_is_unreadable_not_a_crash(tmp_path):
    slide_with_a_bad_tile(tmp_path / "bad.tiff")
    with open_slide(tmp_path / "bad.tiff") as slide:
        (tmp_path / "bad.tiff").unlink()
        for _ in range(2):
            with pytest.raises(ReadError):
                slide.read_patch(256, 0, 256, 256)


# ---- thumbnails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mpp", "downsample"), [(8.0, 16), (4.0, 8), (0.5, 1), (0.1, 1), (1.3, 2)])
def test_thumbnail_covers_whole_pixels_of_level_0(noise_slide, mpp, downsample):
    thumbnail = noise_slide.read_thumbnail(mpp)
    level0 = tifffile.imread(noise_slide.path)
    height, width = 771 // downsample, 1028 // downsample
    assert thumbnail.downsample == downsample
    assert thumbnail.mpp == pytest.approx(0.499 * downsample)
    assert thumbnail.mpp <= max(mpp, 0.499)
    whole = level0[: height * downsample, : width * downsample]
    expected = whole.reshape(height, downsample, width, downsample, 3).mean((1, 3))
    assert np.abs(thumbnail.image - expected).max() <= 0.501


def test_thumbnail_of_a_pyramid_is_exact_too(painted_slide):
    """From level 2, rounded once, and then averaged: within one gray level of the mean of level 0."""
    thumbnail = painted_slide.read_thumbnail(4.0)
    assert thumbnail.downsample == 16
    expected = painted(WIDTH, HEIGHT).reshape(HEIGHT // 16, 16, WIDTH // 16, 16, 3).mean((1, 3))
    assert np.abs(thumbnail.image - expected).max() <= 1


@pytest.mark.parametrize("block", [1, 50, 64, 333])
def test_thumbnail_blocks_join_without_seams(noise_slide, monkeypatch, block):
    one_piece = noise_slide.read_thumbnail(4.0).image
    monkeypatch.setattr(slides, "THUMBNAIL_BLOCK_PX", block)
    np.testing.assert_array_equal(noise_slide.read_thumbnail(4.0).image, one_piece)


def test_thumbnail_of_a_slide_smaller_than_one_of_its_pixels(tmp_path):
    write_pyramid(tmp_path / "tiny.tiff", noise(24, 40), mpp=0.25, downsamples=(1,), quality=None)
    with open_slide(tmp_path / "tiny.tiff") as slide:
        assert slide.read_thumbnail(8.0).image.shape == (1, 1, 3)


# ---- fingerprints -------------------------------------------------------------------------------------------


def test_fingerprint_follows_content_not_name(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(5 << 20))
    (tmp_path / "a").write_bytes(content)
    shutil.copy(tmp_path / "a", tmp_path / "b")
    original = fingerprint(tmp_path / "a")
    assert original == fingerprint(tmp_path / "b")
    assert len(original) == 32
    for place in (0, len(content) // 2 + 7, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        (tmp_path / "b").write_bytes(changed)
        assert fingerprint(tmp_path / "b") != original
    (tmp_path / "b").write_bytes(content[: 3 << 20])
    assert fingerprint(tmp_path / "b") != original
    (tmp_path / "b").write_bytes(content + b"\0")
    assert fingerprint(tmp_path / "b") != original


def test_fingerprint_of_an_absent_file(tmp_path):
    with pytest.raises(G2LError, match="cannot read"):
        fingerprint(tmp_path / "absent")
