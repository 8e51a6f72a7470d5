"""Robustness indices against croma and against plain loops."""

import numpy as np
import pandas as pd
import pytest
from croma.metrics.ri import RobustnessIndex
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import Neighbors, nearest
from g2l_core.metrics.robustness import pathorob_index, ratio_index, robustness_counts, robustness_sums

KS = [1, 3, 5, 10, 20]


def cohort(seed, biology, center, n=360):
    """Features with planted strengths of class and center; 6 slides in each of 3 centers."""
    rng = np.random.default_rng(seed)
    classes, slides = rng.integers(4, size=n), rng.integers(18, size=n)
    centers = slides % 3
    class_means, center_means = rng.standard_normal((4, 12)), rng.standard_normal((3, 12))
    features = biology * class_means[classes] + center * center_means[centers]
    return features + rng.standard_normal((n, 12)), classes, centers, slides


STRENGTHS = pytest.mark.parametrize(("biology", "center"), [(0, 0), (2, 0.5), (0.5, 2), (1, 1)])


@STRENGTHS
@pytest.mark.parametrize("seed", [0, 1])
def test_pathorob_index_equals_croma(biology, center, seed):
    features, classes, centers, slides = cohort(seed, biology, center)
    table = pd.DataFrame({"label": classes, "center": centers, "group_id": slides}).astype(str)
    table["sample_id"] = table["image_path"] = [f"p{i}" for i in range(len(features))]
    expected = RobustnessIndex.compute_curve(features, table, confounder_column="center", k_values=KS)
    graph = nearest(features, None, max(KS), groups=slides)
    for k in KS:
        totals = robustness_counts(graph, classes, centers, k=k).sum(axis=0, keepdims=True)
        assert pathorob_index(totals)[0] == pytest.approx(expected[k], abs=1e-12)


@STRENGTHS
def test_both_indices_equal_plain_loops(biology, center):
    features, classes, centers, slides = cohort(5, biology, center, n=120)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    tally = dict.fromkeys(("class", "center", "so", "os"), 0)
    for i in range(120):
        others = [j for j in range(120) if slides[j] != slides[i]]
        for j in sorted(others, key=lambda j: -cosine[i, j])[:7]:
            tally["class"] += classes[i] == classes[j]
            tally["center"] += centers[i] == centers[j]
            tally["so"] += classes[i] == classes[j] and centers[i] != centers[j]
            tally["os"] += classes[i] != classes[j] and centers[i] == centers[j]
    counts = robustness_counts(nearest(features, None, 7, groups=slides), classes, centers, k=7)
    totals = counts.sum(axis=0, keepdims=True)
    assert ratio_index(totals)[0] == pytest.approx(tally["class"] / tally["center"], abs=1e-12)
    assert pathorob_index(totals)[0] == pytest.approx(tally["so"] / (tally["so"] + tally["os"]), abs=1e-12)


def test_planted_truth_is_told_apart():
    values = {}
    for name, strengths in {"biology": (4, 0), "center": (0, 4)}.items():
        features, classes, centers, slides = cohort(0, *strengths)
        counts = robustness_counts(nearest(features, None, 10, groups=slides), classes, centers, k=10)
        totals = counts.sum(axis=0, keepdims=True)
        values[name] = ratio_index(totals)[0], pathorob_index(totals)[0]
    assert values["biology"][0] > 1.5
    assert values["center"][0] < 0.5
    assert values["biology"][1] > 0.95
    assert values["center"][1] < 0.05


def test_counts_by_hand():
    graph = Neighbors(
        metric="cosine",
        indices=np.array([[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 1, 0]]),
        distances=np.zeros((4, 3)),
    )
    classes, centers = np.array(["t", "t", "n", "n"]), np.array(["A", "B", "A", "B"])
    np.testing.assert_array_equal(
        robustness_counts(graph, classes, centers, k=2), [[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]
    )
    totals = np.array([[2, 1, 4], [0, 0, 0], [3, 0, 0]])
    np.testing.assert_allclose(ratio_index(totals), [0.5, np.nan, 1.0])
    np.testing.assert_allclose(pathorob_index(totals), [0.2, np.nan, np.nan])


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 10))
def test_counts_are_shares_of_k(seed, k):
    features, classes, centers, slides = cohort(seed, 1, 1, n=150)
    counts = robustness_counts(nearest(features, None, 10, groups=slides), classes, centers, k=k)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) <= k).all()


def test_a_patient_is_left_out_as_query_and_as_neighbor():
    features, classes, centers, slides = cohort(0, 1, 1)
    patients = slides // 2
    totals, support = robustness_sums(features, classes, centers, slides, patients, ks=[1, 5])
    for number, kept in enumerate([np.ones(len(slides), bool), *(patients != p for p in np.unique(patients))]):
        graph = nearest(features[kept], None, 5, groups=slides[kept])
        for k in (1, 5):
            counts = robustness_counts(graph, classes[kept], centers[kept], k=k)
            np.testing.assert_array_equal(totals[k][number], counts.sum(axis=0))
            if not number:
                assert support[k] == counts[:, 1:].any(axis=1).mean()


def test_what_says_nothing_is_refused():
    features, classes, centers, slides = cohort(0, 1, 1)
    graph = nearest(features, None, 5, groups=slides)
    with pytest.raises(TaskError, match="has the medical center 0"):
        robustness_counts(graph, classes, np.zeros_like(centers), k=5)
    with pytest.raises(TaskError, match="has the class 0"):
        robustness_counts(graph, np.zeros_like(classes), centers, k=5)
    with pytest.raises(TaskError, match="some center needs two slides"):
        robustness_counts(nearest(features, None, 5, groups=centers), classes, centers, k=5)
    with pytest.raises(TaskError, match="between 1 and the 5"):
        robustness_counts(graph, classes, centers, k=6)
    with pytest.raises(TaskError, match="centers 359"):
        robustness_counts(graph, classes, centers[1:], k=5)
