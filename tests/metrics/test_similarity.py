"""CKA against the dense formulas, its laws, and the coverage of its jackknife."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics import patients, similarity
from g2l_core.metrics.intervals import Figure, compare, estimate
from g2l_core.metrics.moments import CkaMoments, cka_center, cka_moments
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.similarity import leave_out_each, linear_cka

ESTIMATORS = pytest.mark.parametrize("debiased", [False, True])


def dense_cka(x, y, debiased):
    """The n x n formulas as the papers print them."""
    n = len(x)
    x, y = x.astype(np.float64), y.astype(np.float64)
    x, y = x - x.mean(0), y - y.mean(0)

    def hsic1(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        mixed = 2 / (n - 2) * (one @ k @ m @ one)
        return (np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / (n - 1) / (n - 2) - mixed) / n / (n - 3)

    def hsic0(k, m):
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    hsic = hsic1 if debiased else hsic0
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def cka(x, y, debiased):
    return linear_cka(cka_moments(x, y, center=cka_center(x, y)), debiased=debiased)


def cka_interval(x, y, clusters, debiased, unit="clusters"):
    values = leave_out_each(x, y, clusters, debiased)
    return estimate(Figure(values=values, design=design_of(clusters, unit=unit, most=patients.MAX_GROUPS)))


def cka_difference(x, reference, y, clusters):
    design = design_of(clusters, unit="patients", most=patients.MAX_GROUPS)
    figures = [Figure(values=leave_out_each(side, y, clusters, True), design=design) for side in (x, reference)]
    found = compare(*figures, seed=0, margin=0.02)
    return found.estimate, found.p_value


def related(seed, n=40, dim_x=7, dim_y=5):
    """Features that share some of their variance."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim_x))
    return x, x @ rng.standard_normal((dim_x, dim_y)) + rng.standard_normal((n, dim_y)) + 3.0


@ESTIMATORS
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 60))
def test_equals_the_dense_formula(debiased, seed, n):
    x, y = related(seed, n)
    assert cka(x, y, debiased) == pytest.approx(dense_cka(x, y, debiased), abs=1e-10)


@ESTIMATORS
def test_equals_the_dense_formula_over_several_blocks_of_float16(debiased, monkeypatch):
    monkeypatch.setattr("g2l_core.metrics.rows._BLOCK_ROWS", 64)
    x, y = (a.astype(np.float16) for a in related(0, n=300))
    assert cka(x, y, debiased) == pytest.approx(dense_cka(x, y, debiased), abs=1e-10)


def test_bias_on_independent_features_of_the_real_widths():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4096, 1024)), rng.standard_normal((4096, 1536))
    moments = cka_moments(x.astype(np.float32), y.astype(np.float32))
    assert linear_cka(moments, debiased=True) == pytest.approx(0.0, abs=0.01)
    assert linear_cka(moments, debiased=False) == pytest.approx(0.233, abs=0.01)


def test_debiased_keeps_a_negative_sign():
    values = [cka(*related_to_nothing(seed), debiased=True) for seed in range(40)]
    assert min(values) < -0.02
    assert abs(np.mean(values)) < 0.02


def related_to_nothing(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((30, 8)), rng.standard_normal((30, 6))


@ESTIMATORS
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e3, 1e3),
)
def test_invariant_under_rotation_scale_and_shift(debiased, seed, scale, shift):
    x, y = related(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((7, 7)))
    moved = scale * (x @ rotation) + shift
    assert cka(moved, y, debiased) == pytest.approx(cka(x, y, debiased), abs=1e-9)
    assert cka(y, moved, debiased) == pytest.approx(cka(x, y, debiased), abs=1e-9)
    assert cka(x, moved, debiased) == pytest.approx(1.0, abs=1e-9)


@ESTIMATORS
def test_not_invariant_under_any_other_linear_map(debiased):
    x, _ = related(3)
    assert cka(x, x * np.array([10, 1, 1, 1, 1, 1, 1.0]), debiased) < 0.9


@ESTIMATORS
@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_any_center_near_the_mean_gives_the_same(debiased, shift):
    x, y = related(4)
    moments = cka_moments(x + 1e4, y - 1e4, center=cka_center(x + 1e4, y - 1e4) + shift)
    assert linear_cka(moments, debiased=debiased) == pytest.approx(dense_cka(x, y, debiased), abs=1e-9)


