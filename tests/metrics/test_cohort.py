"""CKA of chunked arrays: whatever the chunks, the figure of the rows in one piece."""

import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.cohort import lazy_cka_moments
from g2l_core.metrics.moments import CkaMoments, cka_center, cka_moments
from g2l_core.metrics.similarity import linear_cka


def related(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of two widths that share three directions, far from the origin."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rows, 3))
    x = shared @ rng.normal(size=(3, 9)) + rng.normal(size=(rows, 9)) + 40
    y = shared @ rng.normal(size=(3, 5)) + rng.normal(size=(rows, 5)) - 70
    return x.astype(np.float32), y.astype(np.float32)


def in_one_piece(x: np.ndarray, y: np.ndarray) -> CkaMoments:
    return cka_moments(x, y, center=cka_center(x, y))


@given(cuts=st.lists(st.integers(1, 199), max_size=9, unique=True), y_chunk=st.integers(1, 200))
def test_any_chunks_give_the_cka_of_the_whole(cuts, y_chunk):
    x, y = related(200)
    lengths = tuple(np.diff([0, *sorted(cuts), 200]).tolist())
    lazy = lazy_cka_moments(da.from_array(x, chunks=(lengths, 4)), da.from_array(y, chunks=(y_chunk, 5)))
    found, expected = lazy.compute(scheduler="sync"), in_one_piece(x, y)
    assert found.n == 200
    for debiased in (True, False):
        assert linear_cka(found, debiased=debiased) == pytest.approx(linear_cka(expected, debiased=debiased), abs=1e-10)


def test_patches_that_could_not_be_read_are_left_out_of_both():
    x, y = related(120)
    lost_x, lost_y = np.arange(0, 30), np.array([50, 51, 119])
    known = np.setdiff1d(np.arange(120), np.concatenate([lost_x, lost_y]))
    expected = in_one_piece(x[known], y[known])
    x[lost_x], y[lost_y] = np.nan, np.nan
    lazy = lazy_cka_moments(da.from_array(x, chunks=(30, -1)), da.from_array(y, chunks=(30, -1)))
    found = lazy.compute(scheduler="sync")
    assert found.n == 87
    # The first chunk has no row to take the center from, so the sums are about the origin and some digits are lost.
    assert linear_cka(found, debiased=True) == pytest.approx(linear_cka(expected, debiased=True), abs=1e-6)


def test_a_row_that_is_nan_in_part_is_an_error():
    x, y = related(40)
    x[17, 2] = np.nan
    lazy = lazy_cka_moments(da.from_array(x, chunks=(10, -1)), da.from_array(y, chunks=(10, -1)))
    with pytest.raises(TaskError, match="1 of 10 rows of x hold NaN"):
        lazy.compute(scheduler="sync")


def test_a_cohort_without_a_patch_of_both_encoders_is_an_error():
    x, y = related(40)
    x[:20], y[20:] = np.nan, np.nan
    lazy = lazy_cka_moments(da.from_array(x, chunks=(10, -1)), da.from_array(y, chunks=(10, -1)))
    with pytest.raises(TaskError, match="no patch has features of both"):
        lazy.compute(scheduler="sync")


def test_other_lengths_are_refused_before_anything_is_read():
    x, y = related(40)
    with pytest.raises(TaskError, match="40"):
        lazy_cka_moments(da.from_array(x), da.from_array(y[:39]))


DEVICES = [
    "cpu:0",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_torch_device_gives_the_sums_of_numpy(device, monkeypatch):
    monkeypatch.setattr("g2l_core.metrics.rows._BLOCK_ROWS", 64)
    x, y = related(200)
    center = cka_center(x, y)
    found, expected = cka_moments(x, y, center=center, device=device), cka_moments(x, y, center=center)
    for name in ("total", "gram", "norm_total", "norm_gram"):
        assert isinstance(getattr(found, name), np.ndarray)
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-9)
    assert linear_cka(found, debiased=True) == pytest.approx(linear_cka(expected, debiased=True), abs=1e-12)
