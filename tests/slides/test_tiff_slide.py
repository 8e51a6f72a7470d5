"""OME-TIFF, TIFFs in strips and compressions that OpenSlide does not know, against tifffile's own reading."""

import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from g2l_core.errors import MppError, NotASlideError, ReadError
from g2l_core.slides.limits import PIXELS
from g2l_core.slides.readers import SlideHandle, open_handle
from g2l_core.slides.slide import open_slide, read_scale
from tests.slides.test_tiff_tiles import picture as he_picture


def picture(width=430, height=310):
    return he_picture(width, height)


TILED = {"tile": (128, 96)}
STRIPS = {"rowsperstrip": 50}
RGB = {"photometric": "rgb"}
CODINGS = {
    "none": {},
    "lzw": {"compression": "lzw"},
    "lzw with predictor": {"compression": "lzw", "predictor": True},
    "deflate": {"compression": "adobe_deflate"},
    "deflate with predictor": {"compression": "adobe_deflate", "predictor": True},
    "packbits": {"compression": "packbits"},
    "lzma": {"compression": "lzma"},
    "lzma with predictor": {"compression": "lzma", "predictor": True},
    "zstd": {"compression": "zstd"},
    "zstd with predictor": {"compression": "zstd", "predictor": True},
    "png": {"compression": "png"},
    "webp": {"compression": "webp"},
    "jpeg xl": {"compression": "jpegxl"},
    "jpeg 2000": {"compression": "jpeg2000"},
    "jpeg 2000 of Bio-Formats": {"compression": 33003},
    "jpeg 4:2:0": {"compression": "jpeg", "subsampling": (2, 2)},
    "jpeg of RGB": {"compression": "jpeg", "compressionargs": {"outcolorspace": "RGB"}},
}
OPENSLIDE_DOES_NOT = {"lzma", "lzma with predictor", "png", "webp", "jpeg xl", "jpeg 2000"}


