"""How the rows of a figure fall to patients, and what unequal patients do to an interval."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from g2l_core.metrics.statistics import cluster_codes, require_aligned
from g2l_core.rng import keyed_generator

MAX_GROUPS = 32
"""Of more patients, this many random groups are left out where each costs a pass over the rows."""
MAX_SUMMED_GROUPS = 128
"""The same where all that is needed are sums."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """How the rows of a figure fall to the patients."""

    counts: Float64[np.ndarray, "group stratum"]
    """Rows of each group in each stratum: a figure that is a mean over classes has a stratum for each class. Where rows
    weigh differently, their weights."""
    strata: tuple[str, ...]
    """What each stratum is, for people: "class tumor"."""
    unit: str
    """What a cluster is, in the plural: "patients"."""
    clusters: int
    """How many there are; more than groups where they are many."""


def leave_out_groups(
    clusters: Shaped[np.ndarray, " row"], most: int = MAX_GROUPS
) -> tuple[Int64[np.ndarray, " row"], int]:
    """Number the clusters, or, where they are many, equal random groups of whole clusters.

    Args:
        clusters: (row,) patient or slide of each row.
        most: How many groups at most.

    Returns:
        The (row,) group of each row, and the number of groups.

    Examples:
        >>> groups, count = leave_out_groups(np.array(["b", "a", "b"]))
        >>> groups.tolist(), count
        ([1, 0, 1], 2)
    """
    codes, count = cluster_codes(clusters)
    if count <= most:
        return codes, count
    group_of = keyed_generator("jackknife groups", count).permutation(count) % most
    return group_of[codes], most


def design_of(
    clusters: Shaped[np.ndarray, " row"],
    strata: Shaped[np.ndarray, " stratum_row"] | None = None,
    *,
    unit: str,
    stratum: str = "class",
    most: int = MAX_SUMMED_GROUPS,
    weights: Float64[np.ndarray, " weighted_row"] | None = None,
) -> Design:
    """Count the rows of each group of patients, by stratum.

    Args:
        clusters: (row,) patient or slide of each row.
        strata: (row,) class of each row, for figures that are means over classes; None for means over rows.
        unit: What a cluster is, in the plural.
        stratum: What a stratum is.
        most: How many groups at most; the same as for the figure's values.
        weights: (row,) how much each row carries of the figure, at least 0; None if all carry the same. A correlation
            with a label, or how much of it is explained, is carried by the patients whose labels are far from the
            mean: a row's weight is the square of that distance, its leverage in the regression on the label (Bell &
            McCaffrey 2002).

    Returns:
        The design.

    Examples:
        >>> design_of(np.array(["p2", "p1", "p2"]), np.array([0, 1, 1]), unit="patients").counts.tolist()
        [[0.0, 1.0], [1.0, 1.0]]
    """
    strata = np.zeros(len(clusters), np.int64) if strata is None else strata
    weights = np.ones(len(clusters)) if weights is None else weights
    require_aligned(clusters=len(clusters), strata=len(strata), weights=len(weights))
    codes, count = leave_out_groups(clusters, most)
    names, columns = np.unique(strata, return_inverse=True)
    cells = codes * len(names) + columns
    counts = np.bincount(cells, weights, minlength=count * len(names)).reshape(count, len(names))
    _, clusters_count = cluster_codes(clusters)
    return Design(
        counts=counts,
        strata=tuple(f"{stratum} {name}" for name in names.tolist()) if len(names) > 1 else ("row",),
        unit=unit,
        clusters=clusters_count,
    )


def effective_freedom(design: Design) -> tuple[float, float]:
    """Compute by how much unequal patients mislead the jackknife, and its degrees of freedom.

    The mean of stratum s is sum_g a_gs y_gs with the share a_gs of group g in its rows. Without group h it moves by
    a_hs / (1 - a_hs) (y_hs - mean). Under a working model in which all y_gs have one variance and are independent,
    these moves are B y with a matrix B, the expectation of the jackknife's variance is (G - 1) / G tr(B B'), and its
    degrees of freedom are tr(B B')^2 / tr(B B' B B') (Satterthwaite). Patients of equal size give 1 and G - 1.

    Args:
        design: The rows of each group in each stratum.

    Returns:
        What the jackknife's variance is multiplied with to be unbiased under the working model; and the degrees of
        freedom, at least 1.

    References:
        Bell & McCaffrey, Bias Reduction in Standard Errors for Linear Regression with Multi-Stage Samples (2002);
        Satterthwaite, An Approximate Distribution of Estimates of Variance Components (1946).

    Examples:
        >>> effective_freedom(design_of(np.arange(10), unit="patients"))
        (1.0, 9.0)
    """
    shares = design.counts / design.counts.sum(axis=0)
    count = len(shares)
    moves = np.zeros((count, count))
    for share in shares.T:
        weight = share / np.maximum(1 - share, 1e-9)
        matrix = weight[:, None] * (np.eye(count) - share)
        moves += matrix @ matrix.T
    expected = float(np.trace(moves))
    freedom = expected**2 / float((moves**2).sum())
    return round(float((shares**2).sum()) / (expected * (count - 1) / count), 12), max(1.0, round(freedom, 12))
