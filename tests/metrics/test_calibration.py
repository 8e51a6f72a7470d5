"""Brier score and calibration error against scikit-learn and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from g2l_core.errors import TaskError
from g2l_core.metrics.calibration import BINS, brier_score, brier_sums, calibration_error, calibration_sums

CLASSES = np.array(["fat", "stroma", "tumor"])


def predicted(seed, n=80, classes=3):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), size=n)
    truth = np.array([rng.choice(classes, p=p) for p in probabilities])
    return CLASSES[truth], probabilities, rng.integers(6, size=n)


def whole(sums):
    return sums.sum(axis=0, keepdims=True)


@given(seed=st.integers(0, 2**32 - 1))
def test_brier_score_equals_scikit_learn(seed):
    truth, probabilities, patients = predicted(seed)
    got = brier_score(whole(brier_sums(truth, probabilities, CLASSES, patients)))[0]
    expected = brier_score_loss(truth, probabilities, labels=CLASSES, scale_by_half=False)
    assert got == pytest.approx(expected, abs=1e-14)


@given(seed=st.integers(0, 2**32 - 1))
def test_calibration_error_equals_plain_loops(seed):
    truth, probabilities, patients = predicted(seed)
    gap = 0.0
    confidence = probabilities.max(axis=1)
    right = CLASSES[probabilities.argmax(axis=1)] == truth
    for b in range(BINS):
        inside = (confidence >= b / BINS) & (confidence < (b + 1) / BINS)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    got = calibration_error(whole(calibration_sums(truth, probabilities, CLASSES, patients)))[0]
    assert got == pytest.approx(gap, abs=1e-13)


def test_by_hand():
    truth = np.array([0, 1, 1, 1])
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    one = np.zeros(4)
    assert brier_score(brier_sums(truth, probabilities, np.arange(2), one))[0] == 0.5
    assert calibration_error(calibration_sums(truth, probabilities, np.arange(2), one))[0] == 0.25


def test_overconfidence_costs_and_truth_is_calibrated():
    truth, probabilities, patients = predicted(0, n=20_000)
    sharp = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    honest, bold = (whole(calibration_sums(truth, p, CLASSES, patients)) for p in (probabilities, sharp))
    assert calibration_error(honest)[0] < 0.02
    assert calibration_error(bold)[0] > 0.15


@pytest.mark.parametrize("sums", [brier_sums, calibration_sums])
def test_what_does_not_fit_is_refused(sums):
    truth, probabilities, patients = predicted(0)
    with pytest.raises(TaskError, match=r"classes \['tumor'\] occur in the truth"):
        sums(truth, probabilities[:, :2], CLASSES[:2], patients)
    with pytest.raises(TaskError, match="truth 79, probabilities 80"):
        sums(truth[1:], probabilities, CLASSES, patients[1:])
    bad = probabilities.copy()
    bad[3, 1] = np.nan
    with pytest.raises(TaskError, match="1 of 80 rows of the probabilities"):
        sums(truth, bad, CLASSES, patients)
