"""Leaving patients out against recomputation, exchanging encoders against all ways by hand, and coverage."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from g2l_core.benchmark.metric_groups.values import ratio
from g2l_core.errors import TaskError
from g2l_core.metrics.calibration import brier_score, brier_sums, expected_brier_variance
from g2l_core.metrics.intervals import Figure, Source, averaged, compare, estimate, of_group_sums, of_neighbors, of_sums
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.patients import design_of, effective_freedom, leave_out_groups
from g2l_core.metrics.probe import balanced_accuracy, confusion, unanimous_variance
from g2l_core.metrics.scales import CORRELATION, LINE, POSITIVE, SHARE, SQUARED_ERROR
from tests.benchmarks import bench_coverage


def predictions(seed=0, n=90, clusters=7):
    rng = np.random.default_rng(seed)
    truth = rng.integers(2, size=n)
    predicted = np.where(rng.random(n) < 0.7, truth, 1 - truth)
    return truth, predicted, np.array([f"p{i}" for i in rng.permutation(n) % clusters])


def share_of(right, patients, scale=SHARE):
    rows = np.stack([right, np.ones(len(right))], axis=1)
    return of_sums(ratio, rows, patients, design_of(patients, unit="patients"), scale)


def test_values_without_each_patient_are_those_of_the_other_rows():
    truth, predicted, patients = predictions()
    figure = of_group_sums(
        balanced_accuracy, confusion(truth, predicted, patients), design_of(patients, truth, unit="patients"), SHARE
    )
    kept = [np.ones(90, bool), *(patients != name for name in np.unique(patients))]
    expected = [balanced_accuracy_score(truth[rows], predicted[rows]) for rows in kept]
    np.testing.assert_allclose(figure.values, expected, atol=1e-14)


def test_the_mean_of_equal_patients_has_student_s_interval():
    rng = np.random.default_rng(0)
    values, patients = rng.standard_normal(12), np.arange(12)
    got = estimate(share_of(values, patients, LINE))
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (got.low, got.high) == pytest.approx(expected, abs=1e-12)
    assert got.method == "jackknife over 12 patients, t with 11.0 degrees of freedom"
    assert got.clusters == 12


def test_two_classes_of_whole_patients_have_welch_s_degrees_of_freedom():
    design = design_of(np.arange(9), np.array([0] * 3 + [1] * 6), unit="patients")
    factor, freedom = effective_freedom(design)
    # equal variances: (1/3 + 1/6)^2 / ((1/3)^2 / 2 + (1/6)^2 / 5), as Welch has it, with shares' moves a / (1 - a)
    moves = np.array([1 / (3 - 1) ** 2 * (1 - 1 / 3)] * 3 + [1 / (6 - 1) ** 2 * (1 - 1 / 6)] * 6)
    assert factor == pytest.approx((1 / 3 + 1 / 6) / (moves.sum() * 8 / 9))
    assert freedom == pytest.approx((1 / 2 + 1 / 5) ** 2 / (1 / 2**3 + 1 / 5**3))


def test_the_corrected_variance_is_unbiased_for_unequal_patients():
    """Patients' means of one variance, weighted by very unequal sizes."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 2, 4, 8, 16, 32])
    patients = np.repeat(np.arange(6), sizes)
    design = design_of(patients, unit="patients")
    factor, _ = effective_freedom(design)
    shares = sizes / sizes.sum()
    found = []
    for _ in range(4000):
        without = share_of(rng.standard_normal(6)[patients], patients, LINE).values[1:]
        found.append(factor * 5 / 6 * ((without - without.mean()) ** 2).sum())
    # m = mean of the values without each is not the mean itself: a bias of some percent is left
    assert np.mean(found) == pytest.approx((shares**2).sum(), rel=0.15)


