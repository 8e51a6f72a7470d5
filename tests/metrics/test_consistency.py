"""Registered patches under several conditions: plain loops, ties, planted strengths, intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.consistency import consistency_sums, median_over_pairs, pair_means, registered_pair
from g2l_core.metrics.intervals import estimate, of_neighbors
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.scales import LINE

KS = (1, 3, 5, 10)


def scans(seed, condition, n=200, dim=12, count=3):
    """The same tissue under some conditions: its look, the condition's own, and noise."""
    rng = np.random.default_rng(seed)
    tissue = rng.standard_normal((n, dim))
    return {
        f"scanner {number}": (
            tissue + condition * rng.standard_normal(dim) + 0.4 * rng.standard_normal((n, dim))
        ).astype(np.float32)
        for number in range(count)
    }


def loop(first, second, ks):
    """The definition, patch by patch; others at the counterpart's distance count against it."""
    pool = np.concatenate([first, second]).astype(np.float64)
    unit = pool / np.linalg.norm(pool, axis=1, keepdims=True)
    cosine, n = unit @ unit.T, len(first)
    table = np.zeros((n, 2 + len(ks)))
    for row in range(2 * n):
        own = cosine[row, (row + n) % (2 * n)]
        others = [cosine[row, j] for j in range(2 * n) if j not in (row, (row + n) % (2 * n))]
        rank = sum(other >= own - 1e-12 for other in others)
        table[row % n, 2:] += [0.5 * (rank < k) for k in ks]
    table[:, 0], table[:, 1] = 1, np.diag(cosine[:n, n:])
    return table


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), condition=st.floats(0, 2), half=st.booleans())
def test_pair_equals_plain_loops(seed, condition, half):
    first, second, _ = scans(seed, condition, n=40).values()
    first[7], second[9] = first[3], second[3]  # copies tie
    if half:
        first, second = first.astype(np.float16), second.astype(np.float16)
    np.testing.assert_allclose(registered_pair(first, second, ks=KS), loop(first, second, KS), atol=1e-9)


def test_order_of_conditions_and_of_patches_does_not_matter():
    first, second, _ = scans(0, 0.5).values()
    got = registered_pair(first, second)
    np.testing.assert_allclose(registered_pair(second, first), got, atol=1e-12)
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_allclose(registered_pair(first[order], second[order]), got[order], atol=1e-12)


def test_features_that_do_not_change_are_perfect_and_collapsed_ones_find_nothing():
    (first, *_) = scans(0, 0).values()
    np.testing.assert_allclose(registered_pair(first, first), np.ones((200, 6)), atol=1e-12)
    point = np.broadcast_to(first[0], first.shape)
    collapsed = registered_pair(point, point)
    np.testing.assert_allclose(collapsed[:, 1], 1)
    np.testing.assert_array_equal(collapsed[:, 2:], 0)


def test_consistency_falls_with_the_strength_of_the_condition():
    values = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        data = scans(1, strength)
        values.append(pair_means(consistency_sums(data, np.arange(200)).sums[:1])[0].mean(axis=0))
    assert (np.diff(np.array(values), axis=0) < -0.02).all()


def test_features_without_tissue_find_their_counterpart_by_chance():
    rng = np.random.default_rng(0)
    (found,) = (registered_pair(*rng.standard_normal((2, 300, 20)), ks=(10, 100)).mean(axis=0)[2:],)
    np.testing.assert_allclose(found, [10 / 599, 100 / 599], atol=0.03)


def test_medians_over_pairs_and_their_interval():
    data, regions = scans(0, 0.6, count=4), np.arange(200) // 10
    got = consistency_sums(data, regions, ks=(1, 5))
    assert len(got.pairs) == 6
    assert got.sums.shape == (1 + 20 + 190, 6, 4)
    by_pair = np.stack([registered_pair(data[a], data[b], ks=(1, 5)).mean(axis=0) for a, b in got.pairs])
    for k, expected in ((None, by_pair[:, 1]), (1, by_pair[:, 2]), (5, by_pair[:, 3])):
        column = got.column(k)
        figure = of_neighbors(median_over_pairs(column)(got.sums), design_of(regions, unit="regions"), LINE)
        found = estimate(figure)
        assert found.value == pytest.approx(np.median(expected), abs=1e-12)
        assert found.low < found.value < found.high
        among = median_over_pairs(column, among=[0, 5])(got.sums)
        assert among[0] == pytest.approx((expected[0] + expected[5]) / 2, abs=1e-12)
    some = consistency_sums(data, regions, pairs=[("scanner 3", "scanner 1")], ks=(1, 5))
    np.testing.assert_allclose(some.sums[:, 0], got.sums[:, got.pairs.index(("scanner 1", "scanner 3"))], atol=1e-12)


def test_a_region_is_left_out_of_the_pool_too():
    data, regions = scans(0, 0.6), np.arange(200) // 25
    got = consistency_sums(data, regions, ks=(1, 5))
    for region in range(8):
        kept = {name: rows[regions != region] for name, rows in data.items()}
        alone = consistency_sums(kept, regions[regions != region], ks=(1, 5)).sums[0]
        np.testing.assert_allclose(got.sums[1 + region], alone, atol=1e-9)


def test_what_cannot_be_compared_is_refused():
    data = scans(0, 0)
    first, second, _ = data.values()
    with pytest.raises(TaskError, match="first 200, second 199"):
        registered_pair(first, second[1:])
    with pytest.raises(TaskError, match="second_dim 11"):
        registered_pair(first, second[:, 1:])
    with pytest.raises(TaskError, match="ks between 1 and 2 patches - 2 = 8; got"):
        registered_pair(first[:5], second[:5], ks=(1, 9))
    with pytest.raises(TaskError, match="rows of zeros"):
        registered_pair(0 * first, second)
    with pytest.raises(TaskError, match="pairs of two of the conditions"):
        consistency_sums(data, np.arange(200), pairs=[("scanner 0", "scanner 9")])
    with pytest.raises(TaskError, match="pairs of two of the conditions"):
        consistency_sums({"scanner 0": first}, np.arange(200))
    with pytest.raises(TaskError, match=r"counted at k = \[1, 3, 5, 10\]; got 2"):
        consistency_sums(data, np.arange(200)).column(2)
