"""The filtered search finds exactly what brute force finds, whatever the rows are like."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2l_core.metrics.knn import candidates
from g2l_core.metrics.knn import neighbors as module
from g2l_core.metrics.knn.candidates import _floats, _rounded_bits
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.knn.normalized import normalized_rows, squared_distance_bounds, squared_distances, widened
from g2l_core.metrics.knn.reference import nearest_by_definition

SEEDS = st.integers(0, 2**32 - 1)
METRICS = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def spread(rng, n, dim):
    return rng.standard_normal((n, dim))


def shifted(rng, n, dim):
    """A common part a hundred times as long as the rest."""
    return rng.standard_normal((n, dim)) + 100


def tight(rng, n, dim):
    """Clusters far tighter than low precision can resolve."""
    return rng.standard_normal((4, dim))[rng.integers(4, size=n)] + 1e-3 * rng.standard_normal((n, dim))


def repeated(rng, n, dim):
    return rng.standard_normal((n // 6, dim))[rng.integers(n // 6, size=n)]


def outlying(rng, n, dim):
    """Some rows are ten thousand times as long."""
    return rng.standard_normal((n, dim)) * np.where(rng.random((n, 1)) < 0.05, 1e4, 1)


KINDS = pytest.mark.parametrize("draw", [spread, shifted, tight, repeated, outlying])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_MANY_PAIRS", 1)
    monkeypatch.setattr(candidates, "_TILE", 32)


@METRICS
@KINDS
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_filtered_search_equals_brute_force(metric, draw, bfloat16, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: bfloat16)
    rng = np.random.default_rng(0)
    features = (draw(rng, 500, 24) / (2 if dtype == np.float16 else 1)).astype(dtype)
    groups = rng.integers(30, size=500)
    expected = nearest_by_definition(features, None, 7, metric=metric, groups=groups)
    found = nearest(features, None, 7, metric=metric, groups=groups)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-9, atol=1e-12)
    squares = 2 * expected.distances if metric == "cosine" else expected.distances**2
    resolved = np.array([all(abs(a - b) > 1e-13 or a == b == 0 for a, b in pairwise(row)) for row in squares])
    assert resolved.mean() > 0.5 or draw is repeated
    np.testing.assert_array_equal(found.indices[resolved], expected.indices[resolved])


@METRICS
@KINDS
@settings(max_examples=8)
@given(seed=SEEDS, k=st.integers(1, 12))
def test_filtered_search_equals_the_exhaustive_search(metric, draw, seed, k):
    rng = np.random.default_rng(seed)
    features, queries = (draw(rng, 150, 6).astype(np.float32) for _ in range(2))
    groups, query_groups = rng.integers(8, size=(2, 150))
    plain = nearest(features, None, k, metric=metric, groups=groups)
    plain_queries = nearest(features, queries, k, metric=metric, groups=groups, query_groups=query_groups)
    alone = nearest(features, queries, k, metric=metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY_PAIRS", 1)
        patch.setattr(candidates, "_TILE", 32)
        for expected, arguments in (
            (plain, (features, None, groups, None)),
            (plain_queries, (features, queries, groups, query_groups)),
            (alone, (features, queries, None, None)),
        ):
            found = nearest(*arguments[:2], k, metric=metric, groups=arguments[2], query_groups=arguments[3])
            np.testing.assert_array_equal(found.indices, expected.indices)
            np.testing.assert_array_equal(found.distances, expected.distances)


@METRICS
def test_rows_that_are_all_alike_come_in_their_order(metric, small_tiles):
    found = nearest(np.ones((90, 4), np.float16), None, 3, metric=metric)
    np.testing.assert_array_equal(found.indices[[0, 2, 50]], [[1, 2, 3], [0, 1, 3], [0, 1, 2]])
    assert (found.distances == 0).all()


def test_most_queries_are_settled_by_the_first_filter(small_tiles, monkeypatch):
    searches = []
    plain = module._settle_filtered

    def spy(search, pending, precision):
        rest = plain(search, pending, precision)
        searches.append((precision, len(pending), len(rest)))
        return rest

    monkeypatch.setattr(module, "_settle_filtered", spy)
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: True)
    rng = np.random.default_rng(0)
    features = spread(rng, 3000, 64).astype(np.float16)
    features[:300] = tight(rng, 300, 64) * 5
    nearest(features, None, 1)
    assert searches[0][:2] == ("bfloat16", 3000)
    assert 0 < searches[0][2] <= 300
    assert searches[1][:2] == ("float32", searches[0][2])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "dim"), [(200, 50), (700, 1024)])
def test_scores_are_upper_bounds_within_the_doubt(precision, rows, dim):
    rng = np.random.default_rng(0)
    normalized, reference = normalized_rows(outlying(rng, rows, dim), None, "euclidean")
    codes = np.arange(rows), np.arange(rows)
    filtered = candidates.candidate_filter(
        (normalized, reference), codes, None, 3, precision=precision, max_candidates=100
    )
    side = filtered.reference
    got = candidates._product(side.left_factor(slice(None)), side.values)
    x = normalized.take(side.rows)
    squares = np.einsum("ij,ij->i", x, x)
    exact = -np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0) / 2
    most = exact + 2 * filtered.rho * (squares[:, None] + squares)
    assert got.dtype == side.values.dtype
    for bound, within in ((exact, np.less_equal), (most, np.greater_equal)):
        assert within(torch.from_numpy(bound).to(got.dtype).double().numpy(), got.double().numpy()).all()


@METRICS
@pytest.mark.parametrize("draw", [spread, shifted, tight, outlying])
def test_distances_in_float32_lie_within_their_bounds(metric, draw):
    rng = np.random.default_rng(0)
    normalized, reference = normalized_rows(draw(rng, 300, 40).astype(np.float32), None, metric)
    query, row = np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300)
    exact = squared_distances(normalized, reference, query, row, np.float64)
    low, high = squared_distance_bounds(
        squared_distances(normalized, reference, query, row, np.float32), normalized, reference
    )
    assert (low <= exact).all()
    assert (exact <= high).all()
    assert (low > 0).any()


def test_every_half_is_widened_exactly():
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)][:, None]
    np.testing.assert_array_equal(widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40))
def test_rounding_is_torch_s(values):
    points = np.array([values], np.float64)
    for precision, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        expected = torch.from_numpy(points.astype(np.float32)).to(kind).float().numpy()
        assert np.array_equal(_floats(_rounded_bits(points, precision)).view(np.float32), expected)


@METRICS
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_large_features_are_widened_row_by_row_to_the_same_end(metric, kind, monkeypatch):
    features = spread(np.random.default_rng(0), 300, 24).astype(kind)
    kept = nearest(features, None, 5, metric=metric)
    monkeypatch.setattr("g2l_core.metrics.knn.normalized._FLOAT32_BYTES", 0)
    assert normalized_rows(features, None, metric)[1].float32 is None
    recomputed = nearest(features, None, 5, metric=metric)
    assert np.array_equal(kept.indices, recomputed.indices)
    assert np.array_equal(kept.distances, recomputed.distances)
