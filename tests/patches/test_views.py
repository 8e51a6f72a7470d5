"""Views: the same pixels always and everywhere, torchvision's semantics, the paper's frequencies."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from g2l_core.errors import UsageError
from g2l_core.patches.views import COLUMNS, ViewSpec, apply_view, apply_views, pixel_hash, sample_views

ROOT = Path(__file__).resolve().parents[2]
SPEC = ViewSpec()
EVERYTHING = ViewSpec(jitter=1.0, blur=1.0)
CANONICAL = [16, 16, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
COLUMN = {name: index for index, name in enumerate(COLUMNS)}
_KEPT: list[torch.library.Library] = []


def torchvision_functional() -> ModuleType:
    """Give torchvision's v2 functional ops; on a CPU-only torch its CUDA-built extension cannot load."""
    if "torchvision" not in sys.modules and not hasattr(torch.ops.torchvision, "nms"):
        package = importlib.util.find_spec("torchvision")
        assert package is not None
        assert package.origin is not None
        try:
            torch.ops.load_library(str(Path(package.origin).parent / "_C.so"))
        except OSError:
            _KEPT.append(torch.library.Library("torchvision", "DEF"))
            for name in ("nms", "qnms"):
                _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.transforms.v2 import functional

    return functional


def torchvision_view(tensor: torch.Tensor, params: np.ndarray, spec: ViewSpec) -> torch.Tensor:
    """The view as torchvision composes it, from a uint8 tensor (3, height, width)."""
    ops = torchvision_functional()
    p = dict(zip(COLUMNS, params.tolist(), strict=True))
    view = ops.crop(tensor, int(p["crop_y"]), int(p["crop_x"]), spec.crop_px, spec.crop_px)
    if p["hflip"]:
        view = ops.horizontal_flip(view)
    if p["vflip"]:
        view = ops.vertical_flip(view)
    if p["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        for index in list(itertools.permutations(range(4)))[int(p["order"])]:
            view = getattr(ops, f"adjust_{names[index]}")(view, p[names[index]])
    if p["blur"]:
        view = ops.gaussian_blur(view, [spec.blur_kernel_px] * 2, [p["sigma"]] * 2)
    return view


def he_patch(seed: int, size: int = 256) -> np.ndarray:
    """Pink stroma, white gaps, purple nuclei of 5 to 15 px with sharp borders, and sensor noise."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), rng.normal((222, 160, 200), 12), dtype=np.float32)
    for color, count, radii in (((243, 241, 244), 6, (12, 40)), ((105, 60, 140), 120, (2, 8))):
        for x, y, r in zip(*rng.integers(0, size, (2, count)), rng.integers(*radii, count), strict=True):
            cv2.circle(image, (int(x), int(y)), int(r), rng.normal(color, 12).tolist(), thickness=-1)
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


def grid(n: int) -> np.ndarray:
    return np.stack(np.divmod(np.arange(n, dtype=np.int32), 100), axis=-1) * np.int32(256)


def differences(patches: list[np.ndarray], spec: ViewSpec, views: int) -> np.ndarray:
    """Absolute differences to torchvision, pixel by pixel, over drawn views of the patches."""
    found = []
    for row, patch in enumerate(patches):
        tensor = torch.from_numpy(patch).permute(2, 0, 1).contiguous()
        params = sample_views(spec, "s", np.array([[row, 0]], dtype=np.int32), range(1, views + 1))[0]
        for ours, drawn in zip(apply_views(patch, params, spec), params, strict=True):
            theirs = torchvision_view(tensor, drawn, spec).permute(1, 2, 0).numpy()
            found.append(np.abs(ours.astype(int) - theirs))
    return np.stack(found)


# --- pixels against torchvision


def test_views_are_torchvisions_within_five_levels():
    found = differences([he_patch(seed) for seed in range(12)], ViewSpec(jitter=0.9, blur=0.3), views=6)
    assert (found <= 5).mean() >= 0.999
    assert (found <= 2).mean() >= 0.999
    assert found.mean() < 0.1


@pytest.mark.parametrize("name", ["crc-val-he-7k-sample", "oscc-rahman"])
def test_views_of_real_patches_are_torchvisions_within_five_levels(name):
    folder = ROOT.parent / "shared" / "data" / "patches" / name
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in {".jpg", ".png", ".tif"}]
    if not files:
        pytest.skip(f"the real patches {name} are not beside this checkout (../shared/data)")
    patches = [cv2.imread(str(f))[:, :, ::-1].copy() for f in files[:: max(1, len(files) // 20)]]
    found = differences(patches, ViewSpec(patch_px=224, crop_px=196, jitter=0.9, blur=0.3), views=4)
    assert (found <= 5).mean() >= 0.999
    assert (found <= 2).mean() >= 0.999


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8, 1.2, 1.6, 2.0])
def test_the_blur_is_torchvisions_over_its_whole_range(sigma):
    patch = he_patch(1)
    params = np.array([3, 7, 0, 0, 0, 1, 1, 1, 0, 0, 1, sigma], dtype=np.float32)
    theirs = torchvision_view(torch.from_numpy(patch).permute(2, 0, 1).contiguous(), params, SPEC)
    assert np.abs(apply_view(patch, params, SPEC).astype(int) - theirs.permute(1, 2, 0).numpy()).max() <= 3


@pytest.mark.parametrize(
    ("name", "factors", "limit"),
    [
        ("brightness", (0.85, 0.97, 1.15, 2.0), 0),
        ("contrast", (0.85, 0.97, 1.15, 2.0), 1),
        ("saturation", (0.0, 0.9, 1.1, 2.0), 1),
        ("hue", (-1 / 6, -0.05, 0.01, 0.05, 1 / 6), 1),
    ],
)
def test_each_color_operation_is_torchvisions_on_any_colors(name, factors, limit):
    rng = np.random.default_rng(0)
    patch = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    patch[:64] = patch[:64, :, :1]  # grays, where the hue is undefined
    patch[64:128] = (patch[64:128] // 64) * 85  # ties between channels, and the cube's corners
    params = np.array([*CANONICAL[:4], 1, *CANONICAL[5:]], dtype=np.float32)
    for factor in factors:
        params[COLUMN[name]] = factor
        theirs = torchvision_view(torch.from_numpy(patch).permute(2, 0, 1).contiguous(), params, SPEC)
        found = np.abs(apply_view(patch, params, SPEC).astype(int) - theirs.permute(1, 2, 0).numpy())
        assert found.max() <= limit


def test_neutral_factors_change_nothing():
    patch = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for order in range(24):
        params = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, order, 0, 0], dtype=np.float32)
        np.testing.assert_array_equal(apply_view(patch, params, SPEC), patch[:224, :224])


@pytest.mark.parametrize(("hflip", "vflip"), list(itertools.product((0, 1), repeat=2)))
def test_crop_and_flips_by_hand(hflip, vflip):
    patch = he_patch(0)
    params = np.array([5, 30, hflip, vflip, *CANONICAL[4:]], dtype=np.float32)
    view = apply_view(patch, params, SPEC)
    expected = patch[30:254, 5:229][:: -1 if vflip else 1, :: -1 if hflip else 1]
    np.testing.assert_array_equal(view, expected)
    assert view.flags.c_contiguous
    assert not np.shares_memory(view, patch)


# --- the same pixels always and everywhere


def test_view_zero_is_the_center_crop():
    params = sample_views(EVERYTHING, "s", grid(3), [0])
    np.testing.assert_array_equal(params, np.broadcast_to(np.array(CANONICAL, np.float32), (3, 1, 12)))
    np.testing.assert_array_equal(apply_view(he_patch(0), params[0, 0], SPEC), he_patch(0)[16:240, 16:240])
    torchvision = torchvision_functional()
    for patch_px, crop_px in ((7, 4), (9, 4), (8, 8)):
        numbers = torch.arange(patch_px**2, dtype=torch.uint8).reshape(1, patch_px, patch_px)
        x = int(
            sample_views(ViewSpec(patch_px=patch_px, crop_px=crop_px, blur_kernel_px=3), "s", grid(1), [0])[0, 0, 0]
        )
        np.testing.assert_array_equal(torchvision.center_crop(numbers, [crop_px])[0, 0, 0], numbers[0, x, x])


def test_views_are_the_same_alone_in_batch_and_in_any_order():
    coords, patch = grid(20), he_patch(3)
    together = sample_views(EVERYTHING, "a/b", coords, [0, 1, 2, 5])
    backwards = sample_views(EVERYTHING, "a/b", coords[::-1], [5, 2, 1, 0])
    np.testing.assert_array_equal(backwards[::-1, ::-1], together)
    for row, column, view in ((0, 1, 1), (7, 3, 5), (19, 0, 0)):
        alone = sample_views(EVERYTHING, "a/b", coords[row : row + 1], [view])[0, 0]
        np.testing.assert_array_equal(alone, together[row, column])
        np.testing.assert_array_equal(apply_view(patch, alone, SPEC), apply_views(patch, together[row], SPEC)[column])


def test_views_are_the_same_in_another_process():
    code = "from tests.patches.test_views import *\nprint(*some_hashes())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(word) for word in run.stdout.split()] == some_hashes()


def some_hashes() -> list[int]:
    params = sample_views(ViewSpec(blur=0.5, seed=9), "slide", grid(4), [0, 1, 2])
    views = [apply_views(he_patch(5), rows, SPEC) for rows in params]
    return pixel_hash(np.concatenate(views)).tolist()


def test_views_are_the_same_from_threads():
    params = sample_views(EVERYTHING, "s", grid(40), [1])[:, 0]
    patch = he_patch(2)
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda row: apply_view(patch, row, SPEC), params))
    np.testing.assert_array_equal(threaded, apply_views(patch, params, SPEC))


def test_draws_and_pixels_have_not_changed_since_version_1():
    ramp = np.arange(256, dtype=np.uint8)
    patch = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], (ramp[:, None] ^ ramp)), axis=-1)
    params = sample_views(EVERYTHING, "slide/ä", np.array([[-3, 1024]], np.int32), [1], ["tile 7"])[0]
    factors = (0.97273982, 1.0366665, 1.0824544, -0.0038101911)
    expected = (11, 1, 0, 0, 1, *factors, 15, 1, 1.799834)
    np.testing.assert_array_equal(params[0], np.array(expected, dtype=np.float32))
    assert pixel_hash(apply_views(patch, params, SPEC)).tolist() == [4180618748235659236]


def test_a_patch_in_another_memory_order_gives_the_same_view():
    patch, params = he_patch(4), sample_views(EVERYTHING, "s", grid(1), [1])[0, 0]
    expected = apply_view(patch, params, SPEC)
    for same in (np.asfortranarray(patch), patch[::-1].copy()[::-1], patch[..., ::-1].copy()[..., ::-1]):
        np.testing.assert_array_equal(apply_view(same, params, SPEC), expected)


def test_every_part_of_the_key_matters_and_no_two_keys_share_bytes():
    origin, one = np.zeros((1, 2), np.int32), np.int32(1)
    seeded = dataclasses.replace(EVERYTHING, seed=1)
    rows = [
        sample_views(EVERYTHING, "ab", origin, [1]),
        sample_views(seeded, "ab", origin, [1]),
        sample_views(EVERYTHING, "abc", origin, [1]),
        sample_views(EVERYTHING, "ab", origin + np.array([one, 0], np.int32), [1]),
        sample_views(EVERYTHING, "ab", origin + np.array([0, one], np.int32), [1]),
        sample_views(EVERYTHING, "ab", origin, [2]),
        sample_views(EVERYTHING, "ab", origin, [1], [""]),
        sample_views(EVERYTHING, "ab", origin, [1], ["c"]),
        sample_views(EVERYTHING, "a", origin, [1], ["bc"]),
        sample_views(EVERYTHING, "abc", origin, [1], [""]),
    ]
    assert len({row.tobytes() for row in rows}) == len(rows)


# --- frequencies


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    params = sample_views(SPEC, "slide", grid(10_000), [1])[:, 0]
    return {name: params[:, index] for name, index in COLUMN.items()}


@pytest.mark.parametrize(("name", "chance"), [("hflip", 0.5), ("vflip", 0.5), ("jitter", 0.5), ("blur", 0.1)])
def test_flags_have_the_papers_frequencies(drawn, name, chance):
    assert set(np.unique(drawn[name])) == {0, 1}
    assert abs(drawn[name].mean() - chance) < 4 * (chance * (1 - chance) / 10_000) ** 0.5


@pytest.mark.parametrize(
    ("name", "low", "high", "flag"),
    [
        ("brightness", 0.85, 1.15, "jitter"),
        ("contrast", 0.85, 1.15, "jitter"),
        ("saturation", 0.9, 1.1, "jitter"),
        ("hue", -0.05, 0.05, "jitter"),
        ("sigma", 0.1, 2.0, "blur"),
    ],
)
def test_factors_are_uniform_over_the_papers_ranges(drawn, name, low, high, flag):
    used = drawn[name][drawn[flag] == 1]
    assert low - 1e-6 <= used.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < used.max() <= high + 1e-6
    assert stats.kstest(used, "uniform", (low, high - low)).pvalue > 1e-4
    unused = drawn[name][drawn[flag] == 0]
    np.testing.assert_array_equal(unused, np.full_like(unused, CANONICAL[COLUMN[name]]))


def test_crops_and_orders_are_uniform(drawn):
    for values, count in (
        (drawn["crop_x"], 33),
        (drawn["crop_y"], 33),
        (drawn["order"][drawn["jitter"] == 1], 24),
    ):
        seen = np.bincount(values.astype(int), minlength=count)
        assert len(seen) == count
        assert stats.chisquare(seen).pvalue > 1e-4


def test_parameters_do_not_hang_together(drawn):
    # |correlation| of independent columns is normal with sigma 1/100; 28 pairs stay below 4 sigma
    free = np.stack([drawn[name] for name in ("crop_x", "crop_y", "hflip", "vflip", "jitter", "blur")])
    assert np.abs(np.corrcoef(free) - np.eye(len(free))).max() < 0.04
    factors = np.stack([drawn[name][drawn["jitter"] == 1] for name in ("brightness", "contrast", "saturation", "hue")])
    assert np.abs(np.corrcoef(factors) - np.eye(4)).max() < 0.06


# --- laws


@st.composite
def settings(draw) -> dict[str, object]:
    patch_px = draw(st.integers(3, 512))
    crop_px = draw(st.integers(2, patch_px))
    chance, spread = st.floats(0, 1), st.floats(0, 1)
    return {
        "patch_px": patch_px,
        "crop_px": crop_px,
        "hflip": draw(chance),
        "vflip": draw(chance),
        "jitter": draw(chance),
        "brightness": draw(spread),
        "contrast": draw(spread),
        "saturation": draw(spread),
        "hue": draw(st.floats(0, 1 / 6)),
        "blur": draw(chance),
        "blur_kernel_px": 2 * draw(st.integers(0, min(7, crop_px - 1))) + 1,
        "blur_sigma": tuple(sorted(draw(st.tuples(*[st.floats(0.01, 5)] * 2)))),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


corners = st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2), min_size=1, max_size=6)


@given(settings(), st.text(max_size=8), corners, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3), st.data())
def test_crops_lie_in_the_patch_and_rows_ignore_each_other(settings, slide_id, corner, views, data):
    spec = ViewSpec(**settings)
    coords = np.array(corner, dtype=np.int32)
    params = sample_views(spec, slide_id, coords, views)
    margin = spec.patch_px - spec.crop_px
    assert np.isin(params[..., :2], np.arange(margin + 1)).all()
    assert np.isin(params[..., [2, 3, 4, 10]], (0, 1)).all()
    assert np.isin(params[..., 9], np.arange(24)).all()
    chosen = data.draw(st.lists(st.integers(0, len(corner) - 1), min_size=1, max_size=6))
    np.testing.assert_array_equal(sample_views(spec, slide_id, coords[chosen], views), params[chosen])


@given(settings(), st.integers(0, 2**32 - 1))
def test_every_drawn_view_can_be_cut(settings, key):
    spec = ViewSpec(**settings)
    patch = np.random.default_rng(key).integers(0, 256, (spec.patch_px, spec.patch_px, 3), dtype=np.uint8)
    view = apply_view(patch, sample_views(spec, "s", np.zeros((1, 2), np.int32), [key])[0, 0], spec)
    assert view.shape == (spec.crop_px, spec.crop_px, 3)


@given(settings())
def test_a_spec_survives_json(settings):
    spec = ViewSpec(**settings)
    assert ViewSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


# --- refusals


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_px": 257},
        {"crop_px": 1, "blur_kernel_px": 1},
        {"hflip": 1.5},
        {"vflip": -0.1},
        {"jitter": float("nan")},
        {"blur": 2.0},
        {"brightness": -0.1},
        {"contrast": 1.1},
        {"saturation": float("nan")},
        {"hue": 0.2},
        {"hue": -0.1},
        {"blur_kernel_px": 8},
        {"blur_kernel_px": -1},
        {"blur_kernel_px": 9, "crop_px": 4},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"blur_sigma": (1.0,)},
        {"blur_sigma": (1.0, float("inf"))},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_impossible_specs_are_refused_by_name(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        ViewSpec(**settings)


def test_a_wrong_patch_is_refused():
    params = sample_views(SPEC, "s", grid(1), [0])[0, 0]
    with pytest.raises(UsageError, match="256 x 256"):
        apply_view(he_patch(0, size=224), params, SPEC)


@pytest.mark.parametrize(
    ("column", "value"), [("crop_x", 33), ("crop_y", -1), ("order", 24), ("hue", np.nan), ("sigma", np.inf)]
)
def test_parameters_of_another_spec_are_refused(column, value):
    params = sample_views(SPEC, "s", grid(1), [0])[0, 0]
    params[COLUMN[column]] = value
    with pytest.raises(UsageError, match=column):
        apply_view(he_patch(0), params, SPEC)


def test_wrong_keys_are_refused():
    with pytest.raises(UsageError, match="patch id"):
        sample_views(SPEC, "s", grid(2), [0], ["only one"])
    for view in (-1, 2**32):
        with pytest.raises(UsageError, match="view indices"):
            sample_views(SPEC, "s", grid(2), [view])


# --- hashes


def test_pixel_hash_is_xxh3_of_each_views_bytes():
    # the digest of no bytes is fixed by the xxHash specification
    assert pixel_hash(np.empty((1, 0, 0, 3), np.uint8)).tolist() == [0x2D06800538D394C2]
    views = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    hashes = pixel_hash(views)
    assert hashes.dtype == np.uint64
    np.testing.assert_array_equal(pixel_hash(views[::-1]), hashes[::-1])
    np.testing.assert_array_equal(pixel_hash(np.asfortranarray(views)), hashes)
    views[2, 7, 7, 2] ^= 1
    assert (pixel_hash(views) == hashes).tolist() == [True, True, False, True, True]