@given(
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=20),
    scale=st.sampled_from([SHARE, POSITIVE, CORRELATION, SQUARED_ERROR]),
)
def test_intervals_hold_the_value_and_keep_the_scale_s_bounds(shares, scale):
    figure = share_of(np.array(shares), np.arange(len(shares)), scale)
    got = estimate(figure)
    if scale.ends[0] < got.value < scale.ends[1]:
        assert scale.ends[0] <= got.low <= got.value + 1e-12
        assert got.value - 1e-12 <= got.high <= scale.ends[1]
    wider = estimate(figure, level=0.99)
    assert wider.low <= got.low + 1e-12
    assert got.high <= wider.high + 1e-12


@given(right=st.integers(1, 29), count=st.integers(30, 60))
def test_one_row_a_patient_has_the_score_interval(right, count):
    """Wilson's, but for the jackknife's n - 1 in place of n, and t of twice as many degrees of freedom."""
    got = estimate(share_of(np.arange(count) < right, np.arange(count)))
    t = stats.t.ppf(0.975, 2 * (count - 1)) * np.sqrt(count / (count - 1))
    roots = np.roots([1 + t**2 / count, -(2 * right + t**2) / count, (right / count) ** 2])
    assert (got.low, got.high) == pytest.approx(tuple(sorted(roots)), abs=1e-9)
    assert got.method.endswith(f"t with {2 * (count - 1):.1f} degrees of freedom")


def test_probabilities_say_what_few_patients_do_not_show():
    """Ten slides, all of them right with probability 0.9: one in ten is expected to be wrong by 1.62."""
    chances, truth = np.tile([0.9, 0.1], (10, 1)), np.zeros(10, int)
    classes, patients = np.array([0, 1]), np.arange(10)
    figure = of_group_sums(
        brier_score, brier_sums(truth, chances, classes, patients), design_of(patients, unit="slides"), SQUARED_ERROR
    )
    expected = expected_brier_variance(chances)
    errors = np.array([0.02, 1.62])
    assert expected == pytest.approx((0.9 * 0.02**2 + 0.1 * 1.62**2 - (np.array([0.9, 0.1]) @ errors) ** 2) / 10)
    blind, found = estimate(figure), estimate(replace(figure, expected_variance=expected))
    assert blind.high - blind.low < 1e-9
    assert found.low < found.value < 0.18 < found.high < 2
    varied = replace(figure, values=0.3 + np.linspace(-0.2, 0.2, 11))  # more than is expected
    assert estimate(replace(varied, expected_variance=expected)) == estimate(varied)


def test_expected_variance_of_the_brier_score_is_that_of_labels_drawn_as_the_probabilities_say():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([1, 2, 0.5], 40)
    labels = (rng.random((4000, 40, 1)) > chances.cumsum(axis=1)).sum(axis=2).ravel()
    draw = np.repeat(np.arange(4000), 40)
    drawn = brier_score(brier_sums(labels, np.tile(chances, (4000, 1)), np.arange(3), draw))
    assert np.var(drawn) == pytest.approx(expected_brier_variance(chances), rel=0.1)


def test_a_correlation_is_carried_by_patients_whose_labels_are_far_from_the_mean():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(12), 10)
    label = np.where(patients < 2, 5.0 * (-1) ** patients, 0) + rng.normal(0, 0.1, 120)
    design = design_of(patients, unit="patients", weights=(label - label.mean()) ** 2)
    assert effective_freedom(design)[1] < 2 < effective_freedom(design_of(patients, unit="patients"))[1]


@pytest.mark.parametrize(("value", "bounds"), [(1.0, (0.025 ** (1 / 8), 1.0)), (0.0, (0.0, 1 - 0.025 ** (1 / 8)))])
def test_a_share_of_all_or_none_is_as_uncertain_as_so_many_patients(value, bounds):
    got = estimate(share_of(np.full(16, value), np.arange(16) % 8))
    assert (got.low, got.high) == pytest.approx(bounds)


