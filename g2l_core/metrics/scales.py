"""The bounds of intervals, given how large the error of a value is in the value's own unit.

An error is rarely as large on both sides: that of an AUC of 0.97 is not 0.05 upwards. A `Scale` says how the margin
grows and shrinks on either side, so that intervals keep to what the value can be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import copysign, sqrt

import numpy as np
from scipy.special import expit, logit


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a margin about a value becomes the bound of an interval."""

    bound: Callable[[float, float], float]
    """Takes a value between `ends` and a signed margin in its unit; returns the interval's bound on that side."""
    ends: tuple[float, float]
    """The least and the largest value that there can be."""
    counts: bool = False
    """Whether it counts what is right, so that the variance of one row a patient follows from the value."""


def _score(value: float, margin: float) -> float:
    """The t with (value - t)^2 = margin^2 t (1 - t) / (value (1 - value)): the error is that of a share of t.

    References:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927); with a variance that is
        estimated: Korn & Graubard, Confidence Intervals for Proportions With Small Expected Number of Positive Counts
        Estimated From Survey Data (1998).
    """
    spread = value * (1 - value)
    c = margin**2 / spread
    return (value + c / 2 + copysign(sqrt(c * spread + c * c / 4), margin)) / (1 + c)


def _fisher(value: float, margin: float) -> float:
    return float(np.tanh(np.arctanh(value) + margin / (1 - value**2)))


def _logit_of_half(value: float, margin: float) -> float:
    """About a value between 0 and 2, on the logit of its half."""
    return float(2 * expit(logit(value / 2) + 2 * margin / (value * (2 - value))))


LINE = Scale(bound=lambda value, margin: value + margin, ends=(-np.inf, np.inf))
"""Any number."""
SHARE = Scale(bound=_score, ends=(0.0, 1.0), counts=True)
"""A share of rows, such as an accuracy."""
ORDER = Scale(bound=_score, ends=(0.0, 1.0))
"""A share of pairs of rows that are in the right order: an AUC or a C-index."""
POSITIVE = Scale(bound=lambda value, margin: value * float(np.exp(margin / value)), ends=(0.0, np.inf))
"""A ratio."""
CORRELATION = Scale(bound=_fisher, ends=(-1.0, 1.0))
"""A correlation or a cosine."""
SQUARED_ERROR = Scale(bound=_logit_of_half, ends=(0.0, 2.0))
"""A squared error of probabilities, summed over classes."""
