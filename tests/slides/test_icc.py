"""--icc: pixels in sRGB by the profile that a file carries, against Pillow's own conversion of the drawn image."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageCms

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import NotASlideError, ReadError, StoreMismatchError
from g2l_core.extraction import proof
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.render import ImagePatches, read_image
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.icc import NO_PROFILE, to_srgb
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore
from g2l_core.types import Level0Px, Mpp
from pipeline.cache_teacher import run_extraction
from pipeline.settings import ExtractionSettings
from tests.conftest import TEACHER
from tests.patches.test_views import he_patch


def profile(changes=((0, 0.6), (1, 0.75)), size=64):
    """An RGB profile that is no sRGB: Pillow's, with the primaries of red and green moved."""
    known = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(known[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(int.from_bytes(known[128:132]))}
    for channel, factor in changes:
        at = int.from_bytes(known[tags[(b"rXYZ", b"gXYZ", b"bXYZ")[channel]] + 4 :][:4]) + 8
        for place in (at, at + 4, at + 8):
            value = int.from_bytes(known[place : place + 4], signed=True)
            known[place : place + 4] = int(value * factor).to_bytes(4, signed=True)
    return bytes(known)


PROFILE = profile()


def by_pillow(image, icc=PROFILE):
    source = ImageCms.getOpenProfile(BytesIO(icc))
    intent = ImageCms.getDefaultIntent(source)
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(image), source, srgb, renderingIntent=intent))


IMAGE = np.tile(he_patch(3), (2, 3, 1))


def write_tiff(path, image=IMAGE, icc=PROFILE, **options):
    extra = [(34675, 7, len(icc), icc, True)] if icc else []
    options = {"tile": (256, 256), "compression": "zlib", **options}
    tifffile.imwrite(
        path, image, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER", extratags=extra,
        **options,
    )  # fmt: skip
    return path


def reader_of(slide):
    return type(slide._handle).__name__


