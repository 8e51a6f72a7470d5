"""The screened search finds exactly what brute force finds, whatever the rows are like."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2l_core.metrics.knn import neighbors as module
from g2l_core.metrics.knn import screening
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.knn.points import gap_bounds, gaps, points_of, widened
from g2l_core.metrics.knn.screening import _floats, _rounded_bits

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


def brute_force(features, queries, k, metric, groups, query_groups):
    """Distances as the definition has them, in float64, ties to the lower row."""
    rows, asked = features.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        rows, asked = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (rows, asked))
    squares = ((asked[:, None] - rows) ** 2).sum(axis=-1)
    squares[query_groups[:, None] == groups] = np.inf
    return np.argsort(squares, axis=1, kind="stable")[:, :k], np.sort(squares, axis=1)[:, :k]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_MANY_PAIRS", 1)
    monkeypatch.setattr(screening, "_TILE", 32)


@METRICS
@KINDS
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_screen_equals_brute_force(metric, draw, bfloat16, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: bfloat16)
    rng = np.random.default_rng(0)
    features = (draw(rng, 500, 24) / (2 if dtype == np.float16 else 1)).astype(dtype)
    groups = rng.integers(30, size=500)
    expected, squares = brute_force(features, features, 7, metric, groups, groups)
    found = nearest(features, None, 7, metric=metric, groups=groups)
    distances = squares / 2 if metric == "cosine" else np.sqrt(squares)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-9, atol=1e-12)
    resolved = np.array([all(abs(a - b) > 1e-13 or a == b == 0 for a, b in pairwise(row)) for row in squares])
    assert resolved.mean() > 0.5 or draw is repeated
    np.testing.assert_array_equal(found.indices[resolved], expected[resolved])


@METRICS
@KINDS
@settings(max_examples=8)
@given(seed=SEEDS, k=st.integers(1, 12))
def test_screen_equals_the_exhaustive_search(metric, draw, seed, k):
    rng = np.random.default_rng(seed)
    features, queries = (draw(rng, 150, 6).astype(np.float32) for _ in range(2))
    groups, query_groups = rng.integers(8, size=(2, 150))
    plain = nearest(features, None, k, metric=metric, groups=groups)
    plain_queries = nearest(features, queries, k, metric=metric, groups=groups, query_groups=query_groups)
    alone = nearest(features, queries, k, metric=metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY_PAIRS", 1)
        patch.setattr(screening, "_TILE", 32)
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


def test_most_queries_are_settled_by_the_first_screen(small_tiles, monkeypatch):
    asked = []
    plain = module._screened

    def spy(found, asked_points, base, codes, left, precision):
        rest = plain(found, asked_points, base, codes, left, precision)
        asked.append((precision, len(left), len(rest)))
        return rest

    monkeypatch.setattr(module, "_screened", spy)
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda: True)
    rng = np.random.default_rng(0)
    features = spread(rng, 3000, 64).astype(np.float16)
    features[:300] = tight(rng, 300, 64) * 5
    nearest(features, None, 1)
    assert asked[0][:2] == ("bfloat16", 3000)
    assert 0 < asked[0][2] <= 300
    assert asked[1][:2] == ("float32", asked[0][2])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "dim"), [(200, 50), (700, 1024)])
def test_scores_are_upper_bounds_within_the_doubt(precision, rows, dim):
    rng = np.random.default_rng(0)
    points, base = points_of(outlying(rng, rows, dim), None, "euclidean")
    codes = np.arange(rows), np.arange(rows)
    sweep = screening.screen((points, base), codes, None, 3, precision=precision, most=100)
    side = sweep.reference
    got = screening._product(side.left(slice(None)), side.values)
    x = points.of(side.rows)
    squares = np.einsum("ij,ij->i", x, x)
    exact = -np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0) / 2
    most = exact + 2 * sweep.rho * (squares[:, None] + squares)
    assert got.dtype == side.values.dtype
    for bound, within in ((exact, np.less_equal), (most, np.greater_equal)):
        assert within(torch.from_numpy(bound).to(got.dtype).double().numpy(), got.double().numpy()).all()


@METRICS
@pytest.mark.parametrize("draw", [spread, shifted, tight, outlying])
def test_distances_in_float32_lie_within_their_bounds(metric, draw):
    rng = np.random.default_rng(0)
    points, base = points_of(draw(rng, 300, 40).astype(np.float32), None, metric)
    query, row = np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300)
    exact = gaps(points, base, query, row, np.float64)
    low, high = gap_bounds(gaps(points, base, query, row, np.float32), points, base)
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
    monkeypatch.setattr("g2l_core.metrics.knn.points._MOST_WIDE", 0)
    assert points_of(features, None, metric)[1].wide is None
    made_anew = nearest(features, None, 5, metric=metric)
    assert np.array_equal(kept.indices, made_anew.indices)
    assert np.array_equal(kept.distances, made_anew.distances)
