"""The color space of a tile is what its own markers say, or the slide fails by name."""

import io
from functools import partial

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from g2l_core.errors import NotASlideError
from g2l_core.slides.color_space import jpeg_space
from g2l_core.slides.slide import open_slide
from g2l_core.types import Mpp
from tests.inputs.drawn import (
    APERIO,
    TILE,
    adobe,
    jfif,
    jpeg2000,
    named_rgb,
    picture,
    subsampled,
    write_dicom,
    write_tiles,
)
from tests.slides.test_readers import HEIGHT, TIFF_KINDS, WIDTH

RGB, YCBCR = 2, 6
BASELINE, JPEG2000 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.91"
SIDE = 3 * TILE


@pytest.fixture(scope="module")
def image():
    return picture()


def by_pillow(encode, image):
    """What Pillow decodes from each tile."""
    decoded = np.empty_like(image)
    for y in range(0, SIDE, TILE):
        for x in range(0, SIDE, TILE):
            code = encode(np.ascontiguousarray(image[y : y + TILE, x : x + TILE]))
            decoded[y : y + TILE, x : x + TILE] = np.asarray(Image.open(io.BytesIO(code)).convert("RGB"))
    return decoded


CASES = {
    "RGB by the tag, JFIF": (jfif, RGB, True),
    "RGB by the tag, half the chroma": (subsampled, RGB, True),
    "YCbCr by the tag, RGB by Adobe": (adobe, YCBCR, True),
    "YCbCr by the tag, components R, G, B": (named_rgb, YCBCR, True),
    "RGB, Adobe": (adobe, RGB, False),
    "RGB, components R, G, B": (named_rgb, RGB, False),
    "YCbCr, JFIF": (jfif, YCBCR, False),
    "YCbCr, half the chroma": (subsampled, YCBCR, False),
}


@pytest.mark.parametrize("own_tiles", [True, False])
@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
@pytest.mark.parametrize("case", CASES)
def test_the_markers_of_a_jpeg_tile_decide(tmp_path, image, case, vendor, own_tiles):
    encode, tag, contradicts = CASES[case]
    description = APERIO.format(SIDE, SIDE, TILE) if vendor == "aperio" else None
    path = write_tiles(tmp_path / "a.svs", image, encode, photometric=tag, description=description)
    expected = by_pillow(encode, image)
    with openslide.OpenSlide(path) as raw:
        assert raw.properties["openslide.vendor"] == vendor
        theirs = np.asarray(raw.read_region((0, 0), 0, (SIDE, SIDE)))[..., :3]
    assert (np.abs(theirs.astype(int) - expected).mean() > 20) == contradicts
    with open_slide(path, own_tiles=own_tiles) as slide:
        np.testing.assert_array_equal(slide.read_patch(0, 0, SIDE, SIDE), expected)
        thumbnail = slide.read_thumbnail(Mpp(8.0)).image
        beyond = slide.read_patch(SIDE - 100, SIDE - 100, 200, 200)
    assert np.abs(thumbnail.mean((0, 1)) - expected.mean((0, 1))).max() < 2
    np.testing.assert_array_equal(beyond[:100, :100], expected[-100:, -100:])
    assert (beyond[100:] == 255).all()


@pytest.mark.parametrize(("compression", "mct"), [(33003, True), (33005, True), (33005, False)])
def test_the_transform_of_a_jpeg_2000_codestream_decides(tmp_path, image, compression, mct):
    encode = partial(jpeg2000, mct=mct)
    path = write_tiles(
        tmp_path / "a.svs", image, encode, compression=compression, description=APERIO.format(SIDE, SIDE, TILE)
    )
    with open_slide(path) as slide:
        found = slide.read_patch(0, 0, SIDE, SIDE)
    np.testing.assert_array_equal(found[:TILE, :TILE], imagecodecs.jpeg2k_decode(encode(image[:TILE, :TILE].copy())))
    np.testing.assert_array_equal(found, tifffile.imread(path))


@pytest.mark.parametrize("vendor", ["leica", "trestle", "philips", "huron", "argos"])
def test_a_contradiction_in_a_format_that_only_openslide_reads(tmp_path, vendor):
    tags = TIFF_KINDS[vendor][0]
    for photometric in (YCBCR, RGB):
        path = tmp_path / f"{photometric}.tif"
        write_tiles(path, picture(WIDTH // TILE, HEIGHT // TILE), jfif, photometric=photometric, tags=tags)
        with openslide.OpenSlide(path) as raw:
            assert raw.properties["openslide.vendor"] == vendor
    open_slide(tmp_path / f"{YCBCR}.tif").close()
    with pytest.raises(NotASlideError, match=r"coded in another color space than its TIFF tags say .* correct the tag"):
        open_slide(tmp_path / f"{RGB}.tif")


@pytest.mark.parametrize(
    ("encode", "syntax", "photometric", "refused"),
    [
        (partial(jpeg2000, mct=False), JPEG2000, "YBR_ICT", "no component transform"),
        (partial(jpeg2000, mct=False), JPEG2000, "YBR_RCT", "no component transform"),
        (jfif, BASELINE, "RGB", "YCBCR by their own markers"),
        (adobe, BASELINE, "YBR_FULL_422", "RGB by their own markers"),
        (jpeg2000, JPEG2000, "YBR_ICT", ""),
        (jpeg2000, JPEG2000, "RGB", ""),
        (adobe, BASELINE, "RGB", ""),
        (jfif, BASELINE, "YBR_FULL_422", ""),
    ],
)
def test_dicom(tmp_path, image, encode, syntax, photometric, refused):
    path = write_dicom(tmp_path / "a.dcm", image, encode, syntax, photometric)
    if refused:
        with pytest.raises(NotASlideError, match=f"its header says {photometric}.*{refused}"):
            open_slide(path)
        return
    with open_slide(path) as slide:
        found = slide.read_patch(0, 0, SIDE, SIDE)
    assert np.abs(found.astype(int) - image).mean() < 4


@pytest.mark.parametrize("code", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\1", bytes(100)])
def test_a_damaged_tile_decides_nothing(code):
    assert jpeg_space(code) is None
