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

    Args:
        log_probabilities: (item, class) of held-out items, such as those of folds.
        codes: (item,) the true class of each, from 0.

    Returns:
        The temperature, between 0.05 and 20: of held-out items that are all right, no finite one is best.

    Raises:
        TaskError: The lengths differ, or there is no item.

    References:
        Guo et al., On Calibration of Modern Neural Networks (2017), section 4.2.

    Examples:
        >>> sure = np.log(np.tile([[0.99, 0.01]], (10, 1)))  # right in 8 of 10
        >>> codes = np.array([0] * 8 + [1] * 2)
        >>> temperature = fit_temperature(sure, codes)
        >>> tempered(sure, temperature)[0].round(2).tolist()
        [0.8, 0.2]
    """
    require_aligned(log_probabilities=len(log_probabilities), codes=len(codes))
    if not len(codes):
        raise TaskError("a temperature needs held-out items, and there are none")
    logs = np.maximum(log_probabilities, np.log(1e-300))
    low, high = np.log(LIMITS)
    found = minimize_scalar(
        lambda t: log_loss(np.log(np.maximum(tempered(logs, float(np.exp(t))), 1e-300)), codes),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))
