"""Plain images follow one rule as slides and as patches; equal losses are counted; nothing is said to be stored."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from g2l_core.errors import NotASlideError, ReadError
from g2l_core.patches.render import ImagePatches, read_image
from g2l_core.slides.limits import PIXELS
from g2l_core.slides.manifest import read_sources
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore
from g2l_core.tissue.glass import colored_glass
from tests.conftest import TEACHER
from tests.inputs.drawn import jfif, picture, write_tiles
from tests.patches.test_views import he_patch

SIDE = 224
ORIENTATION = 0x112


@pytest.fixture(scope="module")
def image():
    return np.ascontiguousarray(he_patch(3)[:SIDE, :SIDE])


def as_slide(path):
    with open_slide(path, mpp_override=0.5) as slide:
        return slide.read_patch(0, 0, SIDE, SIDE)


def png_16(path, image):
    """A 12-bit picture in a 16-bit RGB PNG, which Pillow cannot write."""
    import imagecodecs

    path.write_bytes(imagecodecs.png_encode(image.astype(np.uint16) << 4))


DEEP = {
    "RGB PNG": ("a.png", png_16),
    "gray PNG": ("a.png", lambda path, image: Image.fromarray(image[..., 0].astype(np.uint16) << 4).save(path)),
    "RGB TIFF": ("a.tif", lambda path, image: tifffile.imwrite(path, image.astype(np.uint16) << 4, photometric="rgb")),
    "gray TIFF": ("a.tif", lambda path, image: tifffile.imwrite(path, image[..., 0].astype(np.uint16) << 4)),
    "float TIFF": ("a.tif", lambda path, image: tifffile.imwrite(path, image[..., 0].astype(np.float32))),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_refused_by_both(tmp_path, image, kind):
    name, write = DEEP[kind]
    write(tmp_path / name, image)
    for read, error in ((as_slide, NotASlideError), (lambda path: read_image(path, SIDE), ReadError)):
        with pytest.raises(error, match="samples have more than 8 bits.*convert it to 8-bit RGB"):
            read(tmp_path / name)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
def test_a_tiled_tiff_of_more_than_8_bits_is_read_by_its_upper_8_and_noted(tmp_path, compression, bits):
    """OpenSlide reads it; libtiff rounds, so that the last bit may differ."""
    kind = {8: np.uint8, 16: np.uint16}[bits]
    pixels = np.random.default_rng(0).integers(0, 1 << bits, (512, 512, 3)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(256, 256), compression=compression)
    with open_slide(tmp_path / "a.tif", mpp_override=0.5) as slide:
        patch = slide.read_patch(0, 0, 512, 512)
        noted = [(note.text, note.detail) for note in slide.notes]
    assert noted == ([("more than 8 bits a sample: the upper 8 are read", "16 bits")] if bits == 16 else [])
    assert np.abs(patch.astype(int) - (pixels >> (bits - 8))).max() <= (bits == 16)


def with_exif(path, image, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(image).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
def test_both_turn_an_image_as_exif_says(tmp_path, image, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    with_exif(path, image, orientation)
    turned = {1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 6: np.rot90(image, -1), 8: np.rot90(image)}
    slide, patch = as_slide(path), read_image(path, SIDE)
    np.testing.assert_array_equal(slide, patch)
    assert np.abs(slide.astype(int) - turned[orientation]).mean() < (8 if suffix == ".jpg" else 0.01)
    with open_slide(path, mpp_override=0.5) as opened:
        assert [note.detail for note in opened.notes] == ([f"orientation {orientation}"] if orientation > 1 else [])
    patches = ImagePatches(tmp_path, [path.name], SIDE)
    np.testing.assert_array_equal(patches.read(0), patch)
    assert patches.turned == ({0} if orientation > 1 else set())


@pytest.mark.parametrize("more", [[], ["--local-workers", "1"]])
def test_images_that_were_turned_are_counted_one_by_one(tmp_path, image, more):
    """The first of the set is upright; of those that are turned, one cannot be decoded."""
    for name, orientations in (("a", [1, 6, 1, 3, 8]), ("b", [1, 1]), ("d", [8])):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i, orientation in enumerate(orientations):
            with_exif(tmp_path / f"in/{name}/{i}.jpg", np.roll(image, i + len(orientations), axis=0), orientation)
    torn = tmp_path / "in/a/4.jpg"
    torn.write_bytes(torn.read_bytes()[:2000])
    done = cache(tmp_path, tmp_path / "in", "--patch-px", str(SIDE), "--json", *more)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["unreadable"]) == ["a"]
    assert summary["notes"] == ["3 images turned upright as EXIF says: a (2), d (1)"]
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert {slide.slide_id: slide.facts.notes for slide in store.slides()} == {
        "a": ("turned upright as EXIF says",), "b": (), "d": ("turned upright as EXIF says",)
    }  # fmt: skip
    again = cache(tmp_path, tmp_path / "in", "--patch-px", str(SIDE), "--json")
    assert json.loads(again.stdout)["notes"] == []  # nothing is read again


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB with a transparent color"])
def test_both_put_white_behind_what_is_transparent(tmp_path, image, mode):
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:100], alpha[100:150] = 0, 128
    picture_, path = Image.fromarray(np.dstack([image, alpha]), "RGBA"), tmp_path / "a.png"
    if mode == "P":
        palette = Image.fromarray(image).quantize(64)
        palette.save(path, transparency=int(np.asarray(palette)[0, 0]))
    elif mode.startswith("RGB "):
        Image.fromarray(image).save(path, transparency=tuple(int(level) for level in image[0, 0]))
    elif mode == "PA":
        path = tmp_path / "a.webp"
        picture_.save(path, lossless=True, exact=True)
    else:
        picture_.convert(mode).save(path)
    slide, patch = as_slide(path), read_image(path, SIDE)
    np.testing.assert_array_equal(slide, patch)
    assert (patch[0, 0] == 255).all()
    if mode in {"RGBA", "PA"}:
        expected = image[100:150].astype(float) * 128 / 255 + 255 * 127 / 255
        assert np.abs(patch[100:150] - expected).max() <= 1
        np.testing.assert_array_equal(patch[150:], image[150:])


@pytest.mark.parametrize("reader", ["slide", "patch"])
@pytest.mark.parametrize("side", [14_000, 30_000])
def test_the_limit_of_an_image_names_its_remedy(tmp_path, monkeypatch, side, reader):
    if side == 14_000:
        monkeypatch.setenv(PIXELS, "100000000")
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    with pytest.raises((NotASlideError, ReadError), match=f"set {PIXELS} to more"):
        as_slide(tmp_path / "a.png") if reader == "slide" else read_image(tmp_path / "a.png", side)


def test_small_square_tiffs_are_patch_images(tmp_path, image, caplog):
    for name in ("tumor/1", "tumor/2", "stroma/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="rgb")
    with caplog.at_level(logging.WARNING):
        found = {source.slide_id: source.patch_ids for source in read_sources([tmp_path])}
    assert found == {"stroma": ("1.tif",), "tumor": ("1.tif", "2.tif")}
    assert "3 TIFF files are small, square and of one size: they are taken for patch images" in caplog.text
    np.testing.assert_array_equal(read_image(tmp_path / "tumor/1.tif", SIDE), image)


OTHERS = {
    "one of another size": lambda path, image: tifffile.imwrite(path, image[:200, :200], photometric="rgb"),
    "one that is not square": lambda path, image: tifffile.imwrite(path, image[:200], photometric="rgb"),
    "one with tiles": lambda path, image: tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64)),
    "one with two pages": lambda path, image: tifffile.imwrite(path, np.stack([image, image]), photometric="rgb"),
    "one that is broken": lambda path, _: path.write_bytes(b"no TIFF"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tiffs_are_slides_and_a_line_says_how_to_name_patches(tmp_path, image, caplog, kind):
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    OTHERS[kind](tmp_path / "b.tif", image)
    with caplog.at_level(logging.WARNING):
        assert not any(source.patch_ids for source in read_sources([tmp_path]))
    hint = "If they are patch images, name them in a manifest with a column patch_id"
    assert (hint in caplog.text) == (kind in {"one of another size", "one that is not square"})


def cache(folder, inputs, *options):
    command = [sys.executable, "-m", "pipeline.cli", "cache-teacher", str(inputs), "--store", f"{folder}/s.zarr"]
    command += ["--teacher", TEACHER, "--weights", "random:0", "--views", "0", "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_losses_that_are_the_same_are_one_line_and_nothing_is_said_to_be_stored(tmp_path, image):
    (tmp_path / "in").mkdir()
    for i in range(8):
        tifffile.imwrite(tmp_path / f"in/s{i}.tif", image[: 200 + i], photometric="rgb")
    done = cache(tmp_path, tmp_path / "in")
    assert done.returncode == 1, done.stderr
    assert "nothing is stored, 8 slides failed" in done.stdout
    assert "stored already" not in done.stdout
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert len(failed) == 1
    assert failed[0].startswith("failed  8 slides, s0, s1, s2, s3, s4 and 3 more: its header has no micrometers")


def test_what_is_not_as_expected_is_counted_in_the_summary(tmp_path):
    """Absent tiles, a padded level and colored glass in one run."""
    (tmp_path / "in").mkdir()
    image = picture(4, 4)
    image[:256] = 250
    low = np.pad(image[::4, ::4], ((0, 0), (0, 64), (0, 0)), constant_values=255)
    write_tiles(tmp_path / "in/absent.tif", image, jfif, photometric=6, absent=(5,))
    write_tiles(tmp_path / "in/padded.tif", image, jfif, photometric=6, levels=(low,))
    pink = image.copy()
    pink[:512] = (255, 140, 250)
    write_tiles(tmp_path / "in/pink.tif", pink, jfif, photometric=6)
    done = cache(tmp_path, tmp_path / "in", "--tissue", "otsu", "--min-tissue", "0", "--artifacts", "none", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["left_out"] == {"absent": 1}
    assert sorted(note.partition(" (")[0] for note in summary["notes"]) == [
        "1 slide: a lower level is padded, cut or of another aspect; another is read: padded",
        "1 slide: the brightest part is neither near white nor gray, so the colors may be decoded wrongly: pink",
    ]
    again = cache(tmp_path, tmp_path / "in", "--tissue", "otsu", "--min-tissue", "0", "--artifacts", "none")
    assert "all of them were stored already" in again.stdout
    assert "left out: 1 absent" in again.stdout


@pytest.mark.parametrize(("color", "is_colored"), [((255, 255, 255), False), ((230, 226, 235), False),
    ((90, 90, 95), False), ((255, 128, 128), True), ((255, 121, 255), True), ((0, 135, 0), True)])  # fmt: skip
def test_glass(color, is_colored):
    thumbnail = np.full((40, 40, 3), color, np.uint8)
    thumbnail[:20] = thumbnail[:20] // 3
    assert (colored_glass(thumbnail) is not None) == is_colored


def test_the_glass_of_real_tissue_is_not_colored(crc_patches):
    for path in sorted(crc_patches.glob("*.jpg")):
        assert colored_glass(np.asarray(Image.open(path).convert("RGB"))[::16, ::16]) is None
