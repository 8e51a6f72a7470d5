"""Exact nearest neighbors of features, and the vote among them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.points import Metric, Points, gap_bounds, gaps, points_of
from g2l_core.metrics.knn.screening import Precision, bfloat16_is_fast, screen
from g2l_core.metrics.rows import row_blocks
from g2l_core.metrics.statistics import require_aligned

Weights = Literal["uniform", "distance", "similarity"]

_Codes: TypeAlias = tuple[Int64[np.ndarray, " query"], Int64[np.ndarray, " row"]]
"""Of the queries and of the reference."""

_BLOCK_SCORES = 1 << 25
"""Most scores held at a time: 128 MiB of float32."""
_MANY_TIMES_K = 3
"""A distance takes a third less in float32: of fewer pairs than this many times k a query, float64 measures all."""
_MANY_PAIRS = 1 << 27
"""From so many pairs on, a screen of low precision pays."""


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


def _group_codes(
    groups: Shaped[np.ndarray, " row"] | None,
    query_groups: Shaped[np.ndarray, " query"] | None,
    rows: int,
    queries: int | None,
) -> _Codes:
    """Codes that a query and the rows it must not meet have in common."""
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
    own = np.bincount(codes[1], minlength=int(codes[0].max()) + 1)[codes[0]]
    fewest = len(codes[1]) - int(own.max())
    if fewest < k:
        raise TaskError(
            f"k = {k} neighbors are wanted, but a query has only {fewest:,} reference rows to choose from "
            "(its own group left out); use a smaller k or more rows"
        )


def _settle(
    found: Neighbors,
    asked: Points,
    base: Points,
    queries: Int64[np.ndarray, " pair"],
    rows: Int64[np.ndarray, " pair"],
) -> None:
    """Enters the k nearest of queries, given pairs that hold them, those of one query together.

    All are measured in float64; where they are many, float32 leaves those in doubt. Equal pairs are measured once.
    1 - cos = |u - v|^2 / 2, which is exactly 0 for equal rows.
    """
    k = found.indices.shape[1]
    settled = np.unique(queries)
    if len(queries) > _MANY_TIMES_K * k * len(settled):
        queries, rows = _in_doubt(asked, base, queries, rows, k)
    pairs, copies = _unlike_pairs(asked, base, queries, rows)
    squares = gaps(asked, base, *pairs, np.float64)[copies]
    order = np.lexsort((rows, squares, queries))
    best = order[np.searchsorted(queries[order], settled)[:, None] + np.arange(k)]
    found.indices[settled] = rows[best]
    if found.metric == "cosine":
        found.distances[settled] = squares[best] / 2
    else:
        found.distances[settled] = np.sqrt(squares[best]) * base.lengths[0]


def _in_doubt(
    asked: Points, base: Points, queries: Int64[np.ndarray, " pair"], rows: Int64[np.ndarray, " pair"], k: int
) -> tuple[Int64[np.ndarray, " near"], Int64[np.ndarray, " near"]]:
    """The pairs that may be among the k nearest of their query, measured in float32."""
    pairs, copies = _unlike_pairs(asked, base, queries, rows)
    low, high = gap_bounds(gaps(asked, base, *pairs, np.float32), asked, base)
    order = np.lexsort((high[copies], queries))
    _, first, counts = np.unique(queries[order], return_index=True, return_counts=True)
    limit = np.empty(len(queries))
    limit[order] = np.repeat(high[copies[order[first + k - 1]]], counts)
    near = low[copies] <= limit
    return queries[near], rows[near]


def _unlike_pairs(
    asked: Points, base: Points, queries: Int64[np.ndarray, " pair"], rows: Int64[np.ndarray, " pair"]
) -> tuple[tuple[Int64[np.ndarray, " unlike"], Int64[np.ndarray, " unlike"]], Int64[np.ndarray, " pair"]]:
    """Pairs of which no two hold the same bytes, and which of them each pair is."""
    count = len(base.alike)
    pairs, copies = np.unique(asked.alike[queries] * count + base.alike[rows], return_inverse=True)
    return np.divmod(pairs, count), copies


def _screened(
    found: Neighbors,
    asked: Points,
    base: Points,
    codes: _Codes,
    left: Int64[np.ndarray, " left"],
    precision: Precision,
) -> Int64[np.ndarray, " crowded"]:
    """Settles what a screen can; returns the queries it cannot."""
    k = found.indices.shape[1]
    all_pairs = asked is base and len(left) == len(base.alike)
    sweep = screen((asked, base), codes, None if all_pairs else left, k, precision=precision, most=8 * k + 64)
    for queries, rows in sweep.pairs():
        if len(queries):
            _settle(found, asked, base, queries, rows)
    return np.sort(np.concatenate(sweep.crowded))


def _exhaustive(found: Neighbors, asked: Points, base: Points, codes: _Codes, left: Int64[np.ndarray, " left"]) -> None:
    """Ranks all pairs of some queries in float32; measures those within the doubt of the k-th best.

    The error of a product is at most dim 2^-24 |q| |r|, and some more for the rounding of the rows themselves
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
    """
    count, k = len(base.alike), found.indices.shape[1]
    ranked = np.empty((count, base.features.shape[1]), np.float32)
    for part in row_blocks(count):
        ranked[part] = base.of(part)
    squares = np.einsum("ij,ij->i", ranked, ranked)
    unit_error = (base.features.shape[1] + 8) * 2.0**-24
    step = max(1, _BLOCK_SCORES // count)
    for start in range(0, len(left), step):
        block = left[start : start + step]
        sought = asked.of(block)
        scores = sought.astype(np.float32) @ ranked.T
        scores -= squares / 2
        scores[codes[0][block, None] == codes[1]] = -np.inf
        doubt = 2 * unit_error * (np.linalg.norm(sought, axis=1) * np.sqrt(squares.max()) + squares.max() / 2)
        kth = np.partition(scores, count - k, axis=1)[:, -k]
        queries, rows = np.nonzero(scores >= (kth - doubt).astype(np.float32)[:, None])
        _settle(found, asked, base, block[queries], rows)


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

    Products of low precision rank all pairs: bfloat16 where the processor is made for it and the pairs are
    many, else float32. All pairs that the bounds on their error leave in doubt are measured again in float64,
    and those distances decide.
    Equal rows have equal distances and stand in the order of the reference.

    Args:
        reference: Rows to choose from; float16, float32 or float64.
        queries: Rows whose neighbors are wanted. None: each reference row seeks among the others.
        k: Neighbors of each query.
        metric: "cosine" or "euclidean".
        groups: The slide (or patient) of each reference row. A query's own group is left out.
        query_groups: That of each query; not given where `queries` is None.

    Raises:
        TaskError: If a row holds NaN or is zero (cosine), the widths or lengths differ, or a query has
            fewer than k rows to choose from.
    """
    count = len(reference if queries is None else queries)
    require_aligned(queries=count)
    if queries is not None:
        require_aligned(reference_dim=reference.shape[1], query_dim=queries.shape[1])
    codes = _group_codes(groups, query_groups, len(reference), None if queries is None else count)
    _require_enough(codes, k)
    asked, base = points_of(reference, queries, metric)
    found = Neighbors(metric=metric, indices=np.empty((count, k), np.int64), distances=np.empty((count, k)))
    left = np.arange(count)
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        if len(left) * len(reference) >= _MANY_PAIRS and (precision == "float32" or bfloat16_is_fast()):
            left = _screened(found, asked, base, codes, left, precision)
    if len(left):
        _exhaustive(found, asked, base, codes, left)
    return found


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What the neighbors of each query say."""

    classes: Shaped[np.ndarray, " class"]
    """Sorted; the columns of `probabilities`."""
    probabilities: Float64[np.ndarray, "query class"]
    """Each class's share of the votes."""
    predictions: Shaped[np.ndarray, " query"]
    """The class with most votes; of tied classes, that of the nearest one."""