def test_a_brier_score_of_zero_is_not_certain():
    got = estimate(share_of(np.zeros(16), np.arange(16) % 8, SQUARED_ERROR))
    assert (got.low, got.high) == pytest.approx((0.0, 2 - 2 * 0.025 ** (1 / 8)))


@pytest.mark.parametrize("patients", [1, 2, 3])
def test_fewer_than_four_patients_have_no_interval_and_no_p(patients):
    figure = share_of(np.arange(12.0) % 2, np.arange(12) % patients)
    got = estimate(figure)
    assert np.isnan([got.low, got.high]).all()
    assert got.method == f"none: {patients} patients, and an interval needs 4"
    found = compare(figure, figure, seed=0, margin=0.1)
    assert np.isnan([found.p_value, found.p_equivalent, found.estimate.low]).all()


def test_a_class_of_one_patient_has_no_interval():
    truth, patients = np.array([0, 0, 0, 0, 1, 1]), np.array([1, 2, 3, 4, 5, 5])
    figure = of_group_sums(
        balanced_accuracy, confusion(truth, truth, patients), design_of(patients, truth, unit="patients"), SHARE
    )
    assert estimate(figure).method == "none: all rows of class 1 are of one of the patients"
    assert np.isnan(compare(figure, figure, seed=0, margin=0.1).p_value)


def test_undefined_values_are_refused_or_said():
    design = design_of(np.arange(5), unit="slides")
    values = np.array([0.5, 0.4, np.nan, 0.5, 0.6, 0.5])
    assert estimate(Figure(values=values, design=design)).method == "none: undefined without one of the slides"
    with pytest.raises(TaskError, match="undefined"):
        estimate(Figure(values=np.full(6, np.nan), design=design))


def test_a_figure_without_interval_is_still_compared_by_exchange():
    truth, predicted, patients = predictions(n=400, clusters=9)
    one = replace(share_of((truth == predicted).astype(float), patients), no_interval="it has none")
    other = replace(share_of(np.ones(400), patients), no_interval="it has none")
    assert estimate(one).method == "none: it has none"
    found = compare(other, one, seed=0, margin=0.1)
    assert found.p_value == pytest.approx(2 / 2**9)
    assert np.isnan([found.estimate.low, found.p_equivalent]).all()


def test_p_is_the_share_of_all_exchanges_by_hand():
    rng = np.random.default_rng(3)
    patients, right = np.arange(30) % 6, rng.random((2, 30)) < [[0.9], [0.6]]
    figures = [share_of(row.astype(float), patients) for row in right]
    observed = abs(right[0].mean() - right[1].mean())
    differences = []
    for flips in product([False, True], repeat=6):
        swapped = np.array(flips)[patients]
        one, other = np.where(swapped, right[::-1], right)
        differences.append(abs(one.mean() - other.mean()))
    expected = np.mean(np.array(differences) >= observed - 1e-12)
    assert compare(*figures, seed=0, margin=0.1).p_value == pytest.approx(expected)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), clusters=st.integers(4, 30))
def test_p_is_never_below_what_so_many_patients_can_give(seed, clusters):
    rng = np.random.default_rng(seed)
    patients = np.arange(60) % clusters
    one, other = (share_of((rng.random(60) < chance).astype(float), patients) for chance in (0.98, 0.1))
    for exchange in (one.exchange, None):
        found = compare(replace(one, exchange=exchange), other, draws=200, seed=0, margin=0.1)
        assert 2.0 ** (1 - clusters) <= found.p_value <= 1