def write_ome(path, *images, levels=(2, 4), layout=TILED, metadata=None, **coding):
    """An OME-TIFF with one series an image, and lower levels of the first in SubIFDs."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for i, image in enumerate(images):
            below = levels if i == 0 else ()
            about = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Name": f"image {i}", **(metadata or {})}
            tiff.write(image, subifds=len(below), metadata=about, **RGB | layout | coding)
            for factor in below:
                planes = coding.get("planarconfig") == "separate"
                smaller = image[:, ::factor, ::factor] if planes else image[::factor, ::factor]
                tiff.write(np.ascontiguousarray(smaller), subfiletype=1, **RGB | layout | coding)
    return path


def as_read_by_tifffile(path, level=0, series=0):
    with tifffile.TiffFile(path) as tiff:
        pixels = tiff.series[series].levels[level].asarray()
    return np.moveaxis(pixels, 0, -1) if pixels.shape[0] == 3 else pixels


def whole_level(path, level=0):
    with open_slide(path, mpp_override=0.5) as slide:
        width, height = slide._level_sizes[level]
        return slide._read((0, 0), level, (width, height))


@pytest.mark.parametrize("coding", CODINGS)
def test_every_level_of_an_ome_tiff_is_as_tifffile_reads_it(tmp_path, coding):
    path = write_ome(tmp_path / "a.ome.tif", picture(), **CODINGS[coding])
    for level in range(3):
        pixels, absent = whole_level(path, level)
        assert absent == 0
        np.testing.assert_array_equal(pixels, as_read_by_tifffile(path, level))


@pytest.mark.parametrize("coding", sorted(OPENSLIDE_DOES_NOT))
def test_a_tiled_tiff_that_openslide_refuses_is_as_tifffile_reads_it(tmp_path, coding):
    image, path = picture(), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 2):
            tiff.write(
                np.ascontiguousarray(image[::factor, ::factor]), subfiletype=int(factor > 1), metadata=None,
                resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **RGB | TILED | CODINGS[coding],
            )  # fmt: skip
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "header: tiff.XResolution")
    with tifffile.TiffFile(path) as tiff:
        for level, page in enumerate(tiff.pages):
            np.testing.assert_array_equal(whole_level(path, level)[0], page.asarray())


@pytest.mark.parametrize("coding", [name for name in CODINGS if "Bio" not in name])
def test_strips_are_as_tifffile_reads_them(tmp_path, coding):
    path = tmp_path / "a.tif"
    rows = {"rowsperstrip": 64}  # whole blocks of a JPEG with halved chroma
    tifffile.imwrite(path, picture(), metadata=None, **RGB | rows | CODINGS[coding])
    with tifffile.TiffFile(path) as tiff:
        np.testing.assert_array_equal(whole_level(path)[0], tiff.pages[0].asarray())
    assert read_scale_source(path, 0.5) == "override"


def read_scale_source(path, override=None):
    return read_scale(path, "a", mpp_override=override).scale.source


@pytest.mark.parametrize(("unit", "resolution", "mpp"), [("CENTIMETER", 40_000, 0.25), ("INCH", 50_800, 0.5)])
@pytest.mark.parametrize("orientation", [1, 3])
def test_strips_with_resolution_tags(tmp_path, unit, resolution, mpp, orientation):
    """A turned image is read by Pillow, and has the same scale."""
    path, image = tmp_path / "a.tif", picture(300, 200)
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(
        path, image, resolution=(resolution, resolution), resolutionunit=unit, metadata=None, extratags=tags, **RGB
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == "header: tiff.XResolution"
        expected = image[::-1, ::-1] if orientation == 3 else image
        np.testing.assert_array_equal(slide.read_patch(20, 30, 128, 128), expected[30:158, 20:148])


def test_a_resolution_of_a_printer_is_no_scale(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture(300, 200), resolution=(72, 72), resolutionunit="INCH", **RGB)
    with pytest.raises(MppError, match=r"tiff.XResolution gives 352.778 um/px, outside"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("layout", [TILED, STRIPS], ids=["tiles", "strips"])
@pytest.mark.parametrize("coding", ["none", "deflate with predictor", "jpeg 2000"])
def test_planes(tmp_path, layout, coding):
    image = np.ascontiguousarray(np.moveaxis(picture(), -1, 0))
    path = write_ome(tmp_path / "a.ome.tif", image, layout=layout, planarconfig="separate", **CODINGS[coding])
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].planarconfig == 2
    for level in range(3):
        np.testing.assert_array_equal(whole_level(path, level)[0], as_read_by_tifffile(path, level))


def test_patches_are_read_from_the_level_in_a_sub_directory(tmp_path):
    image = picture(1024, 768)
    path = write_ome(tmp_path / "a.ome.tif", image)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_patch(128, 256, 512, 256), image[256:768:2, 128:640:2])
        np.testing.assert_array_equal(slide.read_patch(128, 256, 256, 256), image[256:512, 128:384])
        beyond = slide.read_patch(900, 600, 256, 256)
        np.testing.assert_array_equal(beyond[:168, :124], image[600:, 900:])
        assert beyond[168:].min() == beyond[:, 124:].min() == 255
        assert slide.read_thumbnail(2.0).image.shape == (192, 256, 3)
        assert slide.notes == ()


# -- the scale --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "unit", "mpp"),
    [(0.5, None, 0.5), (0.25, "µm", 0.25), (0.25, "\u03bcm", 0.25), (250, "nm", 0.25), (2.5e-4, "mm", 0.25),
     (2.5e-5, "cm", 0.25)],
)  # fmt: skip
def test_units_of_the_pixel_size(tmp_path, size, unit, mpp):
    units = {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit} if unit else {}
    about = {"PhysicalSizeX": size, "PhysicalSizeY": size, **units}
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=(), metadata=about)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == "header: ome.PhysicalSizeX"
    assert read_scale_source(path) == "header: ome.PhysicalSizeX"


@pytest.mark.parametrize("unit", ["pixel", "reference frame"])
def test_what_is_no_length_is_refused(tmp_path, unit):
    about = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=(), metadata=about)
    with pytest.raises(MppError, match=f"PhysicalSizeX is given in {unit!r}, not in µm.*--mpp-override"):
        open_slide(path)
    with open_slide(path, manifest_mpp=0.5) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "manifest")


def test_without_a_size_the_resolution_tags_count(tmp_path):
    path = tmp_path / "a.ome.tif"
    resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture(300, 200), ome=True, **RGB | TILED | resolution)
    assert read_scale_source(path) == "header: tiff.XResolution"


# -- which image ------------------------------------------------------------------------------------------


def test_the_largest_rgb_image_is_the_slide_and_the_others_are_told(tmp_path):
    small, large = picture(200, 150), picture(700, 500)
    path = write_ome(tmp_path / "a.ome.tif", small, large, picture(300, 300), levels=())
    with open_slide(path) as slide:
        assert slide.level0_size == (700, 500)
        np.testing.assert_array_equal(slide.read_patch(0, 0, 256, 256), large[:256, :256])
        (note,) = slide.notes
    assert "largest RGB image is the slide" in note.text
    assert note.detail == "image 0, image 2"


def edited(path, pattern, replacement):
    """The file with another OME-XML."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["ImageDescription"]
        found, count = re.subn(pattern, replacement, tag.value)
        assert count
        tag.overwrite(found)
    return path


