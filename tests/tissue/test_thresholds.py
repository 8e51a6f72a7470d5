"""Tissue: against planted truth, on empty and on full slides, and on a real one."""

import functools

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import NoTissueError, UnknownNameError, UsageError
from g2l_core.extraction.patching import patch_source, patch_sources
from g2l_core.patches.grid import GridSpec
from g2l_core.slides.manifest import Source, read_sources
from g2l_core.slides.slide import open_slide
from g2l_core.synthetic.cohort import CohortSpec, draw_slide, write_pyramid
from g2l_core.tissue.methods import resolve_tissue
from g2l_core.tissue.thresholds import SMALLEST_TISSUE_UM2, THUMBNAIL_MPP, color_tissue, otsu_tissue

PINK, GLASS = (205, 130, 170), (243, 242, 240)


def flat_slide(path, color, *, size=(1024, 768), noise=3.0, seed=0):
    """A slide of one color with a scanner's noise."""
    grain = np.random.default_rng(seed).normal(0, noise, (size[1], size[0], 3))
    image = np.clip(np.array(color) + grain, 0, 255).astype(np.uint8)
    write_pyramid(path, image, mpp=0.5, downsamples=(1,))
    return Source(slide_id=path.stem, path=path)


@functools.cache
def drawn(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn slide's thumbnail at 8 um/px, bool (96, 128), and where tissue covers half of its pixels."""
    spec = CohortSpec(size_um=(1024.0, 768.0), mpp=(1.0, 0.5), seed=3)
    image, classes = draw_slide(spec, index)
    thumbnail = shrunk(image, round(THUMBNAIL_MPP / spec.mpp[spec.center(index)]))
    covered = cv2.resize((classes > 0).astype(np.float32), thumbnail.shape[1::-1], interpolation=cv2.INTER_AREA)
    return thumbnail, covered >= 0.5


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in image.shape[:2])
    return cv2.resize(image[: height * factor, : width * factor], (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_mask_agrees_with_the_planted_truth(index):
    """Intersection over union of .96 to .97 measured on both centers; lumina are small and are filled on purpose."""
    thumbnail, truth = drawn(index)
    mask = otsu_tissue(thumbnail, THUMBNAIL_MPP)
    assert mask.shape == (96, 128)
    assert 0.3 < truth.mean() < 0.9
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93
    assert abs(mask.mean() - truth.mean()) < 0.03


# ---- by color ----------------------------------------------------------------------------------------------

INKS = {"blue": (40, 60, 160), "green": (30, 140, 90), "red": (205, 30, 45), "black": (30, 30, 34)}


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_color_agrees_with_the_planted_truth(index):
    """Intersection over union of .93 to .95 measured: the majority rounds corners off."""
    thumbnail, truth = drawn(index)
    mask = color_tissue(thumbnail, THUMBNAIL_MPP)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.91
    assert abs(mask.mean() - truth.mean()) < 0.03


@pytest.mark.parametrize("ink", INKS)
def test_color_leaves_pen_out_where_otsu_keeps_it(ink):
    """A stroke 400 um wide across tissue and glass; on tissue the ink takes its share of the light as well."""
    thumbnail, truth = (part.copy() for part in drawn(0))
    stroke = np.zeros(truth.shape, bool)
    stroke[:, 40:90] = True
    thumbnail[stroke] = INKS[ink] * (thumbnail[stroke] / 243.0) ** 0.3
    mask = color_tissue(thumbnail, THUMBNAIL_MPP)
    inner = np.zeros_like(stroke)
    inner[:, 47:83] = True
    assert not mask[inner].any()
    outside = ~stroke & truth
    assert (mask & outside).sum() / outside.sum() > 0.9
    if ink != "black":
        assert otsu_tissue(thumbnail, THUMBNAIL_MPP)[inner].mean() > 0.9


def test_color_leaves_the_black_border_of_a_scan_out():
    thumbnail = drawn(0)[0].copy()
    thumbnail[:, 90:] = 3
    assert not color_tissue(thumbnail, THUMBNAIL_MPP)[:, 97:].any()


def test_color_leaves_fat_out_and_keeps_the_tissue_beside_it():
    """Fat drawn as white cells of 80 um, walls of 8 um between them, beside a slab of tissue of the walls' color."""
    fat = np.full((800, 1600, 3), GLASS, np.uint8)
    for start in range(0, 1600, 80):
        fat[:, start : start + 8] = PINK
        fat[start : start + 8] = PINK
    fat[:, 1000:] = PINK
    thumbnail = shrunk(fat, 8)
    mask = color_tissue(thumbnail, 8.0)
    assert not mask[:, :115].any()
    assert mask[:, 132:].all()


def test_color_on_real_tissues(crc_patches):
    """Each tile shrunk to 8 um/px and repeated: 9 of 10 of fat are empty, all of the six other classes are kept."""
    kept: dict[str, list[bool]] = {}
    for path in sorted(crc_patches.glob("*.jpg")):
        tile = cv2.resize(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), (14, 14), interpolation=cv2.INTER_AREA)
        kept.setdefault(path.name[:3], []).append(color_tissue(np.tile(tile, (4, 4, 1)), 8.0).mean() > 0.5)
    assert sum(kept.pop("ADI")) <= 1
    assert len(kept) == 6
    assert all(all(tiles) for tiles in kept.values())


def test_color_agrees_with_otsu_on_real_slides(real_slide, slide_without_mpp):
    """They have no pen and no fat: intersection over union of .92 and .98."""
    for path, mpp in ((real_slide, None), (slide_without_mpp, 0.25)):
        with open_slide(path, mpp_override=mpp) as slide:
            thumbnail = slide.read_thumbnail(THUMBNAIL_MPP)
        masks = [method(thumbnail.image, thumbnail.mpp) for method in (otsu_tissue, color_tissue)]
        assert np.logical_and(*masks).sum() / np.logical_or(*masks).sum() > 0.9


# ---- glass, dust, holes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [otsu_tissue, color_tissue])
@given(
    glass=st.tuples(*[st.integers(225, 255)] * 3).filter(lambda c: max(c) - min(c) <= 8),
    noise=st.floats(0, 4),
    seed=st.integers(0, 99),
)
def test_glass_is_empty_whatever_its_tint_and_noise(method, glass, noise, seed):
    grain = np.random.default_rng(seed).normal(0, noise, (96, 128, 3))
    assert not method(np.clip(np.array(glass) + grain, 0, 255).astype(np.uint8), THUMBNAIL_MPP).any()


@given(strength=st.floats(0.7, 1.5), noise=st.floats(0, 6), seed=st.integers(0, 99))
def test_tissue_from_edge_to_edge_is_kept_whole(strength, noise, seed):
    """Two tissues of unlike color, the paler one of saturation 46: Otsu's own threshold would fall between them."""
    absorbed = strength * np.where(np.arange(128)[None, :, None] < 64, [30, 90, 50], [70, 130, 60])
    grain = np.random.default_rng(seed).normal(0, noise, (96, 128, 3))
    image = np.clip(250 - absorbed + grain, 0, 255).astype(np.uint8)
    assert otsu_tissue(image, THUMBNAIL_MPP).mean() > 0.99


@pytest.mark.parametrize("mpp", [4.0, 8.0])
def test_dust_is_dropped_holes_are_filled_lumps_are_kept(mpp):
    """Squares of half and of one and a half times the smallest tissue, as dust, as holes, as lumps."""
    image = np.full((400, 400, 3), GLASS, np.uint8)
    small, large = (int((share * SMALLEST_TISSUE_UM2) ** 0.5 / mpp) for share in (0.5, 1.6))
    lump = np.array(PINK, np.uint8)
    image[20 : 20 + small, 20 : 20 + small] = lump
    image[20 : 20 + large, 200 : 200 + large] = lump
    image[150:390, 150:390] = lump
    image[160 : 160 + small, 160 : 160 + small] = GLASS
    wide = int((4 * SMALLEST_TISSUE_UM2) ** 0.5 / mpp)
    image[250 : 250 + wide, 250 : 250 + wide] = GLASS
    mask = otsu_tissue(image, mpp)
    assert not mask[20 : 20 + small, 20 : 20 + small].any()
    assert mask[20 + large // 2, 200 + large // 2]
    assert mask[160 : 160 + small, 160 : 160 + small].all()
    assert not mask[250 + wide // 2, 250 + wide // 2]
    assert mask[155, 155]
    assert mask[385, 385]


def test_mask_follows_a_rotation():
    """But for the edge pixels on which OpenCV's ellipse, not quite the same across and down, decides."""
    image, _ = drawn(0)
    turned = otsu_tissue(np.ascontiguousarray(np.rot90(image)), THUMBNAIL_MPP)
    assert (turned != np.rot90(otsu_tissue(image, THUMBNAIL_MPP))).mean() < 0.01


# ---- through patching -----------------------------------------------------------------------------------------


def test_an_empty_slide_is_refused_alone(tmp_path):
    sources = [
        flat_slide(tmp_path / "blank.tiff", GLASS),
        flat_slide(tmp_path / "full.tiff", PINK),
        flat_slide(tmp_path / "tiny.tiff", PINK, size=(200, 200)),
    ]
    blank, full, tiny = patch_sources(sources, GridSpec(), mpp_override=None, workers=2)
    assert isinstance(blank.error, NoTissueError)
    assert "leaves no patch of 256 level-0 px in 1024 x 768 px" in str(blank.error)
    assert "--tissue none" in str(blank.error)
    assert isinstance(tiny.error, NoTissueError)
    assert len(full.patched.coords) == 12


def test_method_none_keeps_even_an_empty_slide(tmp_path):
    source = flat_slide(tmp_path / "blank.tiff", GLASS)
    assert len(patch_source(source, GridSpec(tissue="none"), None).coords) == 12


def test_unknown_method_is_named():
    with pytest.raises(UnknownNameError, match=r"tissue method 'ostu'. Did you mean otsu"):
        resolve_tissue("ostu")
    with pytest.raises(UnknownNameError, match=r"Or give a network \(FILE.onnx, FILE.pt\) or a folder"):
        resolve_tissue("no/such/folder")


@pytest.mark.parametrize("name", ["otsu", "color", "none"])
def test_a_named_method_is_its_own_identity(name):
    assert resolve_tissue(name).identity == name


@pytest.mark.parametrize(("kept", "wanted"), [("annotations", "folder"), ("network:a.pt@sha256:0123456789ab", "file")])
def test_what_a_store_keeps_is_no_method_without_its_files(kept, wanted):
    with pytest.raises(UsageError, match=f"give its {wanted} again with --tissue"):
        resolve_tissue(kept)


def test_real_slide(real_slide):
    """By eye: a strip of skin down the middle, about 36 % of the area; its left and right thirds are glass."""
    with open_slide(real_slide) as slide:
        thumbnail = slide.read_thumbnail(THUMBNAIL_MPP)
    mask = otsu_tissue(thumbnail.image, thumbnail.mpp)
    height, width = mask.shape
    assert 0.3 < mask.mean() < 0.45
    assert mask[height // 2 :, width // 2].all()
    assert not mask[:, : width // 5].any()
    assert not mask[: height // 2, -width // 10 :].any()
    laid = patch_source(read_sources([real_slide])[0], GridSpec(), None)
    assert laid.facts.patch_px_level0 == 257
    assert 35 <= len(laid.coords) <= 43  # of 8 x 11
    assert all((laid.coords >= 0).all(axis=1) & (laid.coords + 257 <= (2220, 2967)).all(axis=1))


def test_pale_stitching_of_a_real_scanner_is_glass(slide_without_mpp):
    """Its scanned fields are a shade darker than the white between them; the tissue is 60 to 72 % by eye."""
    with open_slide(slide_without_mpp, mpp_override=0.25) as slide:
        thumbnail = slide.read_thumbnail(THUMBNAIL_MPP)
    mask = otsu_tissue(thumbnail.image, thumbnail.mpp)
    height, width = mask.shape
    assert 0.6 < mask.mean() < 0.72
    assert not mask[: height // 8, : width // 2].any()
    assert mask[height // 2, width // 4 : -width // 4].mean() > 0.95
