"""Pooling and voting over bags, by hand and against pandas."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.bags import bag_rows, bag_values, mean_pool, patch_vote


@given(seed=st.integers(0, 2**32 - 1), half=st.booleans())
def test_mean_pool_equals_pandas_in_any_order_of_patches(seed, half):
    rng = np.random.default_rng(seed)
    bags = np.array(["s9", "s10", "t"])[rng.integers(3, size=40)]
    features = (100 * rng.standard_normal((40, 5))).astype(np.float16 if half else np.float32)
    names, means = mean_pool(features, bags)
    expected = pd.DataFrame(features.astype(np.float64)).groupby(bags).mean()
    assert names.tolist() == expected.index.tolist()
    np.testing.assert_allclose(means, expected.to_numpy(), rtol=1e-12, atol=1e-12)
    order = rng.permutation(40)
    np.testing.assert_allclose(mean_pool(features[order], bags[order])[1], means, rtol=1e-12, atol=1e-12)


def test_float16_sums_do_not_overflow():
    assert mean_pool(np.full((9, 1), 60000, np.float16), np.zeros(9))[1] == 60000


def test_rows_of_bags_by_hand():
    rows = bag_rows(np.array(["b", "a", "b", "c", "a"]))
    assert [part.tolist() for part in rows] == [[1, 4], [0, 2], [3]]


def test_values_of_bags():
    bags = np.array(["b", "a", "b", "c"])
    np.testing.assert_array_equal(bag_values(np.array([2.0, 1.0, 2.0, 7.0]), bags, "time"), [1, 2, 7])
    with pytest.raises(TaskError, match=r"one label, but b has \['n', 't'\]"):
        bag_values(np.array(["t", "t", "n", "t"]), bags, "label")
    with pytest.raises(TaskError, match="values 3, bags 4"):
        bag_values(np.zeros(3), bags, "label")


def test_vote_by_hand():
    """Bag a: 2 of 3 patches say n though t has the greater mean. Bag b: one each, t with more confidence."""
    probabilities = np.array([[0.6, 0.4], [0.55, 0.45], [0.0, 1.0], [0.7, 0.3], [0.1, 0.9]])
    got = patch_vote(probabilities, np.array(["n", "t"]), np.array(["a", "a", "a", "b", "b"]))
    assert got.bags.tolist() == ["a", "b"]
    assert got.majority.tolist() == ["n", "t"]
    np.testing.assert_allclose(got.shares, [[2 / 3, 1 / 3], [0.5, 0.5]])
    np.testing.assert_allclose(got.probabilities, [[1.15 / 3, 1.85 / 3], [0.4, 0.6]])


@given(seed=st.integers(0, 2**32 - 1))
def test_vote_does_not_depend_on_the_order_of_patches(seed):
    rng = np.random.default_rng(seed)
    probabilities, bags = rng.dirichlet(np.ones(3), 30), rng.integers(6, size=30)
    order = rng.permutation(30)
    one = patch_vote(probabilities, np.arange(3), bags)
    other = patch_vote(probabilities[order], np.arange(3), bags[order])
    np.testing.assert_array_equal(one.majority, other.majority)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-12)
    np.testing.assert_allclose(one.shares.sum(axis=1), 1)
