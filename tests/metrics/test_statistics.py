"""Clusters of rows, and Holm's method by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import cluster_codes, cluster_sums, holm, require_aligned


def test_holm_by_hand():
    # sorted .01 x4, .02 x3, .03 x2, .2 x1; made monotone: .04 .06 .06 .2
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.2, 0.02])), [0.06, 0.04, 0.2, 0.06])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.04])), [0.5, np.nan, 0.08])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])
    assert holm(np.array([])).shape == (0,)
    with pytest.raises(TaskError, match=r"\[0, 1\]"):
        holm(np.array([1.2]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_raw_and_the_bonferroni_values(values):
    raw = np.array(values)
    adjusted = holm(raw)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(1, raw * len(raw)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


def test_cluster_helpers():
    codes, count = cluster_codes(np.array(["b", "a", "b"]))
    np.testing.assert_array_equal(codes, [1, 0, 1])
    assert count == 2
    sums = cluster_sums(np.array([[1, 2], [3, 4], [5, 6]]), np.array(["b", "a", "b"]))
    np.testing.assert_array_equal(sums, [[3, 4], [6, 8]])
    with pytest.raises(TaskError, match="rows 2, clusters 3"):
        cluster_sums(np.zeros((2, 1)), np.zeros(3))
    with pytest.raises(TaskError, match="a 0, b 0"):
        require_aligned(a=0, b=0)
