"""Shots, prototypes and retrieval against scikit-learn, plain loops and planted truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestCentroid

from g2l_core.errors import TaskError
from g2l_core.metrics.fewshot import draw_shots, prototypes, retrieval_sums
from g2l_core.metrics.knn.neighbors import Neighbors, nearest

SEEDS = st.integers(0, 2**32 - 1)


def cohort(seed, strength=1.0, n=300, dim=10):
    rng = np.random.default_rng(seed)
    classes, patients = rng.integers(3, size=n), rng.integers(20, size=n)
    features = strength * rng.standard_normal((3, dim))[classes] + rng.standard_normal((n, dim)) + 4
    return features, np.array(["fat", "stroma", "tumor"])[classes], patients


@given(seed=SEEDS, shots=st.integers(1, 40))
def test_shots_are_of_their_class_and_spread_over_patients(seed, shots):
    _, labels, patients = cohort(seed)
    rows = draw_shots(labels, patients, shots, seed=seed)
    assert len(np.unique(rows)) == len(rows) == 3 * shots
    np.testing.assert_array_equal(labels[rows], np.repeat(["fat", "stroma", "tumor"], shots))
    for name in np.unique(labels):
        of_class = patients[rows[labels[rows] == name]]
        available = np.bincount(patients[labels == name], minlength=20)
        taken = np.bincount(of_class, minlength=20)
        assert (taken[taken < available] >= taken.max() - 1).all()


def test_shots_follow_the_seed_and_reach_every_row():
    _, labels, patients = cohort(0)
    first, again, other = (draw_shots(labels, patients, 5, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    reached = {row for seed in range(400) for row in draw_shots(labels, patients, 5, seed=seed).tolist()}
    assert len(reached) == len(labels)


@given(seed=SEEDS)
def test_prototypes_equal_scikit_learns_centroids(seed):
    features, labels, patients = cohort(seed)
    rows = draw_shots(labels, patients, 4, seed=seed)
    center = features.mean(axis=0)
    unit = (features - center) / np.linalg.norm(features - center, axis=1, keepdims=True)
    expected = NearestCentroid().fit(unit[rows], labels[rows]).predict(unit)
    np.testing.assert_array_equal(prototypes(features[rows], labels[rows], center).predict(features), expected)


def test_similarities_are_minus_squared_distances():
    features, labels, _ = cohort(1)
    found = prototypes(features, labels)
    unit = (features - found.center) / np.linalg.norm(features - found.center, axis=1, keepdims=True)
    exact = -((unit[:, None] - found.means) ** 2).sum(axis=-1)
    np.testing.assert_allclose(found.similarities(features), exact, atol=1e-12)


def test_more_class_and_more_shots_classify_better():
    def accuracy(strength, shots):
        features, labels, patients = cohort(2, strength)
        drawn = [draw_shots(labels, patients, shots, seed=seed) for seed in range(30)]
        return np.mean([np.mean(prototypes(features[r], labels[r]).predict(features) == labels) for r in drawn])

    assert abs(accuracy(0.0, 1) - 1 / 3) < 0.05
    assert accuracy(0.5, 5) > accuracy(0.25, 5) + 0.05
    assert accuracy(0.5, 20) > accuracy(0.5, 1) + 0.05


@settings(max_examples=10)
@given(seed=SEEDS)
def test_retrieval_equals_plain_loops(seed):
    features, labels, patients = cohort(seed, n=80)
    graph = nearest(features, None, 10, groups=patients)
    got = retrieval_sums(graph, labels, [1, 3, 10])
    for row in range(80):
        right = labels[graph.indices[row]] == labels[row]
        for column, k in enumerate((1, 3, 10)):
            assert got[row, column] == right[:k].any()
            expected = average_precision_score(right[:k], -np.arange(k)) if right[:k].any() else 0.0
            assert got[row, 3 + column] == pytest.approx(expected, abs=1e-12)


def test_retrieval_by_hand():
    graph = Neighbors(metric="cosine", indices=np.array([[1, 2, 3]] * 4), distances=np.zeros((4, 3)))
    labels = np.array(["t", "n", "t", "t"])
    np.testing.assert_allclose(retrieval_sums(graph, labels, [1, 3])[0], [0.0, 1.0, 0.0, (1 / 2 + 2 / 3) / 2])


def test_what_cannot_be_done():
    features, labels, patients = cohort(0)
    graph = nearest(features, None, 5)
    for call, said in (
        (lambda: draw_shots(labels, patients, 0, seed=0), "at least 1"),
        (lambda: draw_shots(labels, patients, 200, seed=0), "fewer than the 200 shots"),
        (lambda: prototypes(features[:1], labels[:1]), "two classes at least"),
        (lambda: prototypes(features, labels, np.zeros(3)), "dim 10, center 3"),
        (lambda: retrieval_sums(graph, labels, [6]), "between 1 and the 5"),
        (lambda: retrieval_sums(graph, labels[1:], [5]), "queries 300, labels 299"),
    ):
        with pytest.raises(TaskError, match=said):
            call()
