"""Artifacts of patches: planted ones are found, real and drawn H&E passes, and none of it costs a run anything."""

import functools
from pathlib import Path

import cv2
import numpy as np
import pytest

from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.errors import StoreMismatchError, UnknownNameError
from g2l_core.extraction.patching import patch_source
from g2l_core.patches.artifacts import _CHECKS, ArtifactSpec, artifact_of, count_artifacts
from g2l_core.patches.grid import ARTIFACTS, GridSpec, parse_artifacts
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.manifest import read_sources
from g2l_core.slides.slide import open_slide
from g2l_core.store.documents import read_group, write_group
from g2l_core.store.features import FeatureStore
from g2l_core.store.schema import STATUS
from g2l_core.store.verify import verify
from g2l_core.synthetic.cohort import CohortSpec, draw_slide, write_pyramid
from pipeline.cache_teacher import ExtractionSettings, run_extraction
from tests.conftest import TEACHER

KEY = "timm-mobilenetv3_small_050-64-random0"
ALL = ArtifactSpec(names=ARTIFACTS)
INKS = {"blue": (40, 60, 160), "green": (30, 140, 90), "red": (205, 30, 45), "black": (38, 38, 42)}


@functools.cache
def drawn_image(index: int) -> np.ndarray:
    """A drawn slide at 0.5 um/px, uint8 (1536, 2048, 3)."""
    return draw_slide(CohortSpec(size_um=(1024.0, 768.0), mpp=(0.5, 0.5), seed=3), index)[0]