def knn_vote(
    neighbors: Neighbors,
    labels: Shaped[np.ndarray, " row"],
    *,
    k: int | None = None,
    weights: Weights = "uniform",
    temperature: float = 0.07,
) -> Vote:
    """The votes of the k nearest neighbors; one graph serves every k.

    Args:
        neighbors: From `nearest`.
        labels: The class of each reference row; any type that sorts.
        k: Vote among the first k only. None: among all.
        weights: "uniform"; "distance": a vote counts 1 / distance, and where some are at distance 0 only they vote
            (as in scikit-learn); "similarity": a vote counts exp(similarity / temperature).
        temperature: Of "similarity", in the unit of `Neighbors.similarities`.

    Raises:
        TaskError: If there is one class only, there are fewer labels than neighbors refer to, or k or the
            temperature is out of range.

    References:
        Similarity: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018),
        section 3.4, with its temperature.
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
    """The predictions of `knn_vote`, in the labels' dtype; its arguments, its errors."""
    return knn_vote(neighbors, labels, k=k, weights=weights).predictions


def _vote_weights(
    distances: Float64[np.ndarray, "query k"], weights: Weights, temperature: float
) -> Float64[np.ndarray, "query k"]:
    if weights == "uniform":
        return np.ones_like(distances)
    if weights == "similarity":  # but for the nearest one's, which cancels: no exponential overflows
        return np.exp((distances[:, :1] - distances) / temperature)
    same = distances == 0
    inverse = 1 / np.where(same, 1.0, distances)
    return np.where(same.any(axis=1, keepdims=True), same, inverse)