def test_other_files_of_a_multi_file_tiff_are_told(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", picture(700, 500), picture(200, 150), levels=())
    elsewhere = r'<TiffData IFD="0"\1><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>'
    edited(path, r'<TiffData IFD="1"([^>]*?)/>', elsewhere)
    with open_slide(path) as slide:
        assert [(note.text, note.detail) for note in slide.notes] == [
            ("a part of a multi-file OME-TIFF: images in other files are not read", "image 1")
        ]
    edited(path, r'<TiffData IFD="0"([^>]*?)/>', elsewhere)
    with pytest.raises(NotASlideError, match=r"pixels of 'image 0' are in another file, b.ome.tif"):
        open_slide(path)


def test_a_file_that_was_renamed_still_is_its_own(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=())
    with tifffile.TiffFile(path) as tiff:
        uuid = re.search(r'UUID="([^"]*)"', tiff.pages[0].description)[1]
    edited(path, r"<TiffData([^>]*?)/>", rf'<TiffData\1><UUID FileName="old.ome.tif">{uuid}</UUID></TiffData>')
    with open_slide(path) as slide:
        assert slide.level0_size == (300, 200)


def test_xml_that_is_in_a_companion_file(tmp_path):
    """The pixels can be read; the scale must be given."""
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=())
    edited(path, r"(?s)<OME.*", '<OME><BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:1"/></OME>')
    with pytest.raises(MppError):
        open_slide(path)
    with open_slide(path, manifest_mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_patch(0, 0, 128, 128), picture(300, 200)[:128, :128])


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_separate_channels_are_fluorescence(tmp_path, kind):
    channels = np.moveaxis(picture(300, 200), -1, 0).astype(kind)
    tifffile.imwrite(
        tmp_path / "a.ome.tif", channels, ome=True, photometric="minisblack", metadata={"axes": "CYX"}, **TILED
    )
    with pytest.raises(
        NotASlideError, match=f"fluorescence image: .* has 3 separate channels of {kind.__name__}. Expected 8-bit RGB"
    ):
        open_slide(tmp_path / "a.ome.tif")


def test_rgb_of_16_bits(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", picture(300, 200).astype(np.uint16), ome=True, **RGB | TILED)
    with pytest.raises(NotASlideError, match="3 samples of 16 bits a pixel. Expected 8-bit RGB: convert it"):
        open_slide(tmp_path / "a.ome.tif")


def test_a_compression_that_nobody_knows(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=(), compression="jpegxr")
    with pytest.raises(NotASlideError, match=r"compression 34934 \(JPEGXR\) and .* convert it to a tiled TIFF of RGB"):
        open_slide(path)


@pytest.mark.parametrize(
    ("pattern", "replacement", "told"),
    [
        ("SizeX=\"300\"", 'SizeX="301"', r"gives 'image 0' 301 x 200 px, but its page has 300 x 200"),
        ("IFD=\"0\"", 'IFD="7"', r"'image 0' on page 7 of 1"),
        ("SizeX=\"300\"", 'SizeX="many"', "OME-XML is broken"),
        ("<Pixels", "<Pixels<", "OME-XML is broken"),
        (r"^<\?xml[^>]*>", '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "aa">]>', "has a document type"),
    ],
)  # fmt: skip
def test_broken_xml(tmp_path, pattern, replacement, told):
    path = edited(write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=()), pattern, replacement)
    with pytest.raises(NotASlideError, match=told):
        open_slide(path)


