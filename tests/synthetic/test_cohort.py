"""The drawn slides: the pyramid against two readers, the drawing's laws, the truth against brute force."""

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from g2l_core.errors import ReadError, UsageError
from g2l_core.synthetic import cohort as synthetic
from g2l_core.synthetic.cohort import CENTERS, MAP_UM, CohortSpec

SMALL = CohortSpec(patients=6, size_um=(640.0, 512.0), mpp=(1.0, 0.5))


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_level(slide: openslide.OpenSlide, level: int) -> np.ndarray:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


# ---- the pyramid ------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    mpp=st.sampled_from([0.2201, 0.25, 0.499, 0.5, 1.0]),
    tile=st.sampled_from([16, 64, 256]),
    seed=st.integers(0, 9),
)
def test_lossless_pyramid_is_pixel_exact_for_both_readers(tmp_path_factory, rows, columns, mpp, tile, seed):
    image = noise_image(12 * rows, 12 * columns, seed)
    path = tmp_path_factory.mktemp("pyramid") / "a.tiff"
    synthetic.write_pyramid(path, image, mpp=mpp, downsamples=(1, 3, 4), tile_px=tile, quality=None)
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_downsamples == (1, 3, 4)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-6)
        assert [page.is_tiled for page in tiff.pages] == [True] * 3
        assert [bool(page.is_reduced) for page in tiff.pages] == [False, True, True]
        np.testing.assert_array_equal(read_level(slide, 0), image)
        for level, factor in enumerate((1, 3, 4)):
            np.testing.assert_array_equal(read_level(slide, level), tiff.pages[level].asarray())
            blocks = image.reshape(12 * rows // factor, factor, 12 * columns // factor, factor, 3)
            exact = blocks.mean((1, 3), dtype=np.float64)
            assert np.abs(read_level(slide, level) - exact).max() <= 0.5


def test_jpeg_pyramid_keeps_colors_and_places(tmp_path):
    image = np.zeros((512, 768, 3), np.uint8)
    image[:256] = (200, 60, 120)
    image[256:, :384] = (20, 190, 60)
    image[256:, 384:] = (40, 50, 220)
    path = tmp_path / "a.tiff"
    synthetic.write_pyramid(path, image, mpp=0.25)
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert slide.level_dimensions == ((768, 512), (384, 256), (192, 128))
        for level, factor in enumerate((1, 2, 4)):
            wanted = image[::factor, ::factor].astype(int)
            # Only flat neighborhoods: the halved chroma smears the borders of the colors.
            spread = cv2.blur(wanted.astype(np.float64), (17, 17)) - wanted
            flat = np.abs(spread).max(2) < 1e-6
            for pixels in (read_level(slide, level), tiff.pages[level].asarray()):
                assert np.abs(pixels - wanted)[flat].max() <= 4
        assert tiff.pages[0].compression == tifffile.COMPRESSION.JPEG
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR


def test_quality_trades_size_for_error(tmp_path):
    image, _ = synthetic.draw_slide(SMALL, 1)
    sizes, errors = [], []
    for quality in (40, 90, None):
        path = tmp_path / f"{quality}.tiff"
        synthetic.write_pyramid(path, image, mpp=0.5, quality=quality)
        sizes.append(path.stat().st_size)
        with openslide.OpenSlide(path) as slide:
            errors.append(np.abs(read_level(slide, 0).astype(int) - image).mean())
    assert sizes == sorted(sizes)
    assert errors[0] > errors[1] > errors[2] == 0
    assert errors[1] < 4


@pytest.mark.parametrize(
    ("height", "width", "arguments", "named"),
    [
        (64, 66, {}, "66 x 64"),
        (0, 64, {}, "64 x 0"),
        (64, 64, {"downsamples": ()}, "downsamples"),
        (64, 64, {"downsamples": (2, 4)}, "downsamples"),
        (64, 64, {"downsamples": (1, 4, 2)}, "downsamples"),
        (64, 64, {"mpp": 0.0}, "mpp"),
        (64, 64, {"mpp": float("inf")}, "mpp"),
        (64, 64, {"tile_px": 100}, "tile_px"),
        (64, 64, {"quality": 0}, "quality"),
    ],
)
def test_pyramid_refuses(tmp_path, height, width, arguments, named):
    with pytest.raises(UsageError, match=named):
        synthetic.write_pyramid(tmp_path / "a.tiff", noise_image(height, width), **{"mpp": 0.5, **arguments})
    assert not (tmp_path / "a.tiff").exists()


# ---- the drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_drawing_depends_on_spec_and_index_only(index):
    image, classes = synthetic.draw_slide(SMALL, index)
    threads = cv2.getNumThreads()
    np.random.seed(7)  # noqa: NPY002  global state must not matter
    cv2.setNumThreads(1)
    again, classes_again = synthetic.draw_slide(SMALL, index)
    cv2.setNumThreads(threads)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(classes, classes_again)
    for other in (synthetic.draw_slide(SMALL, index + 2), synthetic.draw_slide(replace(SMALL, seed=1), index)):
        assert (other[0] != image).mean() > 0.5
        assert (other[1] != classes).any()


def test_slide_has_its_size_and_its_map_fits_the_picture():
    for index, mpp in enumerate(SMALL.mpp):
        image, classes = synthetic.draw_slide(SMALL, index)
        assert image.shape == (round(512 / mpp), round(640 / mpp), 3)
        assert classes.shape == (512 / MAP_UM, 640 / MAP_UM)
        assert set(np.unique(classes)) == {0, 1, 2, 3}
        small = cv2.resize(image, classes.shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
        # Away from the tissue's edge glass is bright and gray, tissue is colored nearly everywhere.
        inner = cv2.erode((classes > 0).astype(np.uint8), np.ones((9, 9)), borderValue=0) > 0
        outer = cv2.dilate((classes > 0).astype(np.uint8), np.ones((9, 9))) == 0
        assert small[outer].min() > 225
        assert np.ptp(small[outer], axis=1).max() < 15
        assert (np.ptp(small[inner], axis=1) > 20).mean() > 0.9
        border = np.concatenate([classes[0], classes[-1], classes[:, 0], classes[:, -1]])
        assert not border.any()


def test_refuses_a_slide_that_is_not_there():
    with pytest.raises(UsageError, match=r"0 \.\. 5, got 6"):
        synthetic.draw_slide(SMALL, 6)


@pytest.fixture(scope="module")
def patches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pure 96 um patches at 1 um/px of six slides: pixels, classes, centers."""
    spec = replace(SMALL, size_um=(960.0, 768.0), mpp=(1.0, 1.0))
    pixels, classes, centers = [], [], []
    for index in range(6):
        image, truth = synthetic.draw_slide(spec, index)
        coords = np.array([(x, y) for y in range(0, 672, 48) for x in range(0, 864, 48)], np.int32)
        found = synthetic.patch_classes(truth, coords, 96, (960, 768))
        for (x, y), name in zip(coords, found, strict=True):
            whole = (truth[y // 4 : y // 4 + 24, x // 4 : x // 4 + 24] > 0).all()
            if name and whole:
                pixels.append(image[y : y + 96, x : x + 96])
                classes.append(name)
                centers.append(spec.center(index))
    return np.stack(pixels), np.array(classes), np.array(centers)


def test_color_tells_the_center_and_not_the_class(patches):
    pixels, classes, centers = patches
    density = -np.log(pixels.mean((1, 2)) / 245)
    for center in range(2):
        here = centers == center
        means = np.array([density[here & (classes == c)].mean(0) for c in (1, 2, 3)])
        # 0.59 and 0.66 of the mean where regions keep their class's own densities.
        assert np.ptp(means, axis=0).max() < 0.4 * density[here].mean()
    # Hue of the absorption: green to blue. The laboratories' ranges do not meet.
    ratio = density[:, 2] / density[:, 1]
    assert ratio[centers == 0].max() < ratio[centers == 1].min()


def coherence(patch: np.ndarray) -> float:
    """0 where gradients have no common direction, 1 where all are parallel (structure tensor)."""
    gray = cv2.GaussianBlur(patch.mean(2), (0, 0), 1)
    gy, gx = np.gradient(gray)
    xx, yy, xy = (gx * gx).mean(), (gy * gy).mean(), (gx * gy).mean()
    return float(np.hypot(xx - yy, 2 * xy) / (xx + yy))


def large_nuclei(patch: np.ndarray) -> float:
    """Share of the darkest third in which a disc of 7 um fits: more than a lymphocyte holds."""
    red = cv2.GaussianBlur(patch[..., 0], (0, 0), 0.7)
    dark = (red < np.quantile(red, 0.3)).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    return float(cv2.morphologyEx(dark, cv2.MORPH_OPEN, disc).sum() / dark.sum())


def test_texture_tells_the_class(patches):
    pixels, classes, _ = patches
    directed = np.array([coherence(p) for p in pixels])
    large = np.array([large_nuclei(p) for p in pixels])
    assert np.median(directed[classes == 1]) > 3 * np.median(directed[classes != 1])
    assert np.median(large[classes == 2]) > 2 * np.median(large[classes == 3])


# ---- the cohort -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patients", 5),
        ("slides_per_patient", 0),
        ("size_um", (642.0, 512.0)),
        ("size_um", (640.0, 128.0)),
        ("mpp", (0.3, 0.5)),
        ("mpp", (2.0, 0.5)),
        ("seed", -1),
    ],
)
def test_spec_refuses(field, value):
    with pytest.raises(UsageError, match=rf"CohortSpec\.{field}: expected"):
        replace(SMALL, **{field: value})


def test_cohort_on_disk(tmp_path):
    spec = CohortSpec(patients=6, slides_per_patient=2, size_um=(256.0, 320.0), mpp=(1.0, 0.5), quality=None)
    manifest = synthetic.draw_cohort(tmp_path / "new" / "cohort", spec)
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "path", "patient_id", "medical_center"]
    assert len({row["slide_id"] for row in rows}) == 12
    centers = {row["patient_id"]: row["medical_center"] for row in rows}
    assert list(centers.values()) == list(CENTERS) * 3
    for index, row in enumerate(rows):
        assert row["medical_center"] == centers[row["patient_id"]]
        image, classes = synthetic.draw_slide(spec, index)
        with openslide.OpenSlide(manifest.parent / row["path"]) as slide:
            np.testing.assert_array_equal(read_level(slide, 0), image)
            mpp = float(slide.properties["openslide.mpp-x"])
        assert mpp == spec.mpp[CENTERS.index(row["medical_center"])]
        truth = manifest.parent / "truth" / f"{row['slide_id']}.classes.png"
        np.testing.assert_array_equal(synthetic.read_class_map(truth), classes)
    assert len(list(manifest.parent.rglob("*.*"))) == 1 + 12 + 12


# ---- the truth --------------------------------------------------------------------------------------------


def hand_drawn() -> np.ndarray:
    """20 x 10: left half stroma, right half tumor with a lymphoid corner; the lowest 4 rows are glass."""
    classes = np.zeros((10, 20), np.uint8)
    classes[:6, :10] = 1
    classes[:6, 10:] = 2
    classes[:2, 18:] = 3
    return classes


def test_labels_of_a_hand_drawn_map(tmp_path):
    path = tmp_path / "a.classes.png"
    truth = Image.fromarray(hand_drawn())
    truth.putpalette([0, 0, 0] * 4)
    truth.save(path)
    cases = {
        (0, 0): "stroma",
        (0, 40): "stroma",  # half glass: only tissue counts
        (75, 0): "",  # astride: half and half
        (61, 0): "stroma",  # ends at 101 of 100: 1/40 is tumor
        (63, 0): "stroma",  # 3/40
        (64, 0): "stroma",  # 4/40: 90 % exactly
        (65, 0): "",  # 5/40
        (0, 60): "",  # glass
        (160, 0): "",  # a quarter is lymphoid
        (180, 0): "",  # hangs over the edge: half is lymphoid
        (180, 20): "tumor",
        (180, -20): "lymphoid",
        (400, 400): "",  # wholly outside
    }
    coords = np.array(list(cases), np.int32)
    assert synthetic.label_patches(path, coords, 40, (200, 100)) == list(cases.values())
    assert synthetic.label_patches(path, coords[:0], 40, (200, 100)) == []


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    scale=st.integers(1, 7),
    side=st.integers(1, 40),
    corner=st.tuples(st.integers(-20, 90), st.integers(-20, 90)),
)
def test_patch_classes_equal_exact_counting(seed, scale, side, corner):
    # A map of few large patches of one class, so that pure, mixed and empty patches all occur.
    rng = np.random.default_rng(seed)
    coarse = rng.choice(4, (4, 5), p=[0.2, 0.6, 0.1, 0.1]).astype(np.uint8)
    classes = np.kron(coarse, np.ones((3, 3), np.uint8))
    level0 = np.pad(np.kron(classes, np.ones((scale, scale), np.uint8)), 200)
    x, y = corner[0] + 200, corner[1] + 200
    counts = np.bincount(level0[y : y + side, x : x + side].ravel(), minlength=4)[1:]
    tissue = int(counts.sum())
    expected = 0
    if tissue and Fraction(int(counts.max()), tissue) >= Fraction(9, 10):
        expected = int(counts.argmax()) + 1
    size = (classes.shape[1] * scale, classes.shape[0] * scale)
    found = synthetic.patch_classes(classes, np.array([corner], np.int32), side, size)
    assert found.tolist() == [expected]


def test_labels_refuse_sizes_and_files(tmp_path):
    coords = np.zeros((1, 2), np.int32)
    with pytest.raises(UsageError, match="positive sizes"):
        synthetic.patch_classes(hand_drawn(), coords, 0, (200, 100))
    with pytest.raises(UsageError, match="positive sizes"):
        synthetic.patch_classes(hand_drawn(), coords, 40, (0, 100))
    text = tmp_path / "text.png"
    text.write_text("no image")
    gray = tmp_path / "gray.png"
    Image.fromarray(hand_drawn()).save(gray)
    for path in (text, gray, tmp_path / "absent.png"):
        with pytest.raises(ReadError, match=Path(path).name):
            synthetic.label_patches(path, coords, 40, (200, 100))
