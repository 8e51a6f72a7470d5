"""Exact nearest neighbours of features, and the vote among them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.similarity import require_finite, row_blocks
from g2l_core.metrics.statistics import require_aligned

Metric = Literal["cosine", "euclidean"]

_BLOCK_SCORES = 1 << 25
"""Most scores held at a time: 128 MiB of float32."""
_BLOCK_VALUES = 1 << 22
"""Most float64 feature values gathered at a time, for either side of the pairs: 32 MiB."""


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
class _Rows:
    """Features as they are, and what ranks them."""

    features: Float[np.ndarray, "row dim"]
    ranked: Float32[np.ndarray, "row dim"]
    """Of unit length for the cosine, else about the reference's mean, so that few rows need measuring again."""
    alike: Int64[np.ndarray, " row"]
    """The first row that holds the same bytes: blank patches come by the thousand, one is measured."""


def _prepare(
    features: Float[np.ndarray, "row dim"], metric: Metric, center: Float64[np.ndarray, " dim"], name: str
) -> _Rows:
    require_finite(features, name)
    ranked = np.empty(features.shape, np.float32)
    for rows in row_blocks(len(features)):
        block = features[rows].astype(np.float64)
        if metric == "cosine":
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            if not lengths.all():
                raise TaskError(f"{name} has rows of zeros, which have no cosine; leave them out")
            ranked[rows] = block / lengths
        else:
            ranked[rows] = block - center
    whole = np.ascontiguousarray(features).view(np.dtype((np.void, features.shape[1] * features.itemsize)))
    _, first, codes = np.unique(whole[:, 0], return_index=True, return_inverse=True)
    return _Rows(features=features, ranked=ranked, alike=first[codes])


def _pair_distances(
    queries: Float[np.ndarray, "query dim"],
    reference: Float[np.ndarray, "row dim"],
    metric: Metric,
    query: Int64[np.ndarray, " pair"],
    row: Int64[np.ndarray, " pair"],
) -> Float64[np.ndarray, " pair"]:
    """Distances in float64, exactly equal for equal rows wherever they stand: 1 - cos = |u - v|^2 / 2."""
    distances = np.empty(len(query))
    step = max(1, _BLOCK_VALUES // queries.shape[1])
    for start in range(0, len(distances), step):
        part = slice(start, start + step)
        left = queries[query[part]].astype(np.float64)
        right = reference[row[part]].astype(np.float64)
        if metric == "cosine":
            left /= np.linalg.norm(left, axis=1, keepdims=True)
            right /= np.linalg.norm(right, axis=1, keepdims=True)
        left -= right
        squares = np.einsum("ij,ij->i", left, left)
        distances[part] = squares / 2 if metric == "cosine" else np.sqrt(squares)
    return distances


def _group_codes(
    groups: Shaped[np.ndarray, " row"] | None,
    query_groups: Shaped[np.ndarray, " query"] | None,
    rows: int,
    queries: int | None,
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " query"]] | None:
    """Codes that a query and the rows it must not meet have in common."""
    if queries is None:
        query_groups = groups = np.arange(rows) if groups is None else groups
    if groups is None and query_groups is None:
        return None
    if groups is None or query_groups is None:
        raise TaskError("to exclude neighbours of the same group, give the groups of both sides")
    require_aligned(reference=rows, groups=len(groups))
    require_aligned(queries=rows if queries is None else queries, query_groups=len(query_groups))
    _, codes = np.unique(np.concatenate([groups, query_groups]), return_inverse=True)
    return codes[:rows], codes[rows:]


def _require_enough(
    codes: tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " query"]] | None, rows: int, k: int
) -> None:
    if k < 1:
        raise TaskError(f"k is at least 1; got {k}")
    short = rows < k
    if codes is not None:
        eligible = rows - np.bincount(codes[0], minlength=int(codes[1].max()) + 1)[codes[1]]
        short = bool((eligible < k).any())
        rows = int(eligible.min())
    if short:
        raise TaskError(
            f"k = {k} neighbours are wanted, but a query has only {rows:,} reference rows to choose from "
            "(its own group left out); use a smaller k or more rows"
        )