def test_strips_that_are_too_many_to_be_held(tmp_path, monkeypatch):
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=(), layout=STRIPS)
    monkeypatch.setenv(PIXELS, "60000")
    with open_slide(path) as slide:
        assert slide.level0_size == (300, 200)
    monkeypatch.setenv(PIXELS, "59999")
    with pytest.raises(NotASlideError, match="300 x 200 px .* convert it to a tiled TIFF: its pixels lie in strips"):
        open_slide(path)


def test_a_tile_that_is_too_large(tmp_path, monkeypatch):
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=())
    monkeypatch.setenv(PIXELS, "9999")
    with pytest.raises(NotASlideError, match="a tile of its level of 300 x 200 px has 96 x 128 px"):
        open_slide(path)


@pytest.mark.parametrize("coding", ["deflate", "jpeg 2000", "webp", "png", "jpeg xl", "lzma"])
def test_a_tile_that_gives_another_size_than_its_header_is_damaged(tmp_path, coding):
    """The bytes of a larger image are put where those of a tile were."""
    path = write_ome(tmp_path / "a.ome.tif", picture(300, 200), levels=(), **CODINGS[coding])
    larger = write_ome(
        tmp_path / "b.ome.tif", picture(300, 200), levels=(), layout={"tile": (64, 32)}, **CODINGS[coding]
    )
    with tifffile.TiffFile(larger) as tiff:
        page = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[0])
        content = tiff.filehandle.read(page.databytecounts[0])
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.pages[0]
        assert len(content) <= page.databytecounts[0]
        tiff.filehandle.seek(page.dataoffsets[0])
        tiff.filehandle.write(content)
    with open_slide(path) as slide:
        with pytest.raises(ReadError, match="a tile is damaged"):
            slide.read_patch(0, 0, 64, 64)
        np.testing.assert_array_equal(
            slide.read_patch(200, 130, 64, 64), as_read_by_good(tmp_path, coding)[130:194, 200:264]
        )


def as_read_by_good(folder, coding):
    path = write_ome(folder / "good.ome.tif", picture(300, 200), levels=(), **CODINGS[coding])
    return as_read_by_tifffile(path)


def test_absent_tiles_are_counted_and_have_the_background(tmp_path):
    image = picture(384, 256)
    path = write_ome(tmp_path / "a.ome.tif", image, levels=())
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = tiff.pages[0].tags["TileByteCounts"]
        values = [*counts.value]
        values[0] = 0
        counts.overwrite(values)
    with open_slide(path) as slide:
        patch = slide.read_patch(0, 0, 192, 192)
        assert (patch[:128, :96] == 255).all()
        np.testing.assert_array_equal(patch[:, 96:], image[:192, 96:192])
        with pytest.raises(ReadError, match="33% of the patch"):
            slide.read_patch(0, 0, 192, 192, max_absent=0.05)


def test_the_handle_itself_follows_the_protocol(tmp_path):
    image = picture(300, 200)
    handle = open_handle(write_ome(tmp_path / "a.ome.tif", image, levels=(2,)))
    assert isinstance(handle, SlideHandle)
    region = np.asarray(handle.read_region((250, 150), 0, (100, 100)))
    np.testing.assert_array_equal(region[:50, :50, :3], image[150:, 250:])
    assert (region[:50, :50, 3] == 255).all()
    assert region[50:].max() == region[:, 50:].max() == 0
    handle.close()


def test_pillow_and_strips_agree_on_jpeg(tmp_path):
    """Such files were read by Pillow once, and are in stores."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), metadata=None, rowsperstrip=64, **RGB | CODINGS["jpeg 4:2:0"])
    with Image.open(path) as image:
        np.testing.assert_array_equal(whole_level(path)[0], np.asarray(image))