def test_comparing_the_other_way_round_turns_the_sign():
    truth, predicted, patients = predictions(n=300, clusters=20)
    right = (truth == predicted).astype(float)
    one, other = share_of(right, patients), share_of(np.ones(300), patients)
    there, back = (compare(*pair, seed=1, margin=0.1) for pair in ((one, other), (other, one)))
    assert (back.estimate.low, back.estimate.high) == pytest.approx((-there.estimate.high, -there.estimate.low))
    assert back.p_value == there.p_value
    same = compare(one, one, seed=1, margin=0.1)
    # That 20 patients of 20 agree bounds how many would not, by the binomial distribution.
    assert (same.estimate.low, same.estimate.high) == pytest.approx((0.025 ** (1 / 20) - 1, 1 - 0.025 ** (1 / 20)))
    assert (same.p_value, same.p_equivalent) == pytest.approx((1.0, 0.9**20))


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    one, other = rng.random(40), rng.random(40)
    found = compare(*(share_of(row, np.arange(40), LINE) for row in (one, other)), seed=0, margin=0.3)
    difference = one - other
    error = stats.sem(difference)
    lower = stats.t.sf((difference.mean() + 0.3) / error, 39)
    upper = stats.t.cdf((difference.mean() - 0.3) / error, 39)
    assert found.p_equivalent == pytest.approx(max(lower, upper), rel=1e-9)


def test_seeds_widen_the_interval_of_their_mean():
    patients = np.arange(10)
    rng = np.random.default_rng(1)
    tissue = rng.random(10)
    seeds = [share_of(np.clip(tissue + shift, 0, 1), patients, LINE) for shift in (-0.1, 0.0, 0.1)]
    mean = averaged(seeds, "seeds")
    single, both = estimate(replace(mean, more=())), estimate(mean)
    assert both.value == pytest.approx(np.mean([figure.values[0] for figure in seeds]))
    values = [figure.values[0] for figure in seeds]
    first, second = np.var(values, ddof=1) / 3, (single.high - single.low) ** 2 / 4 / stats.t.ppf(0.975, 9) ** 2
    freedom = (first + second) ** 2 / (first**2 / 2 + second**2 / 9)
    assert both.high - both.value == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(first + second), rel=1e-9)
    assert "over 10 patients and 3 seeds," in both.method
    other = replace(mean, values=mean.values + 0.01)
    assert "over 10 patients and 3 seeds of each," in compare(mean, other, seed=0, margin=0.1).estimate.method
    with pytest.raises(TaskError, match="two at least"):
        averaged(seeds[:1], "seeds")


@pytest.mark.parametrize("listed", [1, 500_000])
@pytest.mark.parametrize("grouped", [False, True])
def test_neighbors_without_a_patient_are_those_of_the_other_rows(monkeypatch, listed, grouped):
    """Also where the list of neighbors is too short, so that some queries are searched for again."""
    monkeypatch.setattr("g2l_core.metrics.knn.leave_out._LISTED", listed)
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(5), [3, 20, 12, 30, 8])
    features = rng.standard_normal((5, 6))[patients] + 0.2 * rng.standard_normal((73, 6))
    labels, slides = rng.integers(3, size=73), np.arange(73) // 2
    groups = slides if grouped else None
    search = Search(reference=features, k=7, groups=groups, left_out_with=patients)

    def contributions(queries, graph):
        return np.stack([knn_predict(graph, labels) == labels[queries], graph.distances.sum(axis=1)], axis=1)

    totals = leave_out_sums([search], contributions, patients, 5).totals
    for number, kept in enumerate([np.ones(73, bool), *(patients != patient for patient in range(5))]):
        graph = nearest(features[kept], None, 7, groups=slides[kept] if grouped else None)
        right = knn_predict(graph, labels[kept]) == labels[kept]
        np.testing.assert_allclose(totals[number], [right.sum(), graph.distances.sum()], atol=1e-9)

    for number, (first, second) in enumerate(combinations(range(5), 2)):
        apart = np.zeros(2)
        for patient in range(5):
            other = {first: second, second: first}.get(patient)
            kept = patients != other if other is not None else np.ones(73, bool)
            graph = nearest(features[kept], None, 7, groups=slides[kept] if grouped else None)
            own = patients[kept] == patient
            right = knn_predict(graph, labels[kept]) == labels[kept]
            apart += [right[own].sum(), graph.distances[own].sum()]
        np.testing.assert_allclose(totals[6 + number], apart, atol=1e-9)