@ESTIMATORS
def test_refuses_to_answer_from_lost_digits(debiased):
    x, y = related(4)
    with pytest.raises(TaskError, match="cka_center"):
        linear_cka(cka_moments(x + 1e5, y + 1e5), debiased=debiased)


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 39), min_size=1, max_size=5, unique=True))
def test_merging_in_any_order_and_taking_away_again(seed, cuts):
    x, y = related(seed)
    center = cka_center(x, y)
    whole = cka_moments(x, y, center=center)
    parts = [
        cka_moments(a, b, center=center)
        for a, b in zip(np.split(x, sorted(cuts)), np.split(y, sorted(cuts)), strict=True)
    ]
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged + part
        assert merged.n == whole.n
        assert linear_cka(merged, debiased=True) == pytest.approx(linear_cka(whole, debiased=True), abs=1e-12)
    rest = whole - parts[0]
    without = cka_moments(x[min(cuts) :], y[min(cuts) :], center=center)
    np.testing.assert_allclose(rest.gram, without.gram, atol=1e-10)
    np.testing.assert_allclose(rest.norm_total, without.norm_total, atol=1e-9)


def test_moments_of_other_centers_do_not_merge():
    x, y = related(0)
    with pytest.raises(TaskError, match="same center"):
        cka_moments(x, y) + cka_moments(x, y, center=np.ones(12))


def test_moments_of_other_widths_do_not_merge():
    x, y = related(0)
    with pytest.raises(TaskError, match="7 and 5"):
        cka_moments(x, y) + cka_moments(y, x)


@ESTIMATORS
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_features_that_do_not_vary_are_refused(debiased, side, constant):
    pair = list(related(0))
    pair[side] = np.full_like(pair[side], constant)
    with pytest.raises(TaskError, match=f"rows of {'xy'[side]} are all alike"):
        cka(*pair, debiased=debiased)


@ESTIMATORS
def test_three_rows_are_too_few(debiased):
    x, y = related(0, n=3)
    with pytest.raises(TaskError, match="at least 4 rows; got 3"):
        cka(x, y, debiased)


def test_bad_rows_are_counted():
    x, y = related(0)
    x[[3, 7], 2] = np.nan
    y[5, 0] = np.inf
    with pytest.raises(TaskError, match="2 of 40 rows of x"):
        cka_moments(x, y)
    with pytest.raises(TaskError, match="1 of 40 rows of features"):
        require_finite(y, "features")


def test_lengths_must_agree():
    x, y = related(0)
    with pytest.raises(TaskError, match="x 40, y 39"):
        cka_moments(x, y[1:])
    with pytest.raises(TaskError, match="columns 12, center 3"):
        cka_moments(x, y, center=np.zeros(3))


@ESTIMATORS
def test_jackknife_equals_recomputation_without_each_cluster(debiased):
    x, y = related(1, n=60)
    clusters = np.array(list("cabd"))[np.random.default_rng(2).permutation(60) % 4]
    without = [dense_cka(x[clusters != c], y[clusters != c], debiased) for c in "abcd"]
    spread = np.sqrt(3 / 4 * np.sum((without - np.mean(without)) ** 2))
    got = cka_interval(x.astype(np.float32), y.astype(np.float32), clusters, debiased=debiased, unit="slides")
    assert got.value == pytest.approx(dense_cka(x, y, debiased), abs=1e-6)
    assert (got.high - got.low) / 2 == pytest.approx(3.182446 * spread, rel=1e-4)
    assert got.method == "jackknife over 4 slides, t with 3.0 degrees of freedom"


def test_one_cluster_has_no_interval():
    x, y = related(1)
    got = cka_interval(x, y, np.zeros(40, int), debiased=True, unit="patients")
    assert np.isnan([got.low, got.high]).all()
    assert got.method == "none: 1 patients, and an interval needs 4"
    difference, p_value = cka_difference(x, y, y, np.zeros(40, int))
    assert np.isnan([difference.low, p_value]).all()