def squares(image: np.ndarray, side: int = 256) -> list[np.ndarray]:
    height, width = image.shape[:2]
    corners = [(y, x) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
    return [image[y : y + side, x : x + side] for y, x in corners]


def tissue_squares(index: int) -> list[np.ndarray]:
    return [square for square in squares(drawn_image(index)) if square.mean() < 200]


def real_patches(folder: Path, pattern: str, step: int) -> list[np.ndarray]:
    paths = sorted(folder.rglob(pattern))[::step]
    return [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in paths]


def slide_patches(path: Path, mpp: float | None = None, **grid) -> list[np.ndarray]:
    laid = patch_source(read_sources([path])[0], GridSpec(**grid), mpp)
    with open_slide(path, mpp_override=mpp) as slide:
        side = laid.facts.patch_px_level0
        return [slide.read_patch(int(x), int(y), side, 256) for x, y in laid.coords]


def blurred(patch: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(patch, (0, 0), sigma)


def codes(patches: list[np.ndarray], spec: ArtifactSpec = ALL) -> set[int]:
    return {artifact_of(patch, spec) for patch in patches}


# ---- what must pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("shrink", "mpp"), [(1, 0.5), (2, 1.0)])
def test_no_square_of_a_drawn_slide_is_flagged(index, shrink, mpp):
    image = drawn_image(index)
    image = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    assert codes(squares(image), ArtifactSpec(names=ARTIFACTS, mpp=mpp)) == {0}


def test_no_square_of_a_slide_drawn_at_a_quarter_micrometer_is_flagged():
    """Its optics leave little of 2 px there; only the scale at which sharpness is judged lets it pass."""
    image = draw_slide(CohortSpec(size_um=(768.0, 768.0), seed=9), 1)[0]
    assert codes(squares(image), ArtifactSpec(names=ARTIFACTS, mpp=0.25)) == {0}
    assert codes(squares(image)) == {0, STATUS["blurred"]}


def test_no_real_patch_is_flagged(oscc_patches, crc_patches, real_slide, slide_without_mpp):
    """All 1,224 oral patches pass; every fifth is tried here. Glass, as `none` keeps it, passes as well."""
    assert codes(real_patches(oscc_patches, "*.jpg", 5)) == {0}
    assert codes(real_patches(crc_patches, "*.jpg", 1)) == {0}
    assert codes(slide_patches(real_slide, tissue="none")) == {0}
    assert codes(slide_patches(slide_without_mpp, 0.5, tissue="none")) == {0}


@pytest.mark.parametrize("level", [0, 60, 200, 255])
def test_an_even_patch_is_black_at_most(level):
    found = artifact_of(np.full((256, 256, 3), level, np.uint8), ArtifactSpec(names=("black", "blurred")))
    assert found == (STATUS["black"] if level == 0 else 0)


# ---- what must be found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [3.0, 4.0, 6.0])
def test_blurred_real_tissue_is_found(sigma, oscc_patches, crc_patches, real_slide, slide_without_mpp):
    """All of 1,530 patches with a Gaussian of 3, 4 or 6 px; of 2 px, 2 to 90 % by tissue."""
    patches = real_patches(oscc_patches, "*.jpg", 5) + real_patches(crc_patches, "*.jpg", 1)
    patches += slide_patches(real_slide) + slide_patches(slide_without_mpp, 0.5)
    assert codes([blurred(patch, sigma) for patch in patches]) == {STATUS["blurred"]}


@pytest.mark.parametrize("index", range(4))
def test_blurred_drawn_tissue_is_found_and_a_lesser_blur_passes(index):
    patches = tissue_squares(index)
    assert len(patches) > 15
    assert codes([blurred(patch, 3.0) for patch in patches]) == {STATUS["blurred"]}
    assert codes([blurred(patch, 0.7) for patch in patches]) == {0}


def test_blur_does_not_depend_on_stain_strength():
    """A ratio of details: half the contrast changes neither answer."""
    for patch in tissue_squares(0)[:10]:
        pale = (255 - (255 - patch.astype(np.float32)) * 0.5).astype(np.uint8)
        assert artifact_of(pale, ALL) == 0
        assert artifact_of(blurred(pale, 3.0), ALL) == STATUS["blurred"]


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("share", [0.35, 1.0])
def test_pen_is_found(ink, share):
    """A stroke over a part of the patch; the tissue shines through a little."""
    for patch in [*tissue_squares(0)[:6], np.full((256, 256, 3), 242, np.uint8)]:
        inked = patch.copy()
        stroke = inked[:, : round(256 * share)]
        stroke[:] = INKS[ink] * (stroke / 243.0) ** 0.15
        assert artifact_of(inked, ALL) == STATUS["pen"]
        assert artifact_of(inked, ArtifactSpec(names=("black",))) == 0


def test_black_is_found_from_a_fifth_of_the_patch_on():
    patch = tissue_squares(0)[3].copy()
    patch[:40] = 4
    assert artifact_of(patch, ALL) == 0
    patch[:60] = 4
    assert artifact_of(patch, ALL) == STATUS["black"]
    assert artifact_of(patch, ArtifactSpec(names=("pen", "blurred"))) == 0


def test_names_codes_and_checks_agree():
    assert set(_CHECKS) == set(ARTIFACTS) == set(STATUS) - {"ok", "unreadable", "absent"}
    assert len(set(STATUS.values())) == len(STATUS)


def test_counts_are_by_name():
    status = np.array([0, 1, 2, 2, 4, 0], np.uint8)
    assert count_artifacts(status) == {"pen": 2, "blurred": 1}


# ---- in a grid's identity and in a store ---------------------------------------------------------------------


def test_artifacts_of_a_grid_have_one_order():
    grid = GridSpec(artifacts=("blurred", "black", "black"))
    assert grid.artifacts == ("black", "blurred")
    assert grid == GridSpec(artifacts=("black", "blurred"))
    assert grid.to_json()["artefacts"] == "black,blurred"
    assert GridSpec(artifacts=()).to_json()["artefacts"] == "none"
    assert parse_artifacts("blurred, black,black") == ("blurred", "black", "black")
    assert parse_artifacts("") == parse_artifacts("none") == ()
    with pytest.raises(UnknownNameError, match="artifact 'blured'. Did you mean blurred"):
        GridSpec(artifacts=("blured",))


@pytest.fixture
def spoilt_slide(tmp_path) -> Path:
    """A drawn slide of 8 x 6 patches; three of them black, inked and blurred, at known places."""
    image = drawn_image(0).copy()
    image[512:768, 512:768] = 2
    image[512:768, 1024:1280] = INKS["green"]
    image[1024:1280, 512:1536] = blurred(image[1024:1280, 512:1536], 4.0)
    write_pyramid(tmp_path / "x.tiff", image, mpp=0.5, quality=None)
    return tmp_path / "x.tiff"


def cache(source, path, **grid):
    settings = ExtractionSettings(views=1, batch_size=8)
    return run_extraction(
        [source], path, [resolve_encoder(TEACHER, weights="random:0")], GridSpec(**grid), ViewSpec(), settings
    )


def test_filtered_patches_keep_their_row_and_cost_nothing(spoilt_slide, tmp_path):
    summary = cache(spoilt_slide, tmp_path / "s.zarr", tissue="none")
    assert summary.is_complete
    assert summary.unreadable == {}
    store = FeatureStore.open(tmp_path / "s.zarr")
    slide = store.slide("x")
    at = {tuple(corner): code for corner, code in zip(slide.coords.tolist(), slide.patch_status.tolist(), strict=True)}
    wrong = {(512, 512): "black", (1024, 512): "pen"} | {(x, 1024): "blurred" for x in (512, 768, 1024, 1280)}
    assert at == {corner: STATUS[wrong.get(corner, "ok")] for corner in at}
    assert count_artifacts(slide.patch_status) == {"black": 1, "pen": 1, "blurred": 4}
    left_out = slide.patch_status != 0
    for view in (0, 1):
        features = slide.features(KEY, view=view)
        assert np.isnan(features[left_out]).all()
        assert np.isfinite(features[~left_out]).all()
    assert (slide.pixel_hash[left_out] == 0).all()
    assert list(verify(store)) == []
    assert store.facts.patch_status == dict(STATUS)
    assert cache(spoilt_slide, tmp_path / "s.zarr", tissue="none").encoded == 0


def test_without_filters_every_patch_has_features(spoilt_slide, tmp_path):
    cache(spoilt_slide, tmp_path / "s.zarr", tissue="none", artifacts=())
    slide = FeatureStore.open(tmp_path / "s.zarr").slide("x")
    assert not slide.patch_status.any()
    assert np.isfinite(slide.features(KEY)).all()


def test_other_filters_are_another_store(spoilt_slide, tmp_path):
    cache(spoilt_slide, tmp_path / "s.zarr", tissue="none", artifacts=("pen",))
    with pytest.raises(StoreMismatchError, match="artefacts is 'pen' there"):
        cache(spoilt_slide, tmp_path / "s.zarr", tissue="none")


def test_patch_images_are_never_filtered(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "black.png"), np.zeros((256, 256, 3), np.uint8))
    cv2.imwrite(str(folder / "inked.png"), np.full((256, 256, 3), (160, 60, 40), np.uint8))
    cache(folder, tmp_path / "s.zarr")
    slide = FeatureStore.open(tmp_path / "s.zarr").slide("images")
    assert slide.patch_status.tolist() == [0, 0]


def test_a_store_older_than_the_filters_goes_on_without_them(spoilt_slide, tmp_path):
    cache(spoilt_slide, tmp_path / "s.zarr", tissue="none", artifacts=())
    facts = read_group(tmp_path / "s.zarr", checked=True)
    del facts["grid"]["artefacts"]
    facts["patch_status"] = {"ok": 0, "unreadable": 1}
    write_group(tmp_path / "s.zarr", facts)
    grid = GridSpec.from_json(FeatureStore.open(tmp_path / "s.zarr").grid)
    assert grid.artifacts == ()
    assert cache(spoilt_slide, tmp_path / "s.zarr", tissue="none", artifacts=grid.artifacts).encoded == 0
    with pytest.raises(StoreMismatchError, match="artefacts is 'none' there"):
        cache(spoilt_slide, tmp_path / "s.zarr", tissue="none")
