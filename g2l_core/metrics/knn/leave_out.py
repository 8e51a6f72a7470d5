"""Sums over queries that depend on their neighbors, on all rows and without each group of patients.

A figure of neighbors depends on a patient in two ways: by its queries, and as a neighbor of the others' queries. Both
are left out here. The neighbors without a patient are the next ones of a longer list, so that rows are searched once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import Neighbors, nearest
from g2l_core.metrics.knn.normalized import Metric

_LISTED = 50_000
"""Neighbors listed at least, where there are so many: more cost more to sort than rows to search again."""

Contributions = Callable[..., Num[np.ndarray, "query column"]]
"""Takes the numbers of some queries and, from each search, their `Neighbors`; returns what each of them adds."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The arguments of `nearest`, and which group of patients each row is left out with."""

    reference: Float[np.ndarray, "row dim"]
    queries: Float[np.ndarray, "query dim"] | None = None
    k: int
    metric: Metric = "cosine"
    groups: Shaped[np.ndarray, " row"] | None = None
    """The slide of each reference row where a query's own slide is no neighbor; only without `queries`."""
    left_out_with: Int64[np.ndarray, " row"]
    """The group of patients of each reference row."""


@dataclass(frozen=True, kw_only=True)
class LeaveOutSums:
    """What queries contribute to a figure of neighbors."""

    first: tuple[Neighbors, ...]
    """The neighbors of every query in each search, nobody left out."""
    base: Float64[np.ndarray, "query column"]
    """What every query contributes, nobody left out."""
    totals: Float64[np.ndarray, "set sum"]
    """The sums over all queries; then, for each group, over the queries outside it, whose neighbors are outside it too
    (NaN where some query then has fewer than k rows to choose from); then, for each two groups, over all queries, where
    those of each of the two have no neighbor in the other. `intervals.of_neighbors` reads them so."""


def leave_out_sums(
    searches: Sequence[Search],
    contributions: Contributions,
    left_out_with: Int64[np.ndarray, " query"],
    count: int,
    summed: Callable[[Int64[np.ndarray, " some"], Float64[np.ndarray, "some column"]], np.ndarray] | None = None,
) -> LeaveOutSums:
    """Sum what queries contribute: all of them, then those outside each group, whose neighbors are outside it too.

    Args:
        searches: One for each encoder that the contributions compare; all have the same queries.
        contributions: What the queries add, given the numbers of some and their neighbors in each search.
        left_out_with: (query,) the group of patients of each query.
        count: The number of groups.
        summed: Makes (sum,) sums of some queries' numbers and contributions; None adds the contributions up.

    Returns:
        The sums.

    Raises:
        TaskError: As `nearest`.

    Examples:
        >>> features, patients = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), np.array([0, 1, 1, 2])
        >>> search = Search(reference=features, k=1, left_out_with=patients)
        >>> def of_patient_one(rows, neighbors):
        ...     return (patients[neighbors.indices] == 1).astype(float)
        >>> leave_out_sums([search], of_patient_one, patients, 3).totals.ravel().tolist()
        [2.0, 1.0, 0.0, 2.0, 1.0, 2.0, 2.0]
    """
    listed = [_listed(search, len(left_out_with)) for search in searches]
    everyone = np.arange(len(left_out_with))
    first = tuple(_taken(g, everyone[:, None], np.arange(s.k)) for s, g in zip(searches, listed, strict=True))
    base = np.asarray(contributions(everyone, *first), np.float64)
    add = summed or (lambda _, values: values.sum(axis=0))
    whole = add(everyone, base)
    without = np.empty((count, len(whole)))
    given = np.zeros((count, count, len(whole)))  # what queries of the first group owe to neighbors in the second
    for group in range(count):
        kept = np.flatnonzero(left_out_with != group)
        moved = [(s.left_out_with[g.indices[kept]] == group).any(axis=1) for s, g in zip(searches, first, strict=True)]
        rows = kept[np.logical_or.reduce(moved)]
        try:
            others = [_without(s, g, rows, group) for s, g in zip(searches, listed, strict=True)]
        except TaskError:  # too few rows are left to choose from
            without[group] = np.nan
            continue
        gone = np.flatnonzero(left_out_with == group)
        changed = np.asarray(contributions(rows, *others), np.float64) if len(rows) else base[rows]
        for other in np.unique(left_out_with[rows]).tolist():
            own = left_out_with[rows] == other
            given[other, group] = add(rows[own], base[rows[own]]) - add(rows[own], changed[own])
        without[group] = whole - add(gone, base[gone]) - given[:, group].sum(axis=0)
    first_of_two, second_of_two = np.triu_indices(count, 1)
    apart = whole - given[first_of_two, second_of_two] - given[second_of_two, first_of_two]
    totals = np.concatenate([whole[None], without, apart])
    return LeaveOutSums(first=first, base=base, totals=totals)


def _listed(search: Search, queries: int) -> Neighbors:
    """More neighbors than are asked for: at least twice as many, where there are."""
    available = len(search.reference)
    if search.queries is None:
        groups = np.arange(available) if search.groups is None else search.groups
        available -= int(np.unique(groups, return_counts=True)[1].max())
    depth = max(search.k, min(available, max(2 * search.k, _LISTED // queries)))
    return nearest(search.reference, search.queries, depth, metric=search.metric, groups=search.groups)


def _taken(graph: Neighbors, rows: Int64[np.ndarray, "_ 1"], columns: Int64[np.ndarray, "..."]) -> Neighbors:
    return Neighbors(
        metric=graph.metric, indices=graph.indices[rows, columns], distances=graph.distances[rows, columns]
    )


def _without(search: Search, graph: Neighbors, rows: Int64[np.ndarray, " some"], group: int) -> Neighbors:
    """The k nearest of some queries outside a group; those whose list is too short are searched for again."""
    gone = search.left_out_with[graph.indices[rows]] == group
    order = np.argsort(gone, axis=1, kind="stable")[:, : search.k]
    found = _taken(graph, rows[:, None], order)
    short = np.flatnonzero((~gone).sum(axis=1) < search.k)
    if len(short):
        kept = np.flatnonzero(search.left_out_with != group)
        queries = search.reference if search.queries is None else search.queries
        own = np.arange(len(search.reference)) if search.groups is None else search.groups
        apart = {"groups": own[kept], "query_groups": own[rows[short]]} if search.queries is None else {}
        again = nearest(search.reference[kept], queries[rows[short]], search.k, metric=search.metric, **apart)
        found.indices[short], found.distances[short] = kept[again.indices], again.distances
    return found
