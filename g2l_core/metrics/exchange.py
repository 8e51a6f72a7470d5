"""Tests of two encoders by exchanging what they predict of the same patients, patient by patient."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Num

from g2l_core.rng import keyed_generator

_ALL_SWAPS = 10
"""Up to this many binary choices, all exchanges of two encoders are tried: 1,024."""


class Exchangeable(ABC):
    """What two encoders predict of the same patients, which can be exchanged patient by patient."""

    @abstractmethod
    def differences(
        self, other: "Exchangeable", exchanged: Bool[np.ndarray, "draw group"]
    ) -> Float64[np.ndarray, " draw"]:
        """The value of one encoder minus that of the other, after the two were exchanged for some patients."""


@dataclass(frozen=True, kw_only=True)
class OfSums(Exchangeable):
    """A value that follows from sums over the rows of each group."""

    score: Callable[[Num[np.ndarray, "draw *column"]], Float64[np.ndarray, " draw"]]
    sums: Num[np.ndarray, "group *column"]

    def differences(
        self, other: Exchangeable, exchanged: Bool[np.ndarray, "draw group"]
    ) -> Float64[np.ndarray, " draw"]:
        """See `Exchangeable.differences`."""
        assert isinstance(other, OfSums)
        own, others = (self.sums.astype(np.float64), other.sums.astype(np.float64))
        moved = np.tensordot(exchanged.astype(np.float64), others - own, axes=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # an exchange may leave a class without a prediction
            return self.score(own.sum(axis=0) + moved) - self.score(others.sum(axis=0) - moved)


def exchange_test(first: Exchangeable, second: Exchangeable, groups: int, draws: int, seed: int) -> float:
    """Compute the share of exchanges whose difference is at least as large as that found.

    Args:
        first: One encoder's.
        second: The other's, of the same patients.
        groups: How many groups of patients there are; all 2^(groups - 1) exchanges are tried of up to eleven.
        draws: How many random exchanges are tried of more.
        seed: Random seed of them.

    Returns:
        The two-sided p-value. Undefined differences count as large.

    References:
        Good, Permutation, Parametric, and Bootstrap Tests of Hypotheses (2005), section 7.3.
    """
    if groups - 1 <= _ALL_SWAPS:
        exchanged = (np.arange(2 ** (groups - 1))[:, None] >> np.arange(groups) & 1).astype(bool)
    else:
        exchanged = keyed_generator("exchanges", seed, groups).integers(2, size=(1 + draws, groups)).astype(bool)
        exchanged[0] = False
    differences = np.abs(first.differences(second, exchanged))
    return float((~(differences < differences[0] * (1 - 1e-9) - 1e-12)).mean())
