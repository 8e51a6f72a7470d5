"""From patches to slides and patients without training: a bag's mean feature, and its patches' vote.

A bag is the patches of one slide or one patient. Bags always come in the order of their sorted names.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.statistics import cluster_codes, cluster_sums, require_aligned


def bag_rows(bags: Shaped[np.ndarray, " row"]) -> list[Int64[np.ndarray, " member"]]:
    """Return the rows of each bag, ascending; bags in the order of their sorted names.

    Raises:
        TaskError: If there is no row.

    Examples:
        >>> [rows.tolist() for rows in bag_rows(np.array(["b", "a", "b"]))]
        [[1], [0, 2]]
    """
    codes, count = cluster_codes(bags)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(1, count)))


def mean_pool(
    features: Float[np.ndarray, "row dim"], bags: Shaped[np.ndarray, " bag_row"]
) -> tuple[Shaped[np.ndarray, " bag"], Float64[np.ndarray, "bag dim"]]:
    """Average the features of each bag, for a linear probe or a Cox model.

    Args:
        features: (row, dim) features of the patches; any float type, summed in float64.
        bags: (row,) slide or patient of each.

    Returns:
        The (bag,) sorted names, and the (bag, dim) means. The order of patches changes the last bits only.

    Raises:
        TaskError: If the lengths differ or there is no patch.

    Examples:
        >>> names, means = mean_pool(np.array([[1.0, 0.0], [5.0, 5.0], [3.0, 2.0]]), np.array(["b", "a", "b"]))
        >>> names.tolist(), means.tolist()
        (['a', 'b'], [[5.0, 5.0], [2.0, 1.0]])
    """
    require_aligned(features=len(features), bags=len(bags))
    means = [features[rows].mean(axis=0, dtype=np.float64) for rows in bag_rows(bags)]
    return np.unique(bags), np.stack(means)


def bag_values(
    values: Shaped[np.ndarray, " row"], bags: Shaped[np.ndarray, " bag_row"], name: str
) -> Shaped[np.ndarray, " bag"]:
    """Return the one value that all patches of a bag share: its label, patient, time or event.

    Args:
        values: (row,) value of each patch.
        bags: (row,) slide or patient of each.
        name: What the value is, for the message.

    Returns:
        The (bag,) values, in the order of the bags' sorted names.

    Raises:
        TaskError: If the lengths differ, or a bag holds several values.

    Examples:
        >>> bag_values(np.array(["tumor", "normal", "tumor"]), np.array(["b", "a", "b"]), "label").tolist()
        ['normal', 'tumor']
    """
    require_aligned(values=len(values), bags=len(bags))
    parts = bag_rows(bags)
    for rows in parts:
        if (values[rows] != values[rows[0]]).any():
            several = np.unique(values[rows])[:3].tolist()
            raise TaskError(f"each bag has one {name}, but {bags[rows[0]]} has {several}; label bags, not patches")
    return values[np.array([rows[0] for rows in parts])]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """Result of `patch_vote`."""

    bags: Shaped[np.ndarray, " bag"]
    """Sorted."""
    probabilities: Float64[np.ndarray, "bag class"]
    """The mean over the bag's patches."""
    shares: Float64[np.ndarray, "bag class"]
    """Fraction of the patches for which the class is the most probable (the first of equals)."""
    majority: Shaped[np.ndarray, " bag"]
    """The class with the greatest share; among equals the one with the greater mean probability."""


def patch_vote(
    probabilities: Float64[np.ndarray, "row class"],
    classes: Shaped[np.ndarray, " class"],
    bags: Shaped[np.ndarray, " bag_row"],
) -> Vote:
    """Classify bags by their patches: the mean of the probabilities, and the majority.

    Args:
        probabilities: (row, class) probabilities of each patch, as from `probe.linear_probe`.
        classes: (class,) classes of the columns.
        bags: (row,) slide or patient of each patch.

    Raises:
        TaskError: If the lengths differ or there is no patch.

    Examples:
        >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
        >>> vote = patch_vote(probabilities, np.array(["normal", "tumor"]), np.array(["s1", "s1", "s1"]))
        >>> vote.majority.tolist(), vote.probabilities.round(3).tolist()
        (['tumor'], [[0.567, 0.433]])
    """
    require_aligned(probabilities=len(probabilities), bags=len(bags))
    require_aligned(columns=probabilities.shape[1], classes=len(classes))
    votes = np.eye(len(classes))[probabilities.argmax(axis=1)]
    sizes = cluster_sums(np.ones((len(bags), 1)), bags)
    mean, counts = cluster_sums(probabilities, bags) / sizes, cluster_sums(votes, bags)
    tied = counts == counts.max(axis=1, keepdims=True)
    return Vote(
        bags=np.unique(bags),
        probabilities=mean,
        shares=counts / sizes,
        majority=classes[np.where(tied, mean, -np.inf).argmax(axis=1)],
    )
