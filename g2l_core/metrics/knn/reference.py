"""What `neighbors.nearest` computes, written as the definition. Tests compare the fast form with it."""

import numpy as np
from jaxtyping import Float, Shaped

from g2l_core.metrics.knn.neighbors import Neighbors
from g2l_core.metrics.knn.normalized import Metric


def nearest_by_definition(
    reference: Float[np.ndarray, "row dim"],
    queries: Float[np.ndarray, "query dim"] | None,
    k: int,
    *,
    metric: Metric = "cosine",
    groups: Shaped[np.ndarray, " row"] | None = None,
    query_groups: Shaped[np.ndarray, " query"] | None = None,
) -> Neighbors:
    """Find the k nearest reference rows by brute force in float64; arguments and result as of `neighbors.nearest`.

    It holds all differences, (query, row, dim) numbers, and checks nothing.

    Examples:
        >>> nearest_by_definition(np.array([[0.0], [1.0], [3.0]]), None, 1, metric="euclidean").indices.tolist()
        [[1], [0], [1]]
    """
    rows, sought = (features.astype(np.float64) for features in (reference, reference if queries is None else queries))
    if queries is None:
        query_groups = groups = np.arange(len(rows)) if groups is None else groups
    if metric == "cosine":
        rows, sought = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, sought))
    squares = ((sought[:, None] - rows) ** 2).sum(axis=2)
    if groups is not None and query_groups is not None:
        squares[query_groups[:, None] == groups] = np.inf
    indices = np.argsort(squares, axis=1, kind="stable")[:, :k]  # of equal distances, the lower row first
    squares = np.take_along_axis(squares, indices, axis=1)
    distances = squares / 2 if metric == "cosine" else np.sqrt(squares)  # |u - v|^2 = 2 - 2 cos of unit rows
    return Neighbors(metric=metric, indices=indices, distances=distances)
