"""Rows by cluster, which is a patient, a slide, or whatever is independent; and p-values of many tests."""

from math import nan

import numpy as np
from jaxtyping import Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError


def require_aligned(**lengths: int) -> None:
    """Check that arrays which belong together are equally long.

    Args:
        **lengths: The length of each, by the name to print.

    Raises:
        TaskError: If they differ, or are 0.

    Examples:
        >>> require_aligned(features=3, labels=2)
        Traceback (most recent call last):
            ...
        g2l_core.errors.TaskError: these must have the same length, and not 0; got features 3, labels 2
    """
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise TaskError(f"these must have the same length, and not 0; got {listed}")


def cluster_codes(clusters: Shaped[np.ndarray, " row"]) -> tuple[Int64[np.ndarray, " row"], int]:
    """Number the clusters in the order of their sorted names.

    Args:
        clusters: (row,) patient or slide of each row, of any type that sorts.

    Returns:
        The (row,) number of each row's cluster, and how many clusters there are.

    Raises:
        TaskError: If there is no row.

    Examples:
        >>> codes, count = cluster_codes(np.array(["p2", "p1", "p2"]))
        >>> codes.tolist(), count
        ([1, 0, 1], 2)
    """
    require_aligned(clusters=len(clusters))
    names, codes = np.unique(clusters, return_inverse=True)
    return codes.astype(np.int64), len(names)


def cluster_sums(
    rows: Num[np.ndarray, "row column"], clusters: Shaped[np.ndarray, " cluster_row"]
) -> Num[np.ndarray, "cluster column"]:
    """Sum the rows of each cluster.

    Args:
        rows: (row, column) counts.
        clusters: (row,) cluster of each row.

    Returns:
        The (cluster, column) sums in the same dtype; clusters in the order of their sorted names.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> cluster_sums(np.array([[1, 0], [1, 1], [0, 1]]), np.array(["a", "b", "a"])).tolist()
        [[1, 1], [1, 1]]
    """
    require_aligned(rows=len(rows), clusters=len(clusters))
    codes, count = cluster_codes(clusters)
    sums = np.zeros((count, rows.shape[1]), rows.dtype)
    np.add.at(sums, codes, rows)
    return sums


def holm(p_values: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """Adjust p-values for multiple tests, by Holm's step-down method.

    Of m p-values in ascending order, the i-th becomes the maximum over j <= i of min(1, (m - j + 1) p_j).

    Args:
        p_values: (test,) p-values. NaN marks a test that could not be made; it stays NaN and does not count.

    Returns:
        The (test,) adjusted p-values. Where they are below 0.05, the tests hold at 5 % all together.

    Raises:
        TaskError: If a p-value is outside [0, 1].

    References:
        Holm, A simple sequentially rejective multiple test procedure (1979).

    Examples:
        >>> holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist()
        [0.03, 0.06, nan, 0.06]
    """
    made = np.flatnonzero(~np.isnan(p_values))
    if ((p_values[made] < 0) | (p_values[made] > 1)).any():
        raise TaskError(f"p-values lie in [0, 1]; got {p_values.tolist()}")
    order = made[np.argsort(p_values[made], kind="stable")]
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.full_like(p_values, nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
