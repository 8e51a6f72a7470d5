"""Exact nearest neighbors of features, and the vote among them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.candidates import Pairs, Precision, bfloat16_is_fast, candidate_filter
from g2l_core.metrics.knn.normalized import (
    Metric,
    NormalizedRows,
    normalized_rows,
    squared_distance_bounds,
    squared_distances,
)
from g2l_core.metrics.rows import row_blocks
from g2l_core.metrics.statistics import require_aligned

Weights = Literal["uniform", "distance", "similarity"]

_Codes: TypeAlias = tuple[Int64[np.ndarray, " query"], Int64[np.ndarray, " row"]]
"""Of the queries and of the reference."""

_BLOCK_SCORES = 1 << 25
"""Scores held at a time: 128 MiB of float32."""
_MANY_TIMES_K = 3
"""A distance takes a third less time in float32. Up to this many times k pairs a query are measured in float64 only."""
_MANY_PAIRS = 1 << 27
"""From so many pairs on, the candidate filter pays."""


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The nearest reference rows of each query, nearest first, equally near ones by row number."""

    metric: Metric
    indices: Int64[np.ndarray, "query k"]
    """Rows of the reference."""
    distances: Float64[np.ndarray, "query k"]
    """1 - cosine, or the Euclidean distance in the features' own unit."""

    @property
    def similarities(self) -> Float64[np.ndarray, "query k"]:
        """The cosine, or the Euclidean distance negated."""
        return 1 - self.distances if self.metric == "cosine" else -self.distances


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What the steps of one search share."""

    queries: NormalizedRows
    reference: NormalizedRows
    codes: _Codes
    """A query and a reference row of the same code never pair."""
    neighbors: Neighbors
    """The result, filled query by query."""

    @property
    def k(self) -> int:
        return self.neighbors.indices.shape[1]


def _group_codes(
    groups: Shaped[np.ndarray, " row"] | None,
    query_groups: Shaped[np.ndarray, " query"] | None,
    rows: int,
    queries: int | None,
) -> _Codes:
    """Return codes that are equal for a query and the rows excluded for it."""
    if queries is None:
        query_groups = groups = np.arange(rows) if groups is None else groups
    if queries is not None and groups is None and query_groups is None:
        return np.zeros(queries, np.int64), np.ones(rows, np.int64)
    if groups is None or query_groups is None:
        raise TaskError("to exclude neighbors of the same group, give the groups of both sides")
    require_aligned(reference=rows, groups=len(groups))
    require_aligned(queries=rows if queries is None else queries, query_groups=len(query_groups))
    _, codes = np.unique(np.concatenate([groups, query_groups]), return_inverse=True)
    return codes[rows:], codes[:rows]


def _require_enough(codes: _Codes, k: int) -> None:
    if k < 1:
        raise TaskError(f"k is at least 1; got {k}")
    excluded = np.bincount(codes[1], minlength=int(codes[0].max()) + 1)[codes[0]]
    fewest = len(codes[1]) - int(excluded.max())
    if fewest < k:
        raise TaskError(
            f"k = {k} neighbors are wanted, but a query has only {fewest:,} reference rows to choose from "
            "(its own group left out); use a smaller k or more rows"
        )


def _settle(search: _Search, pairs: Pairs) -> None:
    """Write the k nearest of some queries, given pairs that hold them; all pairs of a query come together.

    All pairs are measured in float64. Where they are many, float32 first leaves those in doubt. Equal pairs are
    measured once. 1 - cos = |u - v|^2 / 2 is exactly 0 for equal rows.
    """
    k, neighbors = search.k, search.neighbors
    settled = np.unique(pairs[0])
    if len(pairs[0]) > _MANY_TIMES_K * k * len(settled):
        pairs = _in_doubt(search, pairs)
    distinct, copies = _distinct_pairs(search, pairs)
    squares = squared_distances(search.queries, search.reference, *distinct, np.float64)[copies]
    queries, rows = pairs
    order = np.lexsort((rows, squares, queries))
    best = order[np.searchsorted(queries[order], settled)[:, None] + np.arange(k)]
    neighbors.indices[settled] = rows[best]
    if neighbors.metric == "cosine":
        neighbors.distances[settled] = squares[best] / 2
    else:
        neighbors.distances[settled] = np.sqrt(squares[best]) * search.reference.lengths[0]


def _in_doubt(search: _Search, pairs: Pairs) -> Pairs:
    """Return the pairs that may be among the k nearest of their query, by distances in float32."""
    distinct, copies = _distinct_pairs(search, pairs)
    rounded = squared_distances(search.queries, search.reference, *distinct, np.float32)
    low, high = squared_distance_bounds(rounded, search.queries, search.reference)
    queries, rows = pairs
    order = np.lexsort((high[copies], queries))
    _, first, counts = np.unique(queries[order], return_index=True, return_counts=True)
    limit = np.empty(len(queries))
    limit[order] = np.repeat(high[copies[order[first + search.k - 1]]], counts)
    near = low[copies] <= limit
    return queries[near], rows[near]


def _distinct_pairs(search: _Search, pairs: Pairs) -> tuple[Pairs, Int64[np.ndarray, " pair"]]:
    """Return pairs of which no two hold the same bytes, and for each given pair which of them it equals."""
    queries, rows = search.queries.first_copy[pairs[0]], search.reference.first_copy[pairs[1]]
    count = len(search.reference.first_copy)
    distinct, copies = np.unique(queries * count + rows, return_inverse=True)
    return np.divmod(distinct, count), copies


def _settle_filtered(
    search: _Search, pending: Int64[np.ndarray, " pending"], precision: Precision
) -> Int64[np.ndarray, " crowded"]:
    """Settle the queries that a candidate filter leaves few candidates; return the others."""
    all_pairs = search.queries is search.reference and len(pending) == len(search.codes[0])
    candidates = candidate_filter(
        (search.queries, search.reference),
        search.codes,
        None if all_pairs else pending,
        search.k,
        precision=precision,
        max_candidates=8 * search.k + 64,
    )
    for pairs in candidates.pairs():
        if len(pairs[0]):
            _settle(search, pairs)
    return np.sort(np.concatenate(candidates.crowded))


def _settle_exhaustively(search: _Search, pending: Int64[np.ndarray, " pending"]) -> None:
    """Rank all pairs of some queries in float32, and measure those that rounding leaves in doubt about the k-th best.

    The error of a product is at most dim 2^-24 |q| |r|, and some more for the rounding of the rows themselves
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
    """
    count, dim = search.reference.features.shape
    ranked = np.empty((count, dim), np.float32)
    for part in row_blocks(count):
        ranked[part] = search.reference.take(part)
    squares = np.einsum("ij,ij->i", ranked, ranked)
    unit_error = (dim + 8) * 2.0**-24
    step = max(1, _BLOCK_SCORES // count)
    for start in range(0, len(pending), step):
        block = pending[start : start + step]
        queries = search.queries.take(block)
        scores = queries.astype(np.float32) @ ranked.T
        scores -= squares / 2
        scores[search.codes[0][block, None] == search.codes[1]] = -np.inf
        doubt = 2 * unit_error * (np.linalg.norm(queries, axis=1) * np.sqrt(squares.max()) + squares.max() / 2)
        kth = np.partition(scores, count - search.k, axis=1)[:, -search.k]
        query, row = np.nonzero(scores >= (kth - doubt).astype(np.float32)[:, None])
        _settle(search, (block[query], row))


def nearest(
    reference: Float[np.ndarray, "row dim"],
    queries: Float[np.ndarray, "query query_dim"] | None,
    k: int,
    *,
    metric: Metric = "cosine",
    groups: Shaped[np.ndarray, " group_row"] | None = None,
    query_groups: Shaped[np.ndarray, " query_group_row"] | None = None,
) -> Neighbors:
    """Find the k nearest reference rows of each query; exact, and the same on every machine.

    The distance is 1 - q.r / (|q| |r|) for "cosine" and |q - r| for "euclidean". Equal rows have equal distances and
    come in the order of the reference.

    Low-precision products first rank all pairs (see the package's overview). All pairs that the bounds on their error
    leave in doubt are measured again in float64, and those distances decide. `reference.nearest_by_definition` computes
    the same in a few lines.

    Args:
        reference: (row, dim) features to choose from; float16, float32 or float64.
        queries: (query, dim) features whose neighbors are wanted. None: each reference row searches among the others.
        k: Neighbors of each query.
        metric: "cosine" or "euclidean".
        groups: The slide (or patient) of each reference row. A query's own group is left out.
        query_groups: The slide (or patient) of each query; not given where `queries` is None.

    Returns:
        Indices and distances, both (query, k).

    Raises:
        TaskError: If a row holds NaN or is zero (cosine), the widths or lengths differ, or a query has
            fewer than k rows to choose from.

    Examples:
        >>> reference = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> found = nearest(reference, np.array([[2.0, 0.0]]), 2)
        >>> found.indices.tolist(), found.similarities.round(6).tolist()
        ([[0, 2]], [[1.0, 0.6]])
    """
    count = len(reference if queries is None else queries)
    require_aligned(queries=count)
    if queries is not None:
        require_aligned(reference_dim=reference.shape[1], query_dim=queries.shape[1])
    codes = _group_codes(groups, query_groups, len(reference), None if queries is None else count)
    _require_enough(codes, k)
    query_rows, reference_rows = normalized_rows(reference, queries, metric)
    neighbors = Neighbors(metric=metric, indices=np.empty((count, k), np.int64), distances=np.empty((count, k)))
    search = _Search(queries=query_rows, reference=reference_rows, codes=codes, neighbors=neighbors)
    # Each step settles what it can and passes the other queries on to the next, more precise one.
    pending = np.arange(count)
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        if len(pending) * len(reference) >= _MANY_PAIRS and (precision == "float32" or bfloat16_is_fast()):
            pending = _settle_filtered(search, pending, precision)
    if len(pending):
        _settle_exhaustively(search, pending)
    return neighbors


@dataclass(frozen=True, kw_only=True)
class Vote:
    """Result of `knn_vote`."""

    classes: Shaped[np.ndarray, " class"]
    """Sorted; the columns of `probabilities`."""
    probabilities: Float64[np.ndarray, "query class"]
    """Each class's share of the votes."""
    predictions: Shaped[np.ndarray, " query"]
    """The class with most votes; among tied classes, that of the nearest neighbor."""


def knn_vote(
    neighbors: Neighbors,
    labels: Shaped[np.ndarray, " row"],
    *,
    k: int | None = None,
    weights: Weights = "uniform",
    temperature: float = 0.07,
) -> Vote:
    """Classify each query by the votes of its k nearest neighbors. One graph serves every k.

    Args:
        neighbors: From `nearest`.
        labels: (row,) class of each reference row; any type that sorts.
        k: Vote among the first k only. None: among all.
        weights: "uniform"; "distance": a vote counts 1 / distance, and where some are at distance 0 only they vote
            (as in scikit-learn); "similarity": a vote counts exp(similarity / temperature).
        temperature: For "similarity", in the unit of `Neighbors.similarities`.

    Returns:
        Probabilities (query, class) and predictions (query,).

    Raises:
        TaskError: If there is one class only, there are fewer labels than neighbors refer to, or k or the
            temperature is out of range.

    References:
        Similarity: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018),
        section 3.4, with its temperature.

    Examples:
        >>> graph = Neighbors(metric="cosine", indices=np.array([[0, 1, 2]]), distances=np.array([[0.1, 0.2, 0.4]]))
        >>> vote = knn_vote(graph, np.array(["t", "n", "n"]))
        >>> vote.predictions.tolist(), vote.probabilities.round(3).tolist()
        (['n'], [[0.667, 0.333]])
        >>> knn_vote(graph, np.array(["t", "n", "n"]), weights="distance").predictions.tolist()
        ['t']
    """
    k = neighbors.indices.shape[1] if k is None else k
    if not 1 <= k <= neighbors.indices.shape[1]:
        raise TaskError(f"k must lie between 1 and the {neighbors.indices.shape[1]} neighbors found; got {k}")
    if neighbors.indices.max() >= len(labels):
        raise TaskError(f"neighbors refer to row {neighbors.indices.max()}, but there are {len(labels)} labels")
    if temperature <= 0:
        raise TaskError(f"the temperature is positive; got {temperature}")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TaskError(f"a vote needs two classes at least; all {len(labels):,} labels are {classes[0]}")
    near = codes[neighbors.indices[:, :k]]
    query = np.arange(len(near))[:, None]
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (query, near), _vote_weights(neighbors.distances[:, :k], weights, temperature))
    winning = votes[query, near] == votes.max(axis=1, keepdims=True)
    return Vote(
        classes=classes,
        probabilities=votes / votes.sum(axis=1, keepdims=True),
        predictions=classes[near[query[:, 0], winning.argmax(axis=1)]],
    )


def knn_predict(
    neighbors: Neighbors,
    labels: Shaped[np.ndarray, " row"],
    *,
    k: int | None = None,
    weights: Weights = "uniform",
) -> Shaped[np.ndarray, " query"]:
    """Return the (query,) predictions of `knn_vote`, whose arguments and errors it has.

    Examples:
        >>> graph = nearest(np.array([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0]]), np.array([[1.0, 0.1]]), 2)
        >>> knn_predict(graph, np.array(["t", "t", "n"])).tolist()
        ['t']
    """
    return knn_vote(neighbors, labels, k=k, weights=weights).predictions


def _vote_weights(
    distances: Float64[np.ndarray, "query k"], weights: Weights, temperature: float
) -> Float64[np.ndarray, "query k"]:
    if weights == "uniform":
        return np.ones_like(distances)
    if weights == "similarity":  # divided by the nearest one's weight, which cancels: no exponential overflows
        return np.exp((distances[:, :1] - distances) / temperature)
    same = distances == 0
    inverse = 1 / np.where(same, 1.0, distances)
    return np.where(same.any(axis=1, keepdims=True), same, inverse)
