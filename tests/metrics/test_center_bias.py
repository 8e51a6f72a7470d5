"""Center predictability and the drop under center bias: by hand, against croma, and on planted truth."""

from dataclasses import replace

import numpy as np
import pytest
from croma import apd
from croma.downstream.probe import probe_sweep
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from g2l_core.errors import TaskError
from g2l_core.metrics.center_bias import (
    BiasDesign,
    average_performance_drop,
    biased_probes,
    centers_predicted_by_class,
    predict_centers,
)
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.intervals import estimate, of_group_sums
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.probe import balanced_accuracy, confusion, linear_probe

DESIGN = BiasDesign(centers=(0, 1), slides_per_class=8, rows_per_slide=4, test_slides=3, repeats=4)


def cohort(seed, biology, center, slides=14, rows=6, centers=3):
    """Two classes in each slide, `rows` patches of each; every center has as many slides."""
    rng = np.random.default_rng(seed)
    slide = np.repeat(np.arange(slides * centers), 2 * rows)
    classes, place = np.tile([0, 1], len(slide) // 2), slide % centers
    looks = [rng.standard_normal((count, 10)) for count in (2, centers)]
    features = biology * looks[0][classes] + center * looks[1][place] + rng.standard_normal((len(slide), 10))
    return features.astype(np.float32), classes, place, slide


def center_accuracy(seed, center):
    features, _, places, slides = cohort(seed, 1, center)
    return balanced_accuracy(confusion(places, predict_centers(features, places, slides, seed=0)))[0]


def test_center_accuracy_rises_with_its_strength_from_chance():
    values = np.array([[center_accuracy(seed, strength) for seed in range(3)] for strength in (0, 0.3, 0.6, 1.5)])
    assert (np.diff(values.mean(axis=1)) > 0.05).all()
    assert values[0].mean() == pytest.approx(1 / 3, abs=0.04)
    assert values[-1].mean() > 0.9


def test_no_row_is_predicted_from_its_own_slide():
    """Slides look like nothing but themselves; a probe that saw the slide would know its center."""
    rng = np.random.default_rng(0)
    slides = np.repeat(np.arange(40), 10)
    features = (5 * rng.standard_normal((40, 60)))[slides] + rng.standard_normal((400, 60))
    predicted = predict_centers(features, slides % 2, slides, seed=0)
    assert balanced_accuracy_score(slides % 2, predicted) == pytest.approx(0.5, abs=0.2)
    every_row = predict_centers(features, slides % 2, np.arange(400), seed=0)
    assert balanced_accuracy_score(slides % 2, every_row) == 1


def test_centers_told_by_the_class_by_hand():
    centers = np.array(["A"] * 4 + ["B"] * 8)
    classes = np.array(list("tttn") + list("ttnnnnnn"))
    assert centers_predicted_by_class(centers, classes) == (3 / 4 + 6 / 8) / 2
    assert centers_predicted_by_class(centers, np.array(list("tnnn") + list("ttnnnnnn"))) == 0.5


@given(seed=st.integers(0, 2**32 - 1))
def test_no_rule_from_class_to_center_does_better(seed):
    rng = np.random.default_rng(seed)
    centers, classes = rng.permutation(np.arange(40) % 3), rng.permutation(np.arange(40) % 3)
    rules = np.stack(np.meshgrid(*[range(3)] * 3), axis=-1).reshape(-1, 3)
    best = max(balanced_accuracy_score(centers, rule[classes]) for rule in rules)
    assert centers_predicted_by_class(centers, classes) == pytest.approx(best, abs=1e-12)


def drop(seed, center):
    counts = biased_probes(*cohort(seed, 1, center), DESIGN, seed=0).in_domain
    return average_performance_drop(counts.sum(axis=0, keepdims=True))[0]


def test_drop_deepens_with_the_strength_of_the_center():
    values = np.array([[drop(seed, strength) for seed in range(2)] for strength in (0, 0.5, 1, 2)])
    assert (np.diff(values.mean(axis=1)) < -0.01).all()
    assert abs(values[0].mean()) < 0.03


def test_a_new_center_that_looks_like_a_known_one_is_taken_for_its_class():
    features, classes, centers, slides = cohort(0, 1, 2, centers=2)
    renamed = np.where((centers == 0) & (slides >= 22), 2, centers)
    design = replace(DESIGN, slides_per_class=6, test_slides=2)
    counts = biased_probes(features, classes, renamed, slides, design, seed=0).out_of_domain.sum(axis=0)
    accuracies = balanced_accuracy(counts.reshape(-1, 2, 2)).reshape(5, 4).mean(axis=1)
    assert accuracies[0] > 0.8
    assert accuracies[-1] < accuracies[0] - 0.2
    assert average_performance_drop(counts[None])[0] < -0.05


def test_features_without_meaning_lose_nothing():
    counts = np.stack([biased_probes(*cohort(seed, 0, 0), DESIGN, seed=0).in_domain.sum(axis=0) for seed in range(6)])
    assert balanced_accuracy(counts.reshape(-1, 2, 2)).mean() == pytest.approx(0.5, abs=0.03)
    assert average_performance_drop(counts).mean() == pytest.approx(0, abs=0.1)


@given(seed=st.integers(0, 2**32 - 1))
def test_reduction_equals_croma(seed):
    counts = np.random.default_rng(seed).integers(1, 9, (3, 5, 4, 3, 3))
    drops = average_performance_drop(counts)
    for draw in range(3):
        expected = apd(balanced_accuracy(counts[draw].reshape(-1, 3, 3)).reshape(5, 4))
        assert drops[draw] == pytest.approx(expected, abs=1e-12)


def test_sweep_with_the_same_probe_gives_the_drop_of_croma(monkeypatch):
    """Not the same draws, and croma pairs class 0 with center 0 always; so to within the scatter of both."""

    def fixed(train, labels, _, __, tests, truths):
        fitted = [linear_probe(np.array(train), np.array(labels), np.array(test), seed=0) for test in tests]
        return None, None, [balanced_accuracy_score(t, f.predictions) for f, t in zip(fitted, truths, strict=True)]

    monkeypatch.setattr("croma.downstream.probe.train_logistic_regression", fixed)
    design = replace(DESIGN, test_slides=5, repeats=10)
    for strength in (0, 2):
        drops = []
        for seed in range(3):
            features, classes, centers, slides = cohort(seed, 1, strength, rows=4, centers=2)
            slides = 2 * slides + classes  # in croma a slide has one class
            counts = biased_probes(features, classes, centers, slides, design, seed=0).in_domain
            order = np.lexsort((slides, classes, centers))
            cells = [(i, j, 1 if i == j else -1) for i in range(2) for j in range(2)]
            schedule = [([(i, j, int(16 * (1 + sign * b))) for i, j, sign in cells], 8) for b in design.levels]
            sweep = probe_sweep(
                features[order],
                centers[order],
                classes[order],
                schedule=schedule,
                rows_per_slide=4,
                iterations=10,
                validation_fraction=0.05,
            )
            drops.append([average_performance_drop(counts.sum(axis=0, keepdims=True))[0], apd(sweep)])
        ours, theirs = np.mean(drops, axis=0)
        assert ours == pytest.approx(theirs, abs=0.03)


def test_undefined_repeats_are_left_out():
    counts = np.random.default_rng(0).integers(1, 9, (1, 3, 2, 2, 2))
    alone = average_performance_drop(counts[:, :, :1])
    wrong, absent = counts.copy(), counts.copy()
    wrong[:, 0, 1] = [[0, 3], [3, 0]]
    absent[:, 1, 1] = 0
    np.testing.assert_allclose(average_performance_drop(wrong), alone)
    np.testing.assert_allclose(average_performance_drop(absent), alone)
    assert np.isnan(average_performance_drop(np.zeros((1, 3, 2, 2, 2), np.int64)))[0]


def record(monkeypatch):
    """Keeps the rows that every probe is fitted on, told by their first feature."""
    from g2l_core.metrics import center_bias

    fitted, real = [], center_bias.linear_probe

    def probe(train, labels, test, **settings):
        fitted.append((train[:, 0].astype(int), labels))
        return real(train, labels, test, **settings)

    monkeypatch.setattr(center_bias, "linear_probe", probe)
    return fitted


def test_training_sets_keep_size_and_balance_and_share_no_slide_with_the_test(monkeypatch):
    features, classes, centers, slides = cohort(0, 1, 1)
    features[:, 0] = np.arange(len(features))
    fitted = record(monkeypatch)
    probes = biased_probes(features, classes, centers, slides, DESIGN, seed=1)
    np.testing.assert_allclose(probes.cramers_v, DESIGN.levels, atol=1e-12)
    pairings = set()
    tested = np.split(probes.in_domain.sum(axis=(3, 4)), 4, axis=2)
    for number, (rows, labels) in enumerate(fitted):
        repeat, level = divmod(number, 5)
        assert len(np.unique(rows)) == 64
        np.testing.assert_array_equal(np.bincount(labels), [32, 32])
        np.testing.assert_array_equal(np.unique(slides[rows], return_counts=True)[1] % 4, 0)
        table = confusion(classes[rows], centers[rows])[0] / 32
        expected = (1 - DESIGN.levels[level]) / 2
        np.testing.assert_allclose(np.sort(table, axis=1), [[expected, 1 - expected]] * 2)
        assert not set(slides[rows]) & set(np.flatnonzero(tested[repeat][:, level, 0]))
        assert set(centers[rows]) <= {0, 1}
        if level == 4:
            pairings.add(tuple(centers[rows][np.argsort(labels)][[0, -1]]))
    assert pairings == {(0, 1), (1, 0)}
    assert len({tuple(np.flatnonzero(part[:, 0, 0])) for part in tested}) == 4
    per_slide = probes.in_domain.sum(axis=(0, 4))
    np.testing.assert_array_equal(per_slide, 2 * 3 * 4)  # 2 centers, 3 slides, 4 rows of either class
    assert (probes.out_of_domain.sum(axis=(0, 3, 4)) == (centers == 2).sum()).all()


def test_same_seed_same_counts_and_an_interval_over_slides():
    data = cohort(0, 1, 1)
    first, again, other = (biased_probes(*data, replace(DESIGN, repeats=2), seed=s).in_domain for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    got = estimate(of_group_sums(average_performance_drop, first, design_of(data[3], unit="slides")))
    assert got.low < got.value < got.high
    assert got.value == average_performance_drop(first.sum(axis=0, keepdims=True))[0]


def test_designs_that_cannot_be_met_are_refused():
    data = cohort(0, 1, 1)
    cases = [
        ({"centers": (0, 1, 2)}, "name 2 to 2 different centers"),
        ({"centers": (0, 0)}, "different centers"),
        ({"slides_per_class": 7}, "multiple of the 2 centers; got 7"),
        ({"levels": (0.1, 1.0)}, "ascend from 0"),
        ({"levels": (0.0, 1.1)}, "ascend from 0 to at most 1"),
        ({"repeats": 0}, "at least 1"),
        ({"slides_per_class": 12}, "14 slides with 4 rows, of which 11 are left"),
        ({"rows_per_slide": 7}, "class 0 in center 0 has 0 slides with 7 rows"),
        ({"centers": (0, 9)}, "class 0 in center 9 has 0 slides"),
    ]
    for change, message in cases:
        with pytest.raises(TaskError, match=message):
            biased_probes(*data, replace(DESIGN, **change), seed=0)
    with pytest.raises(TaskError, match="has 14 groups, fewer than the 15 folds"):
        predict_centers(data[0], data[2], data[3], folds=15, seed=0)
    with pytest.raises(TaskError, match="two classes and two folds"):
        stratified_group_folds(np.zeros(9), np.arange(9), 3, seed=0)
    with pytest.raises(TaskError, match="missing from the fitting side of one of 2 folds"):
        stratified_group_folds(np.array([0, 0, 1, 1]), np.array([1, 2, 1, 4]), 2, seed=0)
