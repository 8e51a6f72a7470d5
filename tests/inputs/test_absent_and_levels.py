"""Tiles that a file does not have, and lower levels that are not level 0."""

import numpy as np
import pytest
import tifffile

from g2l_core.errors import AbsentPixelsError
from g2l_core.patches.artifacts import ArtifactSpec
from g2l_core.patches.render import SlidePatches, render_block
from g2l_core.patches.views import ViewSpec, sample_views
from g2l_core.slides.slide import ABSENT_SHARE, open_slide
from g2l_core.store.schema import STATUS
from g2l_core.types import Level0Px, Mpp
from tests.inputs.drawn import APERIO, TILE, adobe, jfif, picture, write_tiles
from tests.slides.test_readers import noise, write_ome_zarr

SIDE = 3 * TILE
RGB, YCBCR = 2, 6


@pytest.fixture(scope="module")
def image():
    return picture()


def without_offset(path, index):
    """The file, with a tile whose offset is zero but whose length is not."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        tag.overwrite([0 if i == index else at for i, at in enumerate(tag.value)])


@pytest.mark.parametrize("photometric", [YCBCR, RGB])
@pytest.mark.parametrize("how", ["length", "offset"])
@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
def test_a_patch_of_absent_tiles_gets_a_code(tmp_path, image, vendor, how, photometric):
    """RGB is the tag that the tiles contradict, so that only their own decoder reads them."""
    description = APERIO.format(SIDE, SIDE, TILE) if vendor == "aperio" else None
    absent = (4,) if how == "length" else ()
    path = write_tiles(tmp_path / "a.svs", image, jfif, photometric=photometric, description=description, absent=absent)
    if how == "offset":
        without_offset(path, 4)
    inside = TILE + TILE // 2
    few = round(TILE * ABSENT_SHARE)
    places = {
        (0, 0): 0.0,
        (0, TILE): 0.0,
        (TILE + TILE - few + 1, TILE): (few - 1) / TILE,
        (TILE + TILE - few - 2, TILE): (few + 2) / TILE,
        (inside, TILE): 0.5,
        (TILE, TILE): 1.0,
    }
    coords = np.array(list(places), np.int32)
    spec = ViewSpec()
    params = sample_views(spec, "a", coords, range(1))
    with open_slide(path) as slide:
        reader = SlidePatches(slide, coords, Level0Px(TILE), spec.patch_px)
        block = render_block(
            reader, range(len(coords)), params, np.zeros(len(coords), np.uint8), spec, ArtifactSpec(names=())
        )
        again = render_block(reader, range(len(coords)), params, np.zeros(len(coords), np.uint8), spec)
        with pytest.raises(
            AbsentPixelsError, match="100% of the patch at 256, 256 lie in tiles that the file does not"
        ):
            slide.read_patch(TILE, TILE, Level0Px(TILE), TILE, ABSENT_SHARE)
    expected = [STATUS["absent"] if share > ABSENT_SHARE else STATUS["ok"] for share in places.values()]
    assert block.status.tolist() == expected
    assert not block.reasons
    assert (again.status == 0).all()  # stored views are rendered as before


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
def test_tiles_that_only_a_lower_level_lacks_are_read_from_level_0(tmp_path, image, vendor):
    description = APERIO.format(SIDE, SIDE, TILE) if vendor == "aperio" else None
    big = np.tile(image, (2, 2, 1))
    lower = np.ascontiguousarray(big.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)).astype(np.uint8))
    path = write_tiles(
        tmp_path / "a.svs", big, adobe, levels=(lower,), absent=[(1, i) for i in range(9)], description=description
    )
    with open_slide(path, mpp_override=0.5) as slide:
        assert len(slide._downsamples) == 2
        patch = slide.read_patch(0, 0, Level0Px(2 * TILE), TILE, ABSENT_SHARE)
        thumbnail = slide.read_thumbnail(Mpp(8.0)).image
        assert [(note.text, note.detail) for note in slide.notes] == [
            ("a lower level has absent tiles; another is read", "level 1")
        ]
    assert np.abs(patch.astype(int) - lower[:TILE, :TILE]).mean() < 6
    assert np.abs(thumbnail.mean((0, 1)) - big.mean((0, 1))).max() < 3


def padded(level, right, bottom):
    return np.pad(level, ((0, bottom), (0, right), (0, 0)), constant_values=255)


BIG = (2048, 1536)
LEVELS = {
    "as it should be": (lambda low: low, None, 1.0, False),
    "padded at the right": (lambda low: padded(low, 256, 0), None, 1.0, True),
    "padded below": (lambda low: padded(low, 0, 256), None, 1.0, True),
    "cut": (lambda low: low[:-64], None, 1.0, True),
    "squeezed": (lambda low: low[:, ::2], None, 1.0, True),
    "padded with the same aspect": (lambda low: padded(low, 32, 24), None, 1.0, True),
    "padded far with the same aspect": (lambda low: padded(low, 128, 96), (2e4, 5e3), 1.0, True),
    "rounded": (lambda low: low[:-1], None, 1.0, False),
}


def tissue_on_the_right(width, height):
    image = np.full((height, width, 3), 240, np.uint8)
    image[height // 2 :, width // 2 :] = picture(width // 512, height // 512)[: height // 2, : width // 2] // 2
    return image


@pytest.mark.parametrize("case", LEVELS)
def test_a_lower_level_is_read_only_if_it_is_level_0(tmp_path, case):
    change, resolutions, _, is_refused = LEVELS[case]
    image = tissue_on_the_right(*BIG)
    low = image.reshape(BIG[1] // 4, 4, BIG[0] // 4, 4, 3).mean((1, 3)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for i, level in enumerate((image, np.ascontiguousarray(change(low)))):
            at = resolutions[i] if resolutions else 2e4
            tiff.write(
                level, tile=(256, 256), photometric="rgb", resolution=(at, at), resolutionunit="CENTIMETER",
                metadata=None, subfiletype=int(i > 0),
            )  # fmt: skip
    with open_slide(tmp_path / "a.tif") as slide:
        assert len(slide._downsamples) == 2
        thumbnail = slide.read_thumbnail(Mpp(8.0)).image
        texts = [note.text for note in slide.notes]
    expected = image.reshape(BIG[1] // 16, 16, BIG[0] // 16, 16, 3).mean((1, 3))
    assert bool(texts) == is_refused
    assert set(texts) <= {"a lower level is padded, cut or of another aspect; another is read"}
    if case != "rounded":
        assert thumbnail.shape == expected.shape
        assert np.abs(thumbnail - expected).max() < 4


@pytest.mark.parametrize(("pad", "is_refused"), [(0, False), (64, True)])
def test_the_levels_of_an_ome_zarr_are_held_against_their_scales(tmp_path, pad, is_refused):
    image = noise(1024, 1024)
    low = padded(image[::4, ::4], pad, pad)
    path = write_ome_zarr(tmp_path / "a.zarr", [image, low])
    if pad:
        metadata = path / "zarr.json"
        text = metadata.read_text()
        factor = 1024 / (256 + pad)
        metadata.write_text(text.replace(str(0.25 * factor), "1.0"))
        assert metadata.read_text() != text
    with open_slide(path) as slide:
        assert bool(slide.notes) == is_refused


ZARR = {
    "Zarr 2": {"version": "0.4"},
    "Zarr 2, nested, channels together": {
        "version": "0.4", "axes": "yxc", "chunks": (TILE, TILE, 3),
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    },
    "Zarr 3": {"version": "0.5"},
    "Zarr 3, white by default": {"version": "0.5", "fill_value": 255},
    "Zarr 3, shards": {"version": "0.5", "axes": "cyx", "chunks": (1, TILE, TILE), "shards": (3, 2 * TILE, 2 * TILE)},
    "Zarr 3, shards of one chunk": {
        "version": "0.5", "axes": "cyx", "chunks": (3, TILE, TILE), "shards": (3, TILE, TILE)
    },
}  # fmt: skip


def zarr_with_hole(path, levels, hole, *, stored=False, **options):
    """An OME-Zarr whose levels have the fill value in some places, which is written to the disk or is not.

    `hole` has (level, column, row, channels), the middle two in tiles.
    """
    fill = options.get("fill_value", 0)
    levels = [level.copy() for level in levels]
    for level, column, row, channels in hole:
        levels[level][row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE, channels] = fill
    options = {"fill_value": fill, **options}
    return levels, write_ome_zarr(path, levels, config={"write_empty_chunks": stored}, **options)


@pytest.mark.parametrize(
    ("layout", "channels"),
    [(layout, [0, 1, 2]) for layout in ZARR] + [(name, [1]) for name in ("Zarr 2", "Zarr 3", "Zarr 3, shards")],
)
def test_chunks_that_are_not_stored_are_absent_pixels(tmp_path, image, layout, channels):
    drawn, path = zarr_with_hole(tmp_path / "a.zarr", [image], [(0, 1, 1, channels)], **ZARR[layout])
    few = round(TILE * ABSENT_SHARE)
    with open_slide(path) as slide:
        for x, absent in ((0, 0), (few - 1, few - 1), (few + 2, few + 2), (TILE, TILE), (2 * TILE, 0)):
            expected = drawn[0][TILE : 2 * TILE, x : x + TILE].copy()
            expected[:, max(TILE - x, 0) : max(TILE - x, 0) + absent] = 255
            np.testing.assert_array_equal(slide.read_patch(x, TILE, Level0Px(TILE), TILE), expected)
            if absent / TILE <= ABSENT_SHARE:
                slide.read_patch(x, TILE, Level0Px(TILE), TILE, ABSENT_SHARE)
            else:
                with pytest.raises(AbsentPixelsError, match=f"{absent / TILE:.0%} of the patch at {x}, 256"):
                    slide.read_patch(x, TILE, Level0Px(TILE), TILE, ABSENT_SHARE)


@pytest.mark.parametrize("layout", ZARR)
def test_a_stored_chunk_of_the_fill_value_is_a_real_one(tmp_path, image, layout):
    drawn, path = zarr_with_hole(tmp_path / "a.zarr", [image], [(0, 1, 1, [0, 1, 2])], stored=True, **ZARR[layout])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_patch(0, 0, SIDE, SIDE, 0.0), drawn[0])


def test_pixels_of_the_values_that_tell_absence_are_read(tmp_path, image):
    image = np.where(image < 128, 1, 2).astype(np.uint8)
    path = write_ome_zarr(tmp_path / "a.zarr", [image])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_patch(0, 0, SIDE, SIDE, 0.0), image)


@pytest.mark.parametrize("layout", ZARR)
def test_a_level_without_chunks_is_read_from_level_0(tmp_path, image, layout):
    big = np.tile(image, (2, 2, 1))
    lower = np.ascontiguousarray(big.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)).astype(np.uint8))
    hole = [(1, column, row, [0, 1, 2]) for column in range(3) for row in range(3)]
    _, path = zarr_with_hole(tmp_path / "a.zarr", [big, lower], hole, **ZARR[layout])
    with open_slide(path) as slide:
        patch = slide.read_patch(0, 0, Level0Px(2 * TILE), TILE, ABSENT_SHARE)
        thumbnail = slide.read_thumbnail(Mpp(8.0)).image
        assert [(note.text, note.detail) for note in slide.notes] == [
            ("a lower level has absent tiles; another is read", "level 1")
        ]
    assert np.abs(patch.astype(int) - lower[:TILE, :TILE]).max() <= 1
    assert np.abs(thumbnail.mean((0, 1)) - big.mean((0, 1))).max() < 3


@pytest.mark.parametrize("layout", ZARR)
def test_a_level_that_lacks_what_level_0_lacks_is_read(tmp_path, image, layout):
    big = np.tile(image, (2, 2, 1))
    hole = [(0, column, row, [0, 1, 2]) for column in (0, 1, 2, 3) for row in (0, 1, 2, 3)]
    hole += [(1, column, row, [0, 1, 2]) for column in (0, 1) for row in (0, 1)]
    _, path = zarr_with_hole(tmp_path / "a.zarr", [big, big[::2, ::2]], hole, **ZARR[layout])
    with open_slide(path) as slide:
        assert slide.notes == ()
        thumbnail = slide.read_thumbnail(Mpp(8.0)).image
    assert (thumbnail[: 2 * TILE // 16, : 2 * TILE // 16] == 255).all()
