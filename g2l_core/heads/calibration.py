"""Temperature scaling: probabilities that are as often right as they say, without another order of the classes."""

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import minimize_scalar

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import require_aligned

LIMITS = (0.05, 20.0)
"""Between which temperatures are looked for."""


def tempered(log_probabilities: Float64[np.ndarray, "item class"], temperature: float) -> np.ndarray:
    """Divide log-probabilities by a temperature and normalize them again.

    Args:
        log_probabilities: (item, class), natural logarithms.
        temperature: Above 1, less sure; below 1, surer.

    Returns:
        (item, class) probabilities, float64.

    Examples:
        >>> tempered(np.log([[0.8, 0.2]]), 2.0).round(3).tolist()
        [[0.667, 0.333]]
    """
    scores = log_probabilities / temperature
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def log_loss(log_probabilities: Float64[np.ndarray, "item class"], codes: Int64[np.ndarray, " item"]) -> float:
    """Compute the mean of -log p of the true class, in nats; 1e-12 is the least probability that counts.

    Examples:
        >>> round(log_loss(np.log([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1])), 4)
        0.4904
    """
    chosen = log_probabilities[np.arange(len(codes)), codes]
    return float(-np.maximum(chosen, np.log(1e-12)).mean())


def fit_temperature(log_probabilities: Float64[np.ndarray, "item class"], codes: Int64[np.ndarray, " item"]) -> float:
    """Find the temperature with the least log loss on items that the classifier was not fitted on.

    The truth counts as Platt's targets, not as 0 and 1: of the N items of a class, each is of that class with
    probability (N + 1) / (N + K), and of each other of the K classes with 1 / (N + K). If all held-out items are right,
    the least log loss of 0 and 1 is that of endless certainty, which so many items do not show.

    Args:
        log_probabilities: (item, class) of held-out items, such as those of folds.
        codes: (item,) the true class of each, from 0.

    Returns:
        The temperature, between 0.05 and 20.

    Raises:
        TaskError: The lengths differ, or there is no item.

    References:
        Guo et al., On Calibration of Modern Neural Networks (2017), section 4.2; Platt, Probabilistic Outputs for
        Support Vector Machines (1999), section 2.1.

    Examples:
        >>> sure = np.log(np.tile([[0.99, 0.01]], (1000, 1)))  # right in 800 of 1,000
        >>> codes = np.array([0] * 800 + [1] * 200)
        >>> temperature = fit_temperature(sure, codes)
        >>> tempered(sure, temperature)[0].round(2).tolist()
        [0.8, 0.2]
        >>> right = np.log([[0.99, 0.01], [0.01, 0.99]] * 5)  # ten of ten
        >>> tempered(right, fit_temperature(right, np.array([0, 1] * 5)))[0].round(2).tolist()
        [0.86, 0.14]
    """
    require_aligned(log_probabilities=len(log_probabilities), codes=len(codes))
    if not len(codes):
        raise TaskError("a temperature needs held-out items, and there are none")
    logs = np.maximum(log_probabilities, np.log(1e-300))
    targets = _targets(codes, logs.shape[1])
    low, high = np.log(LIMITS)

    def loss(log_temperature: float) -> float:
        found = np.log(np.maximum(tempered(logs, float(np.exp(log_temperature))), 1e-300))
        return -float((targets * found).sum(axis=1).mean())

    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _targets(codes: Int64[np.ndarray, " item"], classes: int) -> Float64[np.ndarray, "item class"]:
    """The probabilities of each item's classes, by the rule of succession."""
    of_class = np.bincount(codes, minlength=classes)
    targets = (1 + np.eye(classes) * of_class) / (of_class + classes)[:, None]
    return targets[codes]
