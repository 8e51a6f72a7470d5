"""Stain jitter: Ruifrok's amounts of stains, views in pairs, and stores without it as they were."""

import itertools
import json
from dataclasses import replace
from math import log10

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import UsageError
from g2l_core.patches.spec import MAX_STAIN_JITTER
from g2l_core.patches.stain import HED, stain_jitter
from g2l_core.patches.views import (
    COLUMNS,
    STAIN_COLUMNS,
    ViewSpec,
    apply_view,
    apply_views,
    columns_of,
    pixel_hash,
    sample_views,
    stain_twin,
)
from tests.patches.test_views import CANONICAL, grid, he_patch

SPEC = ViewSpec(stain_jitter=0.05)
FIRST = len(COLUMNS)


def by_densities(image, scales, shifts):
    """The stains taken apart and put together again in float64, as a textbook does it."""
    densities = -np.log10((image.astype(np.float64) + 1) / 256)
    amounts = densities @ np.linalg.inv(np.array(HED))
    return np.clip(256 * 10 ** -((amounts * scales + shifts) @ np.array(HED)) - 1, 0, 255)


spreads = st.floats(-MAX_STAIN_JITTER, MAX_STAIN_JITTER)


@given(st.lists(spreads, min_size=6, max_size=6), st.integers(0, 2**32 - 1))
def test_pixels_are_those_of_separated_stains(draws, seed):
    scales, shifts = 1 + np.array(draws[:3]), np.array(draws[3:])
    image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = stain_jitter(image, scales.tolist(), shifts.tolist())
    assert np.abs(found - by_densities(image, scales, shifts)).max() < 0.75  # 0.5 by rounding alone


def test_amounts_of_stains_are_ruifroks():
    """A color of pure hematoxylin or eosin changes by its own scale alone; white by none."""
    for stain in range(3):
        color = np.rint(256 * 10 ** -(0.8 * np.array(HED[stain])) - 1).astype(np.uint8)[None, None]
        others = [1.0 if i == stain else 1.4 for i in range(3)]
        assert np.abs(stain_jitter(color, others, [0, 0, 0]).astype(int) - color).max() <= 1
        doubled = stain_jitter(color, [1.4 if i == stain else 1.0 for i in range(3)], [0, 0, 0])
        densities = -np.log10((doubled[0, 0] + 1.0) / 256)
        assert densities == pytest.approx(1.12 * np.array(HED[stain]), abs=0.01)
    white = np.full((2, 2, 3), 255, np.uint8)
    np.testing.assert_array_equal(stain_jitter(white, [1.3, 0.7, 1.2], [0, 0, 0]), white)


def test_neutral_stains_change_no_level():
    levels = np.stack(np.broadcast_arrays(*np.ix_(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3)), axis=-1)
    image = levels.reshape(-1, 52, 3)
    np.testing.assert_array_equal(stain_jitter(image, [1, 1, 1], [0, 0, 0]), image)


def test_tables_do_not_hang_on_a_processors_last_bit():
    """No entry lies so near half a step that another logarithm would round it otherwise."""
    densities = [-8192 * log10((level + 1) / 256) for level in range(256)]
    levels = [256 * 10 ** (-k / 8192) - 1 for k in range(round(8192 * log10(256)) + 1)]
    assert min(abs(value % 1 - 0.5) for value in densities + levels) > 1e-9


def test_sums_fit_32_bits_twice_over():
    matrices = np.array([np.linalg.inv(HED) @ np.diag(s) @ HED for s in itertools.product((0.5, 1.5), repeat=3)])
    densest = 8192 * log10(256) * 2**14
    shifted = MAX_STAIN_JITTER * np.array(HED).sum(axis=0).max() * 8192 * 2**14
    assert np.abs(matrices).sum(axis=1).max() * densest + shifted < 2**31 * 0.6