def _best(
    scores: Float32[np.ndarray, "query row"],
    slack: Float64[np.ndarray, " query"],
    k: int,
    alike: tuple[Int64[np.ndarray, " query"], Int64[np.ndarray, " row"]],
    measure: Callable[[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"]], Float64[np.ndarray, " pair"]],
) -> tuple[Int64[np.ndarray, "query k"], Float64[np.ndarray, "query k"]]:
    """The k nearest rows of each query, and their distances, when each score may be wrong by `slack` / 2.

    All rows whose score is within the slack of the k-th best are measured, equal pairs once.
    """
    count = scores.shape[1]
    kth = np.partition(scores, count - k, axis=1)[:, -k]
    queries, rows = np.nonzero(scores >= (kth - slack).astype(np.float32)[:, None])
    pairs, copies = np.unique(alike[0][queries] * count + alike[1][rows], return_inverse=True)
    distances = measure(*np.divmod(pairs, count))[copies]
    order = np.lexsort((rows, distances, queries))
    best = order[np.searchsorted(queries, np.arange(len(scores)))[:, None] + np.arange(k)]
    return rows[best], distances[best]


def nearest(
    reference: Float[np.ndarray, "row dim"],
    queries: Float[np.ndarray, "query query_dim"] | None,
    k: int,
    *,
    metric: Metric = "cosine",
    groups: Shaped[np.ndarray, " group_row"] | None = None,
    query_groups: Shaped[np.ndarray, " query_group_row"] | None = None,
) -> Neighbors:
    """Finds the k nearest reference rows of each query; exact, and the same on every machine.

    A float32 matrix product, in blocks of 128 MiB, ranks all pairs. Its error is at most dim 2^-24 |q| |r|,
    and some more for the rounding of the rows themselves (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1). So all pairs within twice that of the k-th best are measured again in
    float64, and those distances decide.
    Equal rows have equal distances and stand in the order of the reference.

    Args:
        reference: Rows to choose from; float16, float32 or float64.
        queries: Rows whose neighbours are wanted. None: each reference row seeks among the others.
        k: Neighbours of each query.
        metric: "cosine" or "euclidean".
        groups: The slide (or patient) of each reference row. A query's own group is left out.
        query_groups: That of each query; not given where `queries` is None.

    Raises:
        TaskError: If a row holds NaN or is zero (cosine), the widths or lengths differ, or a query has
            fewer than k rows to choose from.
    """
    asked = reference if queries is None else queries
    require_aligned(queries=len(asked))
    require_aligned(reference_dim=reference.shape[1], query_dim=asked.shape[1])
    codes = _group_codes(groups, query_groups, len(reference), None if queries is None else len(queries))
    _require_enough(codes, len(reference), k)
    center = reference.mean(axis=0, dtype=np.float64)
    base = _prepare(reference, metric, center, "the reference")
    sought = base if queries is None else _prepare(asked, metric, center, "the queries")
    squares = np.einsum("ij,ij->i", base.ranked, base.ranked)
    offsets = squares / 2 if metric == "euclidean" else np.zeros_like(squares)
    unit_error = (reference.shape[1] + 8) * 2.0**-24
    indices, distances = np.empty((len(asked), k), np.int64), np.empty((len(asked), k))
    step = max(1, _BLOCK_SCORES // len(reference))
    for start in range(0, len(asked), step):
        block = slice(start, start + step)
        scores = sought.ranked[block] @ base.ranked.T
        scores -= offsets
        if codes is not None:
            scores[codes[1][block, None] == codes[0]] = -np.inf
        lengths = np.linalg.norm(sought.ranked[block].astype(np.float64), axis=1)
        slack = 2 * unit_error * (lengths * np.sqrt(squares.max()) + offsets.max())
        alike = sought.alike[block], base.alike
        measure = partial(_pair_distances, asked, reference, metric)
        indices[block], distances[block] = _best(scores, slack, k, alike, measure)
    return Neighbors(metric=metric, indices=indices, distances=distances)


def knn_predict(
    neighbors: Neighbors,
    labels: Shaped[np.ndarray, " row"],
    *,
    k: int | None = None,
    weights: Literal["uniform", "distance"] = "uniform",
) -> Shaped[np.ndarray, " query"]:
    """The class that most of the k nearest neighbours have; of tied classes, that of the nearest one.

    Args:
        neighbors: From `nearest`.
        labels: The class of each reference row; any type that sorts.
        k: Vote among the first k only. None: among all.
        weights: "uniform", or "distance": a vote counts 1 / distance, and where some are at distance 0
            only they vote (as in scikit-learn).

    Returns:
        The predicted class of each query, in the labels' dtype.

    Raises:
        TaskError: If there is one class only, there are fewer labels than neighbours refer to, or k is out
            of range.
    """
    k = neighbors.indices.shape[1] if k is None else k
    if not 1 <= k <= neighbors.indices.shape[1]:
        raise TaskError(f"k must lie between 1 and the {neighbors.indices.shape[1]} neighbours found; got {k}")
    if neighbors.indices.max() >= len(labels):
        raise TaskError(f"neighbours refer to row {neighbors.indices.max()}, but there are {len(labels)} labels")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TaskError(f"a vote needs two classes at least; all {len(labels):,} labels are {classes[0]}")
    near = codes[neighbors.indices[:, :k]]
    query = np.arange(len(near))[:, None]
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (query, near), _vote_weights(neighbors.distances[:, :k], weights))
    winning = votes[query, near] == votes.max(axis=1, keepdims=True)
    return classes[near[query[:, 0], winning.argmax(axis=1)]]


def _vote_weights(
    distances: Float64[np.ndarray, "query k"], weights: Literal["uniform", "distance"]
) -> Float64[np.ndarray, "query k"]:
    if weights == "uniform":
        return np.ones_like(distances)
    same = distances == 0
    inverse = 1 / np.where(same, 1.0, distances)
    return np.where(same.any(axis=1, keepdims=True), same, inverse)