def test_interval_holds_the_population_value():
    rng = np.random.default_rng(0)
    mixing, clusters = rng.standard_normal((4, 3)), np.repeat(np.arange(20), 8)
    # z = effect of the cluster + noise, both of unit covariance I: cov(x) = 2 I, cov(x, y) = 2 A
    cross = 2 * mixing
    cov_y = 2 * mixing.T @ mixing + np.eye(3)
    truth = np.linalg.norm(cross) ** 2 / (np.linalg.norm(2 * np.eye(4)) * np.linalg.norm(cov_y))
    hits = 0
    for _ in range(150):
        x = rng.standard_normal((20, 4))[clusters] + rng.standard_normal((160, 4))
        y = x @ mixing + rng.standard_normal((160, 3))
        got = cka_interval(x, y, clusters, debiased=True)
        hits += got.low <= truth <= got.high
    assert 0.85 <= hits / 150 <= 0.99


def test_difference_of_two_encoders_to_one_teacher():
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((200, 6))
    before = teacher + 2 * rng.standard_normal((200, 6))
    after = teacher + 0.5 * rng.standard_normal((200, 6))
    clusters = np.repeat(np.arange(10), 20)
    got, p_value = cka_difference(after, before, teacher, clusters)
    assert got.value == pytest.approx(cka(after, teacher, True) - cka(before, teacher, True), abs=1e-12)
    assert got.low > 0
    assert p_value == 2.0**-9  # the t test's is smaller, but exchanging ten patients could give no less
    swapped, p_swapped = cka_difference(before, after, teacher, clusters)
    assert (swapped.low, swapped.high) == pytest.approx((-got.high, -got.low), abs=1e-12)
    assert p_swapped == pytest.approx(p_value)
    same, p_same = cka_difference(after, after, teacher, clusters)
    assert (same.low, same.high, p_same) == (0.0, 0.0, 1.0)


def test_p_value_and_interval_agree_at_five_percent():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(6), 15)
    agree = []
    for _ in range(30):
        teacher = rng.standard_normal((90, 3))
        a, b = (teacher + rng.standard_normal((90, 3)) for _ in "ab")
        got, p_value = cka_difference(a, b, teacher, clusters)
        agree.append((p_value < 0.05) == (got.low > 0 or got.high < 0) or p_value == 2**-5)
    assert all(agree)


def test_moments_are_of_fixed_size():
    small, large = (cka_moments(*related(0, n=n)) for n in (10, 5000))
    assert isinstance(small, CkaMoments)
    assert small.gram.nbytes == large.gram.nbytes == 12 * 12 * 8


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("rows", [40, 200])
def test_few_and_many_rows_take_different_ways_to_the_same_figure(debiased, rows):
    """Below dim_x + dim_y rows the kernels serve, above it the moments: both against the dense formula."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 30)) + 4
    y = x[:, :20] + rng.normal(size=(rows, 20))
    clusters = np.arange(rows) % 5
    found = cka_interval(x, y, clusters, debiased=debiased)
    assert found.value == pytest.approx(
        linear_cka(cka_moments(x, y, center=cka_center(x, y)), debiased=debiased), abs=1e-10
    )
    without = [
        linear_cka(cka_moments(x[keep], y[keep], center=cka_center(x[keep], y[keep])), debiased=debiased)
        for keep in (clusters != g for g in range(5))
    ]
    error = np.sqrt(4 / 5 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.high - found.value == pytest.approx(2.7764451 * error, rel=1e-6)


def test_many_clusters_are_left_out_by_groups_and_agree_with_one_at_a_time(monkeypatch):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 8))
    y = x @ rng.normal(size=(8, 6)) + rng.normal(size=(400, 6))
    clusters = np.arange(400) // 2
    grouped = cka_interval(x, y, clusters, debiased=True, unit="images")
    assert grouped.method == "jackknife over 200 images in 32 groups, t with 30.4 degrees of freedom"
    monkeypatch.setattr(patients, "MAX_GROUPS", 1000)
    monkeypatch.setattr(similarity, "leave_out_groups", lambda clusters: patients.leave_out_groups(clusters, 1000))
    single = cka_interval(x, y, clusters, debiased=True)
    assert grouped.value == single.value
    assert (grouped.high - grouped.low) == pytest.approx(single.high - single.low, rel=0.35)
