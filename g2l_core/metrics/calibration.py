"""Whether predicted probabilities can be believed, from sums that a bootstrap can draw (`statistics.of_sums`)."""

import numpy as np
from jaxtyping import Float64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.statistics import cluster_sums, require_aligned

BINS = 15
"""Of the confidence, equally wide over [0, 1]: as Guo et al. (2017)."""


def _hot(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
) -> Float64[np.ndarray, "row class"]:
    """1 in the column of each row's class."""
    require_aligned(truth=len(truth), probabilities=len(probabilities))
    require_aligned(columns=probabilities.shape[1], classes=len(classes))
    require_finite(probabilities, "the probabilities")
    unknown = np.setdiff1d(truth, classes)
    if len(unknown):
        raise TaskError(f"classes {unknown.tolist()} occur in the truth but were not in the training part")
    return (truth[:, None] == classes).astype(np.float64)


def brier_sums(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    clusters: Shaped[np.ndarray, " cluster_row"],
) -> Float64[np.ndarray, "cluster 2"]:
    """Of each cluster: the sum of squared errors of all classes' probabilities, and the number of rows.

    Args:
        truth: The class of each row.
        probabilities: Of each row and class.
        classes: The columns' classes.
        clusters: The patient or slide of each row.

    Raises:
        TaskError: If the lengths differ, a probability is NaN, or a true class is not among `classes`.
    """
    errors = ((probabilities - _hot(truth, probabilities, classes)) ** 2).sum(axis=1)
    return cluster_sums(np.stack([errors, np.ones(len(errors))], axis=1), clusters)


def brier_score(sums: Float64[np.ndarray, "draw 2"]) -> Float64[np.ndarray, " draw"]:
    """The mean over rows of sum_k (p_k - [truth is k])^2: from 0 to 2; of two classes, twice the one-column score.

    Args:
        sums: From `brier_sums`, added up over the clusters of each draw.

    References:
        Brier, Verification of Forecasts Expressed in Terms of Probability (1950), equation 2.
    """
    return sums[:, 0] / sums[:, 1]


def calibration_sums(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    clusters: Shaped[np.ndarray, " cluster_row"],
) -> Float64[np.ndarray, "cluster sums"]:
    """Of each cluster: the sum of (right - confidence) in each of `BINS` bins, and the number of rows.

    The confidence is the greatest probability of a row, of equal ones that of the first class; bin b holds
    b / BINS <= confidence < (b + 1) / BINS, the last one 1 too.

    Raises:
        TaskError: As `brier_sums`.
    """
    hot, rows = _hot(truth, probabilities, classes), np.arange(len(truth))
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[rows, predicted]
    columns = np.zeros((len(truth), BINS + 1))
    columns[rows, np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)] = hot[rows, predicted] - confidence
    columns[:, BINS] = 1
    return cluster_sums(columns, clusters)


def calibration_error(sums: Float64[np.ndarray, "draw sums"]) -> Float64[np.ndarray, " draw"]:
    """The expected calibration error: the mean over rows of |accuracy - mean confidence| of the row's bin.

    It is biased upwards where bins hold few rows, so it compares encoders on the same rows only.

    Args:
        sums: From `calibration_sums`, added up over the clusters of each draw.

    References:
        Guo et al., On Calibration of Modern Neural Networks (2017), equation 3.
    """
    return np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
