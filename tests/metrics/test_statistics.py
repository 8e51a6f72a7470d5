"""The bootstrap against real copies of rows, and its coverage on planted truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.probe import accuracy, balanced_accuracy, confusion, macro_auc
from g2l_core.metrics.statistics import (
    cluster_bootstrap,
    cluster_codes,
    cluster_sums,
    holm,
    of_sums,
    of_weights,
    paired_bootstrap,
    require_aligned,
)


def predictions(seed=0, n=90, clusters=7):
    rng = np.random.default_rng(seed)
    truth = rng.integers(2, size=n)
    predicted = np.where(rng.random(n) < 0.7, truth, 1 - truth)
    patients = np.array([f"p{i}" for i in rng.integers(clusters, size=n)])
    return truth, predicted, patients, rng.random(n)


def multiplicities(seed, count, draws):
    """How often each cluster was drawn, as the bootstrap sees it."""
    seen = []

    def spy(drawn):
        seen.append(drawn)
        return np.zeros(len(drawn))

    cluster_bootstrap(spy, np.arange(count), draws=draws, seed=seed)
    return np.concatenate(seen[1:])


def naive(score, patients, drawn):
    """Really copies the rows of each drawn patient."""
    rows = [np.flatnonzero(patients == name) for name in np.unique(patients)]
    return np.array([score(np.concatenate([np.tile(r, w) for r, w in zip(rows, draw, strict=True)])) for draw in drawn])


def test_every_draw_takes_as_many_clusters_as_there_are():
    drawn = multiplicities(3, 12, 500)
    assert drawn.shape == (500, 12)
    assert (drawn.sum(axis=1) == 12).all()
    # each count is binomial(12, 1/12): mean 1, variance 11/12
    assert drawn.mean(axis=0) == pytest.approx(np.ones(12), abs=0.2)
    assert drawn.var() == pytest.approx(11 / 12, rel=0.1)


def test_sums_and_weights_equal_naive_resampling():
    truth, predicted, patients, scores = predictions()
    drawn = multiplicities(0, 7, 60)
    by_sums = of_sums(balanced_accuracy, confusion(truth, predicted, patients))(drawn)
    expected = naive(lambda rows: balanced_accuracy_score(truth[rows], predicted[rows]), patients, drawn)
    np.testing.assert_allclose(by_sums, expected, atol=1e-14)

    probabilities = np.stack([1 - scores, scores], axis=1)
    by_weights = of_weights(lambda w: macro_auc(truth, probabilities, np.arange(2), w), patients)(drawn)
    expected = naive(lambda rows: roc_auc_score(truth[rows], scores[rows]), patients, drawn)
    np.testing.assert_allclose(by_weights, expected, atol=1e-14)


def test_interval_is_the_percentiles_of_the_draws():
    truth, predicted, patients, _ = predictions()
    got = cluster_bootstrap(
        of_sums(accuracy, confusion(truth, predicted, patients)), patients, unit="patients", draws=400, seed=5
    )
    drawn = naive(lambda rows: np.mean(truth[rows] == predicted[rows]), patients, multiplicities(5, 7, 400))
    assert got.value == pytest.approx(np.mean(truth == predicted), abs=1e-15)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-14)
    assert got.method == "bootstrap over 7 patients, 400 draws"


def test_same_seed_same_interval_whatever_the_block(monkeypatch):
    truth, predicted, patients, _ = predictions()
    statistic = of_sums(accuracy, confusion(truth, predicted, patients))
    first, again, other = (cluster_bootstrap(statistic, patients, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    monkeypatch.setattr("g2l_core.metrics.statistics._BLOCK", 70)
    assert cluster_bootstrap(statistic, patients, seed=1) == first


def test_undefined_draws_are_left_out_and_counted():
    sums = np.array([[1, 1], [0, 0], [2, 3]])

    def share(totals):
        return np.divide(totals[:, 0], totals[:, 1], out=np.full(len(totals), np.nan), where=totals[:, 1] > 0)

    got = cluster_bootstrap(of_sums(share, sums), np.arange(3), draws=2000, seed=0)
    lost = int((multiplicities(0, 3, 2000)[:, 1] == 3).sum())
    assert lost > 0
    assert f"({lost} undefined ones left out)" in got.method
    assert (got.low, got.high) == pytest.approx((2 / 3, 1.0))
    with pytest.raises(TaskError, match="undefined"):
        cluster_bootstrap(of_sums(share, 0 * sums), np.arange(3), seed=0)


def test_one_cluster_has_no_interval():
    truth, predicted, _, _ = predictions()
    one = np.full(90, "p1")
    statistic = of_sums(accuracy, confusion(truth, predicted, one))
    got = cluster_bootstrap(statistic, one, unit="patients", seed=0)
    assert got.value == np.mean(truth == predicted)
    assert np.isnan([got.low, got.high]).all()
    assert got.method == "none: all rows are of one cluster (patients)"
    difference, p_value = paired_bootstrap(statistic, statistic, one, seed=0)
    assert np.isnan([difference.low, p_value]).all()


def test_interval_of_knn_accuracy_holds_chance_on_independent_features():
    """Rows of a patient share label and features: resampling rows would be far too sure."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 6)
    hits = {"patients": 0, "rows": 0}
    for repeat in range(200):
        train, labels = rng.standard_normal((80, 4)), rng.integers(2, size=80)
        truth = rng.integers(2, size=40)[patients]
        test = rng.standard_normal((40, 4))[patients] + 0.1 * rng.standard_normal((240, 4))
        predicted = knn_predict(nearest(train, test, 5), labels)
        for unit, clusters in {"patients": patients, "rows": np.arange(240)}.items():
            matrices = confusion(truth, predicted, clusters)
            got = cluster_bootstrap(of_sums(accuracy, matrices), clusters, draws=300, seed=repeat)
            hits[unit] += got.low <= 0.5 <= got.high
    assert 0.90 <= hits["patients"] / 200 <= 0.985
    assert hits["rows"] / 200 < 0.75


