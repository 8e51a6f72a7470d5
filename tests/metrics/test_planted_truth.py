"""What is planted is found, and what is not planted is not: every index on drawn cohorts whose truth is known."""

import numpy as np
import pytest

from g2l_core.metrics.fewshot import draw_shots, prototypes, retrieval_sums
from g2l_core.metrics.intervals import Figure, estimate, of_group_sums
from g2l_core.metrics.knn.neighbors import knn_predict, nearest
from g2l_core.metrics.patients import design_of
from g2l_core.metrics.probe import accuracy, auc_figure, confusion, linear_probe
from g2l_core.metrics.robustness import pathorob_index, robustness_counts
from g2l_core.metrics.scales import SHARE
from g2l_core.metrics.similarity import leave_out_each

REPEATS = 200


def share_that_holds(truth, intervals):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def test_cka_of_independent_features_holds_zero():
    """Too surely: under independence HSIC is a degenerate U-statistic, and the jackknife takes it for a regular one."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(15), 4)
    design, intervals = design_of(patients, unit="patients"), []
    for _ in range(REPEATS):
        x, y = rng.standard_normal((60, 8)), rng.standard_normal((60, 6))
        values = leave_out_each(x, y, patients, debiased=True)
        intervals.append(estimate(Figure(values=values, design=design)))
    assert share_that_holds(0.0, intervals) >= 0.94
    values = np.array([interval.value for interval in intervals])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(REPEATS)
    halves = np.array([interval.high - interval.low for interval in intervals]) / 2
    assert 1.0 < np.median(halves) / (1.96 * values.std()) < 2.2


def test_votes_of_other_patients_on_independent_features_hold_chance():
    """Of four equally frequent classes, drawn row by row."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), 3)
    intervals = []
    for _ in range(REPEATS):
        features, labels = rng.standard_normal((120, 6)), rng.integers(4, size=120)
        predicted = knn_predict(nearest(features, None, 5, groups=patients), labels)
        matrices = confusion(labels, predicted, patients)
        intervals.append(estimate(of_group_sums(accuracy, matrices, design_of(patients, unit="patients"), SHARE)))
    assert 0.90 <= share_that_holds(0.25, intervals) <= 0.99


def test_probe_on_independent_features_holds_chance():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(25), 4)
    intervals = []
    for _ in range(REPEATS):
        features, labels = rng.standard_normal((140, 5)), rng.integers(2, size=140)
        held = labels[40:]
        result = linear_probe(features[:40], labels[:40], features[40:], seed=0)
        design = design_of(patients, held, unit="patients")
        intervals.append(estimate(auc_figure(held, result.probabilities, result.classes, patients, design)))
    assert 0.90 <= share_that_holds(0.5, intervals) <= 0.99


def figures(biology, center, seed=0):
    """Every index of one cohort: 4 classes, 3 centers with 6 patients each."""
    rng = np.random.default_rng(seed)
    classes, patients = rng.integers(4, size=540), np.repeat(np.arange(18), 30)
    centers = patients % 3
    features = rng.standard_normal((540, 12)) + biology * rng.standard_normal((4, 12))[classes]
    features += center * rng.standard_normal((3, 12))[centers]
    graph = nearest(features, None, 10, groups=patients)
    test = patients >= 12
    probe = linear_probe(features[~test], classes[~test], features[test], seed=0)
    shots = draw_shots(classes, patients, 5, seed=0)
    return {
        "knn": np.mean(knn_predict(graph, classes) == classes),
        "probe": np.mean(probe.predictions == classes[test]),
        "prototypes": np.mean(prototypes(features[shots], classes[shots]).predict(features) == classes),
        "retrieval": retrieval_sums(graph, classes, [10])[:, 1].mean(),
        "pathorob": pathorob_index(robustness_counts(graph, classes, centers, k=10).sum(axis=0, keepdims=True))[0],
    }


@pytest.mark.parametrize("index", ["knn", "probe", "prototypes", "retrieval", "pathorob"])
def test_more_biology_raises_every_index(index):
    values = [figures(biology, 0.5)[index] for biology in (0.0, 0.4, 0.8, 1.6)]
    assert (np.diff(values) > 0.02).all()


def test_more_center_lowers_robustness():
    values = [figures(0.5, center)["pathorob"] for center in (0.0, 0.5, 1.0, 2.0)]
    assert (np.diff(values) < -0.02).all()