def test_what_two_patients_give_each_other_is_not_counted_twice():
    """The mean of products x y over pairs of patients: all its variance is of pairs, and the jackknife's is twice that.

    Half of the surplus is subtracted, so that sqrt(3 / 4) of the standard error is left (Hoeffding 1948: a U-statistic
    whose kernel has no first-order part).
    """
    rng, count, widths, held = np.random.default_rng(0), 12, [], []
    first, second = np.triu_indices(count, 1)
    for _ in range(300):
        products = np.outer(*2 * [rng.standard_normal(count)])[first, second]
        whole, size = products.sum(), len(products)
        without = [products[(first != i) & (second != i)].mean() for i in range(count)]
        values = np.array([whole / size, *without, *((whole - products) / size)])
        figure = of_neighbors(values, design_of(np.arange(count), unit="patients"), LINE)
        found, plain = estimate(figure), estimate(replace(figure, pairs=None))
        widths.append([found.high - found.low, plain.high - plain.low])
        held.append(found.low <= 0 <= found.high)
    ours, jackknife = (np.array(widths) ** 2).mean(axis=0)
    assert 0.7 < ours / jackknife < 0.85  # above 3 / 4, as no more than half is ever subtracted
    assert np.mean(held) >= 0.93


def test_a_value_that_two_patients_leave_undefined_narrows_nothing():
    values, pairs = np.array([0.5, 0.4, 0.5, 0.6, 0.5]), np.full(6, 0.5)
    figure = Figure(values=values, pairs=pairs, design=design_of(np.arange(8) % 4, unit="patients"), scale=SHARE)
    pairs_undefined = replace(figure, pairs=np.full(6, np.nan))
    assert estimate(pairs_undefined) == estimate(figure) == estimate(replace(figure, pairs=None))


def test_a_class_whose_patients_agree_is_not_certain():
    """Two patients of the positive class, both right: nothing moves without one of them."""
    matrices = np.array([[[8, 2], [0, 0]]] * 8 + [[[0, 0], [0, 5]]] * 2)
    by_class = design_of(np.arange(10), np.array([0] * 8 + [1] * 2), unit="patients")
    figure = of_group_sums(balanced_accuracy, matrices, by_class, SHARE)
    blind, found = (estimate(replace(figure, least_variance=v)) for v in (0.0, unanimous_variance(matrices)))
    assert blind.high - blind.low < 0.01
    assert found.low < 0.5  # two patients cannot rule out that half of their class is wrong
    assert found.high > 0.97


def test_balanced_accuracy_near_one_keeps_a_width_that_says_something():
    """Twelve patients of twenty patches a class; a patient errs in one of a hundred, or in hardly any."""
    held, widths, rng = 0, list[float](), np.random.default_rng(0)
    for _ in range(200):
        wrong = rng.binomial(20, rng.beta(0.2, 19.8, (12, 2)))
        sums = np.stack([np.stack([20 - wrong[:, 0], wrong[:, 0]], 1), np.stack([wrong[:, 1], 20 - wrong[:, 1]], 1)], 1)
        figure = of_group_sums(balanced_accuracy, sums, design_of(np.arange(12), unit="patients"), SHARE)
        found = estimate(replace(figure, least_variance=unanimous_variance(sums)))
        held += found.low <= 0.99 <= found.high
        widths.append(found.high - found.low)
    assert held >= 185
    assert max(widths) < 0.55  # on the logit alone, one in ten would span from 0 to 1


def test_seeds_of_which_one_fails_do_not_make_a_share_near_one_unknown():
    design = design_of(np.arange(10), unit="patients")
    whole = np.array([1.0, 1.0, 0.985])
    figures = [Figure(values=np.array([v, *([v] * 9), min(1.0, v + 0.015)]), design=design, scale=SHARE) for v in whole]
    found = estimate(averaged(figures, "seeds"))
    assert 0.96 < found.low < 0.985 < found.value < found.high <= 1