@pytest.mark.parametrize(
    ("name", "options", "reader"),
    [
        ("generic.tiff", {}, "OpenSlide"),
        ("strips.tiff", {"tile": None, "rowsperstrip": 64}, "TiffSlide"),
        ("slide.ome.tiff", {"metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}, "TiffSlide"),
    ],
)
def test_a_slide_is_converted_as_pillow_converts_it(tmp_path, name, options, reader):
    path = write_tiff(tmp_path / name, **options)
    expected = by_pillow(IMAGE)
    assert np.abs(expected.astype(int) - IMAGE).mean() > 5
    with open_slide(path, icc=True) as slide, open_slide(path) as plain:
        assert reader_of(slide) == reader
        assert NO_PROFILE not in {note.text for note in slide.notes}
        patch = slide.read_patch(256, 256, Level0Px(256), 256)
        np.testing.assert_array_equal(patch, expected[256:512, 256:512])
        np.testing.assert_array_equal(plain.read_patch(256, 256, Level0Px(256), 256), IMAGE[256:512, 256:512])
        thumbnail = slide.read_thumbnail(Mpp(slide.mpp)).image
        np.testing.assert_array_equal(thumbnail, expected[: thumbnail.shape[0], : thumbnail.shape[1]])


def test_a_patch_that_is_shrunk_is_converted_before(tmp_path):
    with open_slide(write_tiff(tmp_path / "s.tiff"), icc=True) as slide:
        found = slide.read_patch(0, 0, Level0Px(512), 256)
    expected = cv2.resize(by_pillow(IMAGE)[:512, :512], (256, 256), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(found, expected)


def test_a_slide_without_a_profile_is_told_and_stays_as_it_is(tmp_path):
    with open_slide(write_tiff(tmp_path / "s.tiff", icc=b""), icc=True) as slide:
        assert [note.text for note in slide.notes] == [NO_PROFILE]
        np.testing.assert_array_equal(slide.read_patch(0, 0, Level0Px(256), 256), IMAGE[:256, :256])


def test_own_tiles_and_openslide_agree(tmp_path):
    path = write_tiff(tmp_path / "s.tiff", compression="jpeg")
    with open_slide(path, icc=True) as own, open_slide(path, icc=True, own_tiles=False) as theirs:
        patches = [slide.read_patch(100, 60, Level0Px(256), 256) for slide in (own, theirs)]
    np.testing.assert_array_equal(*patches)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_patch_images_are_converted_too(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(he_patch(1)).save(tmp_path / f"with.{suffix}", icc_profile=PROFILE, **options)
    Image.fromarray(he_patch(1)).save(tmp_path / f"without.{suffix}", **options)
    names = [f"with.{suffix}", f"without.{suffix}"]
    plain, converted = (ImagePatches(tmp_path, names, 256, icc=icc) for icc in (False, True))
    np.testing.assert_array_equal(converted.read(0), by_pillow(plain.read(0)))
    np.testing.assert_array_equal(converted.read(1), plain.read(1))
    np.testing.assert_array_equal(plain.read(0), plain.read(1))
    assert (plain.unprofiled, converted.unprofiled) == (set(), {1})


def gray_profile():
    """An RGB profile whose header says it is for gray: the smallest file that such a message needs."""
    return PROFILE[:16] + b"GRAY" + PROFILE[20:]


@pytest.mark.parametrize(
    ("icc", "says"),
    [(b"no profile at all", "cannot be used|cannot be read"), (gray_profile(), "for GRAY and not for RGB")],
)
def test_a_profile_that_cannot_be_used_is_a_reason(tmp_path, icc, says):
    path = write_tiff(tmp_path / "s.tiff", icc=icc, tile=None, rowsperstrip=64)
    with pytest.raises(NotASlideError, match=says):
        open_slide(path, icc=True)
    open_slide(path).close()
    Image.fromarray(he_patch(1)).save(tmp_path / "p.png", icc_profile=icc)
    with pytest.raises(ReadError, match=says):
        read_image(tmp_path / "p.png", 256, icc=True)
    read_image(tmp_path / "p.png", 256)


def test_a_conversion_is_the_same_in_threads():
    images = [he_patch(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(to_srgb(PROFILE), images))
    for image, converted in zip(images, found, strict=True):
        np.testing.assert_array_equal(converted, by_pillow(image))


def test_a_grid_without_it_is_stored_as_before():
    assert "icc" not in GridSpec().to_json()
    assert GridSpec.from_json(GridSpec().to_json()) == GridSpec()
    with_icc = GridSpec(icc=True)
    assert GridSpec.from_json(json.loads(json.dumps(with_icc.to_json()))) == with_icc


def test_a_store_keeps_it_and_tells_what_had_no_profile(tmp_path):
    """Features are those of the converted pixels; another command with the store's own grid converts too."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    write_tiff(inputs / "with.tiff")
    write_tiff(inputs / "without.tiff", image=255 - IMAGE // 2, icc=b"")
    (tmp_path / "set").mkdir()
    for name, icc in (("a.png", PROFILE), ("b.png", b"")):
        Image.fromarray(he_patch(len(icc) % 7)).save(tmp_path / "set" / name, icc_profile=icc)
    teacher, how = resolve_encoder(TEACHER, weights="random:0"), ExtractionSettings(views=0, pictures=False)
    grid = GridSpec(tissue="none", artifacts=(), icc=True)
    store, given = tmp_path / "s.zarr", [inputs, tmp_path / "set"]
    summary = run_extraction(given, store, [teacher], grid, ViewSpec(), how)
    assert not summary.failed_slides
    told = "\n".join(summary.notes)
    assert f"1 slide: {NO_PROFILE}: without" in told
    assert f"1 image {NO_PROFILE}: set (1)" in told
    opened = FeatureStore.open(store)
    assert opened.grid["icc"] is True
    plain = tmp_path / "plain.zarr"
    without = GridSpec(tissue="none", artifacts=())
    run_extraction(given, plain, [teacher], without, ViewSpec(), how)
    other = FeatureStore.open(plain)
    assert "icc" not in other.grid
    for slide_id, differs in (("with", True), ("without", False)):
        ours, theirs = (one.slide(slide_id).pixel_hash[:, 0] for one in (opened, other))
        assert (ours != theirs).all() == differs
    rows = np.arange(2)
    (compared,), failed = proof._open(opened, summary.encoders[0], {"with": rows})  # what --recompute reads again
    corners = opened.slide("with").coords[rows].tolist()
    expected = [by_pillow(IMAGE[y : y + 256, x : x + 256]) for x, y in corners]
    assert not failed
    np.testing.assert_array_equal(compared.read(1.0, 0.0, 256), expected)
    with pytest.raises(StoreMismatchError, match="icc"):
        run_extraction(
            [inputs, tmp_path / "set"], store, [teacher], GridSpec(tissue="none", artifacts=()), ViewSpec(), how
        )


@pytest.mark.skipif(not os.environ.get("G2L_TEST_DATA"), reason="real slides: set G2L_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "scale", "has_profile"),
    [("CMU-1-Small-Region.svs", {}, False), ("tcga-cr-7395-01a-01-ts1.svs", {"mpp_override": 0.5}, True)],
)
def test_a_real_slide_is_told_or_converted(name, scale, has_profile):
    path = Path(os.environ["G2L_TEST_DATA"]) / "slides" / name
    with openslide.OpenSlide(path) as theirs, open_slide(path, icc=True, **scale) as ours:
        source = theirs.color_profile
        assert (source is not None) == has_profile
        with open_slide(path, **scale) as plain:
            patch = plain.read_patch(512, 512, Level0Px(256), 256)
        found = ours.read_patch(512, 512, Level0Px(256), 256)
        expected = patch if source is None else by_pillow(patch, source.tobytes())
        np.testing.assert_array_equal(found, expected)
        assert (NO_PROFILE in {note.text for note in ours.notes}) == (source is None)