def test_paired_difference_is_taken_on_the_same_draws():
    truth, predicted, patients, _ = predictions(n=400, clusters=30)
    better = np.where(np.random.default_rng(1).random(400) < 0.5, truth, predicted)
    mine, theirs = (of_sums(accuracy, confusion(truth, p, patients)) for p in (better, predicted))
    got, p_value = paired_bootstrap(mine, theirs, patients, draws=500, seed=2)
    drawn = multiplicities(2, 30, 500)
    expected = mine(drawn) - theirs(drawn)
    assert got.value == pytest.approx(np.mean(better == truth) - np.mean(predicted == truth), abs=1e-15)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=1e-15)
    assert got.low > 0
    assert p_value == pytest.approx(2 / 501)
    back, p_back = paired_bootstrap(theirs, mine, patients, draws=500, seed=2)
    assert (back.low, back.high, p_back) == pytest.approx((-got.high, -got.low, p_value))
    same, p_same = paired_bootstrap(mine, mine, patients, seed=2)
    assert (same.low, same.high, p_same) == (0.0, 0.0, 1.0)


def test_p_values_of_equal_encoders_are_uniform_enough():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 4)
    p_values = []
    for repeat in range(150):
        truth = rng.integers(2, size=120)
        both = [np.where(rng.random(120) < 0.7, truth, 1 - truth) for _ in "ab"]
        statistics = [of_sums(accuracy, confusion(truth, p, patients)) for p in both]
        p_values.append(paired_bootstrap(*statistics, patients, draws=200, seed=repeat)[1])
    assert 0.0 < np.mean(np.array(p_values) < 0.05) < 0.12
    assert 0.3 < np.mean(np.array(p_values) < 0.5) < 0.7


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
