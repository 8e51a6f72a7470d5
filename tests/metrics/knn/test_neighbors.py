"""Neighbors and votes against scikit-learn, ties and exclusions against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from g2l_core.errors import TaskError
from g2l_core.metrics.knn import neighbors as module
from g2l_core.metrics.knn.neighbors import Neighbors, knn_predict, knn_vote, nearest
from g2l_core.metrics.knn.reference import nearest_by_definition

METRICS = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def blobs(seed, n, dim=24, dtype=np.float32):
    """Rows far from the origin, where a careless Euclidean distance loses its digits."""
    return (np.random.default_rng(seed).standard_normal((n, dim)) + 5).astype(dtype)


@METRICS
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("block", [1, 700, 1 << 25])
def test_equals_scikit_learn(metric, dtype, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SCORES", block)
    reference, queries = blobs(0, 300, dtype=dtype), blobs(1, 80, dtype=dtype)
    found = nearest(reference, queries, 7, metric=metric)
    model = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(reference.astype(np.float64))
    distances, indices = model.kneighbors(queries.astype(np.float64))
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, atol=1e-7)


@METRICS
def test_large_mean_does_not_cost_the_order(metric):
    rng = np.random.default_rng(0)
    reference = 1000 + rng.standard_normal((200, 16))
    found, expected = (find(reference, None, 5, metric=metric) for find in (nearest, nearest_by_definition))
    np.testing.assert_array_equal(found.indices, expected.indices)


@METRICS
@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(2, 30), k=st.integers(1, 12))
def test_equal_rows_stand_in_the_order_of_the_reference(metric, seed, copies, k):
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((6, 5)).astype(np.float32)
    reference = distinct[rng.integers(6, size=6 * copies)]
    query = rng.standard_normal((3, 5)).astype(np.float32)
    found = nearest(reference, query, min(k, len(reference)), metric=metric)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    for row, distances in zip(found.indices, found.distances, strict=True):
        for distance in np.unique(distances):
            tied = row[distances == distance]
            assert (np.diff(tied) > 0).all()
            same = np.flatnonzero((reference == reference[tied[0]]).all(axis=1))
            np.testing.assert_array_equal(tied, same[: len(tied)])


@METRICS
@given(seed=st.integers(0, 2**32 - 1))
def test_own_group_and_self_are_left_out(metric, seed):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((40, 3))
    groups = rng.choice(["s1", "s2", "s3", "s4"], size=40)
    k = int((groups[:, None] != groups[None]).sum(axis=1).min())
    found, expected = (f(features, None, k, metric=metric, groups=groups) for f in (nearest, nearest_by_definition))
    np.testing.assert_array_equal(found.indices, expected.indices)
    half = nearest(features[20:], features[:20], 1, metric=metric, groups=groups[20:], query_groups=groups[:20])
    assert (groups[20:][half.indices[:, 0]] != groups[:20]).all()
    alone = nearest(features, None, 39, metric=metric)
    np.testing.assert_array_equal(np.sort(alone.indices)[5], np.delete(np.arange(40), 5))


def test_similarities_by_hand():
    reference = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    query = np.array([[2.0, 0.0]])
    cosine = nearest(reference, query, 3)
    np.testing.assert_array_equal(cosine.indices, [[0, 2, 1]])
    np.testing.assert_allclose(cosine.similarities, [[1.0, np.sqrt(0.5), 0.0]], atol=1e-15)
    euclidean = nearest(reference, query, 3, metric="euclidean")
    np.testing.assert_array_equal(euclidean.indices, [[0, 1, 2]])
    np.testing.assert_allclose(euclidean.similarities, [[-1.0, -np.sqrt(8), -np.sqrt(10)]])


@METRICS
@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("k", [1, 5, 9])
def test_vote_equals_scikit_learn(metric, weights, k):
    reference, queries = blobs(0, 400), blobs(1, 150)
    labels = (reference[:, 0] > 5).astype(int)
    found = nearest(reference, queries, 9, metric=metric)
    model = KNeighborsClassifier(k, weights=weights, metric=metric, algorithm="brute")
    expected = model.fit(reference.astype(np.float64), labels).predict(queries.astype(np.float64))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(knn_predict(found, labels, k=k, weights=weights), expected)


@METRICS
@pytest.mark.parametrize("weights", ["uniform", "distance", "similarity"])
def test_probabilities_of_the_vote_equal_scikit_learn(metric, weights):
    reference, queries = blobs(0, 400), blobs(1, 150)
    labels = np.array(["fat", "stroma", "tumor"])[(reference[:, 0] > 5).astype(int) + (reference[:, 1] > 5)]
    found = nearest(reference, queries, 9, metric=metric)
    weigh = weights if weights != "similarity" else lambda distances: np.exp(-distances / 0.07)
    for k in (1, 4, 9):
        model = KNeighborsClassifier(k, weights=weigh, metric=metric, algorithm="brute")
        expected = model.fit(reference.astype(np.float64), labels).predict_proba(queries.astype(np.float64))
        vote = knn_vote(found, labels, k=k, weights=weights)
        np.testing.assert_array_equal(vote.classes, model.classes_)
        np.testing.assert_allclose(vote.probabilities, expected, atol=1e-5)


def test_a_low_temperature_listens_to_the_nearest_and_a_high_one_to_all():
    labels = np.array(["x", "b", "b"])
    found = hand([0, 1, 2], [1.0, 2.0, 3.0])
    cold, warm = (knn_vote(found, labels, weights="similarity", temperature=t) for t in (0.001, 1e6))
    np.testing.assert_allclose(cold.probabilities, [[0.0, 1.0]], atol=1e-12)
    assert cold.predictions == ["x"]
    np.testing.assert_allclose(warm.probabilities, [[2 / 3, 1 / 3]], atol=1e-5)
    assert warm.predictions == ["b"]
    with pytest.raises(TaskError, match="temperature is positive"):
        knn_vote(found, labels, weights="similarity", temperature=0.0)


def hand(indices, distances):
    return Neighbors(metric="euclidean", indices=np.array([indices]), distances=np.array([distances]))


def test_tied_vote_goes_to_the_nearest_of_the_tied_classes():
    labels = np.array(["x", "b", "a", "b", "a"])
    assert knn_predict(hand([0, 1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0, 5.0]), labels) == ["b"]
    assert knn_predict(hand([0, 2, 1, 3, 4], [1.0, 2.0, 3.0, 4.0, 5.0]), labels) == ["a"]


def test_neighbors_at_distance_zero_decide_alone():
    labels = np.array([7, 9])
    found = hand([0, 1, 1], [0.0, 1e-9, 1e-9])
    assert knn_predict(found, labels, weights="distance") == [7]
    assert knn_predict(found, labels) == [9]


@METRICS
def test_bad_rows_are_counted(metric):
    bad = blobs(0, 20)
    bad[[1, 4, 9], 3] = np.nan
    with pytest.raises(TaskError, match="3 of 20 rows of the reference"):
        nearest(bad, None, 3, metric=metric)
    with pytest.raises(TaskError, match="3 of 20 rows of the queries"):
        nearest(blobs(0, 20), bad, 3, metric=metric)


def test_rows_of_zeros_have_no_cosine():
    zero = blobs(0, 20)
    zero[2] = 0
    with pytest.raises(TaskError, match="rows of zeros"):
        nearest(zero, None, 3)
    nearest(zero, None, 3, metric="euclidean")


@pytest.mark.parametrize(
    ("k", "queries", "groups", "said"),
    [
        (21, "other", None, "only 20 reference rows"),
        (20, None, None, "only 19 reference rows"),
        (11, None, [0, 1] * 10, "only 10 reference rows"),
        (0, None, None, "at least 1; got 0"),
        (3, None, [0, 1], "reference 20, groups 2"),
        (3, "other", [0, 1] * 10, "groups of both sides"),
    ],
)
def test_too_few_rows_and_wrong_groups_are_refused(k, queries, groups, said):
    with pytest.raises(TaskError, match=said):
        nearest(blobs(0, 20), blobs(1, 5) if queries else None, k, groups=None if groups is None else np.array(groups))


def test_widths_must_agree():
    with pytest.raises(TaskError, match="reference_dim 24, query_dim 23"):
        nearest(blobs(0, 20), blobs(1, 5)[:, 1:], 3)


@pytest.mark.parametrize(
    ("labels", "k", "said"),
    [([1, 1, 1], 2, "all 3 labels are 1"), ([0, 1], 2, "there are 2 labels"), ([0, 1, 1], 3, "2 neighbors")],
)
def test_votes_that_cannot_be_taken(labels, k, said):
    with pytest.raises(TaskError, match=said):
        knn_predict(hand([0, 2], [1.0, 2.0]), np.array(labels), k=k)


def test_thousands_of_equal_rows_are_measured_once(monkeypatch):
    measured = []
    plain = module.squared_distances

    def spy(queries, reference, query, row, dtype):
        measured.append(len(query))
        return plain(queries, reference, query, row, dtype)

    monkeypatch.setattr(module, "squared_distances", spy)
    features = blobs(0, 3000)
    features[1000:] = features[0]
    found = nearest(features, None, 4)
    np.testing.assert_array_equal(found.indices[2500], [0, 1000, 1001, 1002])
    np.testing.assert_array_equal(found.indices[1001], [0, 1000, 1002, 1003])
    assert sum(measured) < 3000 * 10
