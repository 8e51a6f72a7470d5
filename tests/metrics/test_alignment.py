"""RBF CKA, mutual neighbors, Procrustes, effective rank and trimming against dense formulas and planted truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist, pdist

from g2l_core.errors import TaskError
from g2l_core.metrics.alignment import (
    central_rows,
    effective_rank,
    mutual_neighbors,
    procrustes_similarity,
    rbf_cka,
)
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.moments import cka_center, cka_moments
from g2l_core.metrics.similarity import linear_cka

SEEDS = st.integers(0, 2**32 - 1)


def related(seed, n=60, dim_x=7, dim_y=5, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim_x))
    return x, x @ rng.standard_normal((dim_x, dim_y)) + noise * rng.standard_normal((n, dim_y)) + 3.0


def moments(x, y):
    return cka_moments(x, y, center=cka_center(x, y))


def dense_rbf_cka(x, y, bandwidth, debiased):
    n = len(x)
    k, m = (np.exp(-(cdist(f, f) ** 2) / (2 * (bandwidth * np.median(pdist(f))) ** 2)) for f in (x, y))

    def hsic(a, b):
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(a @ h @ b @ h)
        a, b, one = a - np.diag(np.diag(a)), b - np.diag(np.diag(b)), np.ones(n)
        return np.trace(a @ b) + a.sum() * b.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (one @ a @ b @ one)

    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 4.0])
@given(seed=SEEDS)
def test_rbf_cka_equals_the_dense_formula(debiased, bandwidth, seed):
    x, y = related(seed)
    # the median of an even count is the mean of two distances there, of two squares here
    got = rbf_cka(x[:50], y[:50], debiased=debiased, bandwidth=bandwidth, seed=0)
    assert got == pytest.approx(dense_rbf_cka(x[:50], y[:50], bandwidth, debiased), abs=1e-3)


def test_rbf_cka_does_not_see_rotation_scale_and_shift():
    x, _ = related(0)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))
    assert rbf_cka(x, 5 * x @ rotation + 2, debiased=True, seed=0) == pytest.approx(1.0, abs=1e-9)


def test_wide_rbf_cka_is_linear_cka():
    x, y = related(2)
    wide = rbf_cka(x, y, debiased=True, bandwidth=100.0, seed=0)
    assert wide == pytest.approx(linear_cka(moments(x, y), debiased=True), abs=1e-3)


def test_rbf_cka_of_a_sample_is_near_that_of_all_and_seeded():
    x, y = related(3, n=1500)
    whole = rbf_cka(x, y, debiased=True, seed=0)
    samples = [rbf_cka(x, y, debiased=True, max_rows=400, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert samples == pytest.approx([whole] * 3, abs=0.05)


@given(seed=SEEDS)
def test_mutual_neighbors_equal_sets(seed):
    x, y = related(seed, n=40)
    groups = np.arange(40) // 4
    one, other = (nearest(f, None, 9, groups=groups) for f in (x, y))
    got = mutual_neighbors(one, other, [1, 4, 9])
    for row in range(40):
        for column, k in enumerate((1, 4, 9)):
            assert got[row, column] == len(set(one.indices[row, :k]) & set(other.indices[row, :k]))
    assert (mutual_neighbors(one, one, [4]) == 4).all()


@given(seed=SEEDS, dims=st.sampled_from([(7, 5), (5, 5), (3, 6)]))
def test_procrustes_equals_scipys_best_rotation(seed, dims):
    x, y = related(seed, 40, *dims)
    a, b = x - x.mean(0), y - y.mean(0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    width = max(dims)
    a, b = (np.pad(f, ((0, 0), (0, width - f.shape[1]))) for f in (a, b))
    rotation, nuclear = orthogonal_procrustes(a, b)
    assert procrustes_similarity(moments(x, y)) == pytest.approx(nuclear, abs=1e-9)
    assert 2 - 2 * procrustes_similarity(moments(x, y)) == pytest.approx(
        np.linalg.norm(a @ rotation - b) ** 2, abs=1e-9
    )


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((300, 12)))
    left -= left.mean(axis=0)
    left, _ = np.linalg.qr(left)
    right, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    assert effective_rank(left @ right + 9) == pytest.approx(12.0, abs=1e-6)
    values = np.array([8.0, 4.0, 2.0, 1.0])
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(left[:, :4] * values @ right[:4]) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(np.outer(rng.standard_normal(50), np.ones(3))) == pytest.approx(1.0, abs=1e-6)


def test_trimming_takes_the_outliers_and_saves_cka():
    x, y = related(4, n=1000)
    clean = linear_cka(moments(x, y), debiased=True)
    x[[3, 500]] += 300 * np.random.default_rng(0).standard_normal((2, 7))
    y[[7, 900]] += 300 * np.random.default_rng(1).standard_normal((2, 5))
    assert abs(linear_cka(moments(x, y), debiased=True)) < 0.2
    kept = central_rows(x, y, share=0.002)
    np.testing.assert_array_equal(np.flatnonzero(~kept), [3, 7, 500, 900])
    assert linear_cka(moments(x[kept], y[kept]), debiased=True) == pytest.approx(clean, abs=0.01)
    assert central_rows(x, y, share=0.0).all()


def test_every_index_grows_with_what_is_shared():
    values = []
    for noise in (8.0, 2.0, 0.5):
        x, y = related(5, n=400, noise=noise)
        one, other = (nearest(f, None, 10) for f in (x, y))
        values.append(
            (
                rbf_cka(x, y, debiased=True, seed=0),
                mutual_neighbors(one, other, [10]).mean(),
                procrustes_similarity(moments(x, y)),
            )
        )
    assert (np.diff(np.array(values), axis=0) > 0.02).all()


def test_independent_features_give_zero_and_chance():
    """The debiased estimators are unbiased under independence, and shared neighbors are k^2 / (n - 1) of k."""
    rng = np.random.default_rng(0)
    values, linear, shared = [], [], []
    for _ in range(200):
        x, y = rng.standard_normal((40, 6)), rng.standard_normal((40, 4))
        values.append(rbf_cka(x, y, debiased=True, seed=0))
        linear.append(linear_cka(moments(x, y), debiased=True))
        shared.append(mutual_neighbors(nearest(x, None, 5), nearest(y, None, 5), [5]).mean() / 5)
    for figures, truth in ((values, 0.0), (linear, 0.0), (shared, 5 / 39)):
        error = np.std(figures, ddof=1) / np.sqrt(200)
        assert abs(np.mean(figures) - truth) < 3 * error


def test_what_cannot_be_had():
    x, y = related(0)
    same = np.ones((60, 3))
    graph = nearest(x, None, 5)
    for call, said in (
        (lambda: rbf_cka(x, y[1:], debiased=True, seed=0), "x 60, y 59"),
        (lambda: rbf_cka(x[:3], y[:3], debiased=True, seed=0), "at least 4 rows"),
        (lambda: rbf_cka(x, same, debiased=True, seed=0), "median distance of the rows of y is 0"),
        (lambda: rbf_cka(x, y, debiased=True, bandwidth=0.0, seed=0), "positive multiple"),
        (lambda: mutual_neighbors(graph, graph, [6]), "between 1 and the 5"),
        (lambda: mutual_neighbors(graph, nearest(x[1:], None, 5), [5]), "one 60, other 59"),
        (lambda: procrustes_similarity(moments(x, same)), "all alike"),
        (lambda: effective_rank(same), "all 60 rows are alike"),
        (lambda: central_rows(x, y, share=0.5), r"\[0, 0.5\)"),
    ):
        with pytest.raises(TaskError, match=said):
            call()
