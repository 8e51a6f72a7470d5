"""Calibration of predicted probabilities, from sums over patients (`intervals.of_sums`)."""

import numpy as np
from jaxtyping import Float64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.rows import require_finite
from g2l_core.metrics.statistics import cluster_sums, require_aligned

BINS = 15
"""Bins of the confidence, equally wide over [0, 1], as in Guo et al. (2017)."""

NO_INTERVAL = (
    "the calibration error of few rows is biased upwards, more than any interval around it could say; the Brier score "
    "has one"
)
"""Why the calibration error is given without an interval."""


def _hot(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
) -> Float64[np.ndarray, "row class"]:
    """Return a matrix with 1 in the column of each row's class."""
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
    """Sum the squared errors of all classes' probabilities over each cluster.

    Args:
        truth: (row,) class of each row.
        probabilities: (row, class) predicted probabilities.
        classes: (class,) classes of the columns.
        clusters: (row,) patient or slide of each row.

    Returns:
        (cluster, 2): the sum of squared errors, and the number of rows.

    Raises:
        TaskError: If the lengths differ, a probability is NaN, or a true class is not among `classes`.

    Examples:
        >>> probabilities = np.array([[0.8, 0.2], [0.4, 0.6]])
        >>> brier_sums(np.array([0, 1]), probabilities, np.array([0, 1]), np.array(["p1", "p2"])).round(6).tolist()
        [[0.08, 1.0], [0.32, 1.0]]
    """
    errors = ((probabilities - _hot(truth, probabilities, classes)) ** 2).sum(axis=1)
    return cluster_sums(np.stack([errors, np.ones(len(errors))], axis=1), clusters)


def brier_score(sums: Float64[np.ndarray, "draw 2"]) -> Float64[np.ndarray, " draw"]:
    """Compute the Brier score: the mean over rows of sum_k (p_k - [truth is k])^2.

    It lies between 0 and 2. With two classes it is twice the score of one column.

    Args:
        sums: (draw, 2) sums from `brier_sums`, added up over the clusters of each draw.

    Returns:
        The (draw,) scores.

    References:
        Brier, Verification of Forecasts Expressed in Terms of Probability (1950), equation 2.

    Examples:
        >>> brier_score(np.array([[0.4, 2.0]])).tolist()
        [0.2]
    """
    return sums[:, 0] / sums[:, 1]


def expected_brier_variance(probabilities: Float64[np.ndarray, "row class"]) -> float:
    """Compute the variance that the Brier score of these rows would have if the probabilities were true.

    The error of a row, were k its class, is e_k = sum_j (p_j - [j is k])^2. It has the variance sum_k p_k e_k^2 -
    (sum_k p_k e_k)^2, and the mean over n independent rows the mean of these over n.

    Args:
        probabilities: (row, class) predicted probabilities.

    Returns:
        The variance.

    Examples:
        >>> round(expected_brier_variance(np.array([[0.8, 0.2], [1.0, 0.0]])), 6)
        0.0576
    """
    errors = (probabilities**2).sum(axis=1, keepdims=True) - 2 * probabilities + 1
    means = (probabilities * errors).sum(axis=1)
    variances = (probabilities * errors**2).sum(axis=1) - means**2
    return float(variances.sum()) / len(probabilities) ** 2


def calibration_sums(
    truth: Shaped[np.ndarray, " row"],
    probabilities: Float64[np.ndarray, "probability_row column"],
    classes: Shaped[np.ndarray, " class"],
    clusters: Shaped[np.ndarray, " cluster_row"],
) -> Float64[np.ndarray, "cluster sums"]:
    """Sum (right - confidence) over the rows of each cluster, in each of `BINS` bins.

    The confidence is the greatest probability of a row; among equal ones that of the first class. Bin b holds
    b / BINS <= confidence < (b + 1) / BINS; the last one includes 1. Arguments are those of `brier_sums`.

    Returns:
        (cluster, `BINS` + 1): the sum of each bin, and the number of rows.

    Raises:
        TaskError: As `brier_sums`.

    Examples:
        >>> probabilities = np.array([[0.8, 0.2], [0.4, 0.6]])
        >>> sums = calibration_sums(np.array([0, 0]), probabilities, np.array([0, 1]), np.array(["p1", "p1"]))
        >>> sums.shape, sums[0, [9, 12, BINS]].round(6).tolist()
        ((1, 16), [-0.6, 0.2, 2.0])
    """
    hot, rows = _hot(truth, probabilities, classes), np.arange(len(truth))
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[rows, predicted]
    columns = np.zeros((len(truth), BINS + 1))
    columns[rows, np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)] = hot[rows, predicted] - confidence
    columns[:, BINS] = 1
    return cluster_sums(columns, clusters)


def calibration_error(sums: Float64[np.ndarray, "draw sums"]) -> Float64[np.ndarray, " draw"]:
    """Compute the expected calibration error: sum_b n_b / n |accuracy_b - mean confidence_b| over bins b.

    It is biased upwards where bins hold few rows, so it compares encoders on the same rows only.

    Args:
        sums: (draw, `BINS` + 1) sums from `calibration_sums`, added up over the clusters of each draw.

    Returns:
        The (draw,) errors.

    References:
        Guo et al., On Calibration of Modern Neural Networks (2017), equation 3.

    Examples:
        >>> calibration_error(np.array([[-0.6, 0.2, 2.0]])).tolist()
        [0.4]
    """
    return np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