def test_views_come_in_pairs_that_differ_only_in_stain():
    params = sample_views(SPEC, "s", grid(50), range(7))
    assert params.shape == (50, 7, len(columns_of(SPEC)))
    assert columns_of(SPEC) == COLUMNS + STAIN_COLUMNS
    assert stain_twin(np.arange(1, 7)).tolist() == [2, 1, 4, 3, 6, 5]
    for view in (1, 3, 5):
        np.testing.assert_array_equal(params[:, view, :FIRST], params[:, view + 1, :FIRST])
        assert (params[:, view, FIRST:] != params[:, view + 1, FIRST:]).all()
    neutral = np.broadcast_to(np.array([1, 1, 1, 0, 0, 0], np.float32), (50, 4, 6))
    np.testing.assert_array_equal(params[:, [0, 1, 3, 5], FIRST:], neutral)
    np.testing.assert_array_equal(params[:, 0, :FIRST], np.broadcast_to(np.float32(CANONICAL), (50, 12)))
    assert len(np.unique(params[:, [2, 4, 6], FIRST:])) == 50 * 3 * 6  # each drawn for itself


def test_stains_are_uniform_over_their_range():
    drawn = sample_views(SPEC, "s", grid(4000), [2])[:, 0, FIRST:] - np.array([1, 1, 1, 0, 0, 0])
    assert np.abs(drawn).max() <= 0.05 + 1e-6
    assert np.abs(drawn.mean(axis=0)).max() < 4 * 0.05 / 3**0.5 / 4000**0.5
    np.testing.assert_allclose(drawn.var(axis=0), 0.05**2 / 3, rtol=0.1)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.07


def test_other_views_are_those_of_a_spec_without_stains():
    """Odd views, in parameters and pixels; and any view of a spec without stains has its former columns."""
    plain, patch = replace(SPEC, stain_jitter=0.0), he_patch(1)
    with_stains, without = (sample_views(spec, "s", grid(3), range(6)) for spec in (SPEC, plain))
    np.testing.assert_array_equal(with_stains[:, [0, 1, 3, 5], :FIRST], without[:, [0, 1, 3, 5]])
    assert without.shape[2] == FIRST
    ours, theirs = apply_views(patch, with_stains[0, [0, 1, 3]], SPEC), apply_views(patch, without[0, [0, 1, 3]], plain)
    np.testing.assert_array_equal(ours, theirs)


def test_a_stained_view_is_the_stained_crop_of_its_twin():
    spec, patch = replace(SPEC, jitter=0.0, blur=0.0), he_patch(2)
    plain, stained = sample_views(spec, "s", grid(1), [1, 2])[0]
    expected = stain_jitter(apply_view(patch, plain, spec), *stained[FIRST:].reshape(2, 3).tolist())
    np.testing.assert_array_equal(apply_view(patch, stained, spec), expected)


def test_stained_pixels_have_not_changed_since_they_came():
    ramp = np.arange(256, dtype=np.uint8)
    patch = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], (ramp[:, None] ^ ramp)), axis=-1)
    params = sample_views(replace(SPEC, jitter=1.0, blur=1.0), "slide", np.array([[-3, 1024]], np.int32), [2], ["t"])
    assert pixel_hash(apply_views(patch, params[0], SPEC)).tolist() == [13059843452440365393]


def test_a_spec_without_stains_is_stored_as_before():
    plain = ViewSpec().to_json()
    assert "stain_jitter" not in plain
    assert list(plain) == [
        "patch_px", "crop_px", "hflip", "vflip", "jitter", "brightness", "contrast", "saturation", "hue", "blur",
        "blur_kernel_px", "blur_sigma", "seed",
    ]  # fmt: skip
    assert ViewSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    assert ViewSpec.from_json(plain) == ViewSpec()


def test_bad_stains_are_refused():
    for spread in (-0.01, 0.51, float("nan")):
        with pytest.raises(UsageError, match="stain_jitter"):
            ViewSpec(stain_jitter=spread)
    params = sample_views(SPEC, "s", grid(1), [2])[0, 0]
    with pytest.raises(UsageError, match="expected the 12 parameters"):
        apply_view(he_patch(0), params, ViewSpec())
    with pytest.raises(UsageError, match="expected the 18 parameters"):
        apply_view(he_patch(0), params[:FIRST], SPEC)
    params[FIRST] = 3.0
    with pytest.raises(UsageError, match="scale_h"):
        apply_view(he_patch(0), params, SPEC)