def test_the_bound_of_a_perfect_share_is_that_of_the_smallest_class():
    matrices = np.array([[[8, 0], [0, 0]]] * 8 + [[[0, 0], [0, 5]]] * 2)
    by_class = design_of(np.arange(10), np.array([0] * 8 + [1] * 2), unit="patients")
    found = estimate(of_group_sums(balanced_accuracy, matrices, by_class, SHARE))
    assert (found.low, found.high) == pytest.approx((0.025**0.5, 1.0))


def test_the_mean_over_seeds_has_the_training_halves_of_all_of_them():
    rng, design = np.random.default_rng(0), design_of(np.arange(5), unit="patients")
    halves = [Source(what="10 halves", values=rng.random(10), share=1.0, paired=True) for _ in range(3)]
    figures = [Figure(values=rng.random(6), design=design, more=(half,)) for half in halves]
    of_halves, of_seeds = averaged(figures, "seeds").more
    np.testing.assert_allclose(of_halves.values, np.mean([half.values for half in halves], axis=0))
    assert of_seeds.what == "3 seeds"


def test_too_few_rows_without_a_patient_are_no_number():
    patients = np.array([0] * 8 + [1, 2])
    features = np.random.default_rng(0).standard_normal((10, 3))
    search = Search(reference=features, k=4, left_out_with=patients)
    totals = leave_out_sums([search], lambda rows, graph: graph.distances[:, :1], patients, 3).totals
    assert np.isnan(totals[1]).all()
    assert np.isfinite(totals[[0, 2, 3]]).all()


def test_many_patients_are_left_out_in_groups():
    codes, count = leave_out_groups(np.repeat(np.arange(100), 3), 8)
    assert count == 8
    assert all(len(np.unique(codes[3 * patient : 3 * patient + 3])) == 1 for patient in range(100))
    assert np.ptp(np.bincount(codes)) <= 6


def test_coverage_and_false_positives_on_planted_cohorts():
    """The bench in small; its table in docs/intervals.md has other cohorts and 500 repeats."""
    setting, repeats = ("plain", 0.5, 10), 60
    rows = bench_coverage.rows_of(
        setting, bench_coverage.simulate(setting, repeats, 50), bench_coverage.truths("plain", 0.5, sets=1)
    )
    rows = list(rows)
    ours = [row for row in rows if row["method"] == "jackknife"]
    assert len(ours) == len({row["figure"] for row in rows}) >= 20
    assert np.mean([row["coverage"] for row in ours]) >= 0.93
    assert min(row["coverage"] for row in ours) >= 0.82  # three standard errors of 60 repeats below 0.95
    assert np.mean([row["false_positives"] for row in ours]) <= 0.06
    drawn = {row["figure"]: row["coverage"] for row in rows if row["method"] == "percentiles"}
    assert np.mean(list(drawn.values())) < np.mean([row["coverage"] for row in ours if row["figure"] in drawn])


def test_paired_sources_cancel_and_others_add_up():
    patients = np.arange(8)
    figure = share_of(np.random.default_rng(0).random(8), patients, LINE)
    values = np.array([0.1, 0.5, 0.3])
    training = Source(what="3 halves", values=values, share=1.0, paired=True)
    seeds = Source(what="3 seeds", values=values, share=1 / 3, paired=False)
    same = compare(replace(figure, more=(training,)), replace(figure, more=(training,)), seed=0, margin=0.1)
    assert (same.estimate.low, same.estimate.high) == (0.0, 0.0)
    apart = compare(replace(figure, more=(seeds,)), replace(figure, more=(seeds,)), seed=0, margin=0.1)
    error = np.sqrt(2 * values.var(ddof=1) / 3)
    assert apart.estimate.high == pytest.approx(stats.t.ppf(0.975, 4) * error)
