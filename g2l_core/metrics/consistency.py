"""Agreement of features of the same tissue between scanners and stains: registered patches, as in PLISM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import Neighbors, nearest
from g2l_core.metrics.patients import leave_out_groups
from g2l_core.metrics.statistics import require_aligned


@dataclass(frozen=True, kw_only=True)
class ConsistencySums:
    """Sums over patches for every pair of conditions: of all patches, then without each group of clusters."""

    pairs: tuple[tuple[str, str], ...]
    ks: tuple[int, ...]
    sums: Float64[np.ndarray, "set pair column"]
    """Number of patches; sum of cosines; for each k how many patches were retrieved, the mean of both directions."""

    def column(self, k: int | None = None) -> int:
        """Return the column of `pair_means` with the retrieval accuracy at k, or with the cosine (None)."""
        if k is not None and k not in self.ks:
            raise TaskError(f"retrieval was counted at k = {list(self.ks)}; got {k}")
        return 0 if k is None else 1 + self.ks.index(k)


def registered_pair(
    first: Float[np.ndarray, "patch dim"],
    second: Float[np.ndarray, "patch_b dim_b"],
    *,
    ks: Sequence[int] = (1, 3, 5, 10),
) -> Float64[np.ndarray, "patch column"]:
    """Compare each patch with itself under another condition: its cosine, and whether it is retrieved among all.

    A patch is retrieved at k if fewer than k others of all patches of both conditions, itself left out, are as near
    to it as its own counterpart. Others at the same distance count against it: blank patches and features that
    have collapsed to a point are not retrieved. Neighbors come from `neighbors.nearest`, in blocks: the matrix
    of all pairs is never held.

    Args:
        first: (patch, dim) features under one condition (scanner and stain); any float type.
        second: (patch, dim) features of the same patches in the same order under another.
        ks: Numbers of neighbors.

    Returns:
        (patch, 2 + len(ks)): 1, the cosine, and for each k 0, 1/2 or 1: retrieved in neither, one or both directions.

    Raises:
        TaskError: If the shapes differ, a row is zero or NaN, or there are too few patches for the greatest k.

    References:
        Filiot et al., Distilling foundation models for robust and efficient models in digital pathology (2025),
        arXiv 2501.16239, robustness on PLISM; its program `plismbench` ranks within the same pool, and lets the
        order of rows decide ties.

    Examples:
        >>> scanner_a, scanner_b = np.eye(3), np.eye(3) + 0.1
        >>> registered_pair(scanner_a, scanner_b, ks=[1]).round(3).tolist()
        [[1.0, 0.992, 1.0], [1.0, 0.992, 1.0], [1.0, 0.992, 1.0]]
    """
    require_aligned(first=len(first), second=len(second))
    require_aligned(first_dim=first.shape[1], second_dim=second.shape[1])
    if not ks or min(ks) < 1 or max(ks) > 2 * len(first) - 2:
        raise TaskError(f"retrieval needs ks between 1 and 2 patches - 2 = {2 * len(first) - 2}; got {list(ks)}")
    count = len(first)
    graph = nearest(np.concatenate([first, second]), None, max(ks) + 1)
    hits = _retrieved(graph, _counterparts(count), ks).reshape(2, count, len(ks))
    return np.column_stack([np.ones(count), _cosines(first, second), hits.mean(axis=0)])


def _counterparts(count: int) -> Int64[np.ndarray, " query"]:
    """Where each patch of both conditions, one behind the other, is under the other one."""
    return (np.arange(2 * count) + count) % (2 * count)


def _retrieved(
    graph: Neighbors, counterparts: Int64[np.ndarray, " query"], ks: Sequence[int]
) -> Float64[np.ndarray, "query k"]:
    own = graph.indices == counterparts[:, None]
    distance = np.where(own.any(axis=1), np.where(own, graph.distances, 0).sum(axis=1), np.inf)
    # The counterpart is one of the k + 1 neighbors: k - 1 others at most are as near.
    return np.stack([distance < graph.distances[:, k] for k in ks], axis=1).astype(np.float64)


def _leave_out_sums(
    first: Float[np.ndarray, "patch dim"],
    second: Float[np.ndarray, "patch_b dim_b"],
    clusters: Shaped[np.ndarray, " patch"],
    ks: Sequence[int],
) -> Float64[np.ndarray, "set column"]:
    """Sums of `registered_pair` over all patches, and without each group; the pool is without the group too."""
    own = registered_pair(first, second, ks=ks)
    codes, count = leave_out_groups(clusters)
    counterparts, both = _counterparts(len(first)), np.tile(codes, 2)
    search = Search(reference=np.concatenate([first, second]), k=max(ks) + 1, left_out_with=both)
    halves = np.tile(own[:, :2], (2, 1)) / 2

    def contributions(queries: Int64[np.ndarray, " some"], graph: Neighbors) -> Float64[np.ndarray, "some column"]:
        return np.hstack([halves[queries], _retrieved(graph, counterparts[queries], ks) / 2])

    return leave_out_sums([search], contributions, both, count).totals


def _cosines(
    first: Float[np.ndarray, "patch dim"], second: Float[np.ndarray, "patch dim"]
) -> Float64[np.ndarray, " patch"]:
    cosines = np.empty(len(first))
    for start in range(0, len(first), 4096):
        a, b = (part[start : start + 4096].astype(np.float64) for part in (first, second))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines[start : start + 4096] = np.einsum("ij,ij->i", a, b) / lengths
    return cosines


def consistency_sums(
    features: Mapping[str, Float[np.ndarray, "_ _"]],
    clusters: Shaped[np.ndarray, " patch"],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    ks: Sequence[int] = (1, 3, 5, 10),
) -> ConsistencySums:
    """Compare registered patches for every pair of conditions.

    `median_over_pairs(sums.column())(sums.sums)` is the median cosine over pairs, of all patches and without each group
    of clusters, as `intervals.Figure` needs it. `pair_means` gives the values of each pair.

    Args:
        features: (patch, dim) features of the same patches, in the same order, by condition (scanner and stain).
        clusters: (patch,) what is independent of the rest: the specimen or region of each patch.
        pairs: Pairs of conditions; None is all of them.
        ks: Numbers of neighbors.

    Returns:
        The sums of each pair.

    Raises:
        TaskError: As `registered_pair`, and if there is no pair, a name is unknown, or the lengths differ.

    Examples:
        >>> conditions = {"a": np.eye(3), "b": np.eye(3) + 0.1}
        >>> consistency_sums(conditions, np.array(["s1", "s1", "s2"]), ks=[1]).sums[0].round(3).tolist()
        [[3.0, 2.976, 3.0]]
    """
    pairs = list(combinations(features, 2)) if pairs is None else list(pairs)
    unknown = sorted({name for pair in pairs for name in pair} - set(features))
    if not pairs or unknown or any(a == b for a, b in pairs):
        raise TaskError(f"consistency needs pairs of two of the conditions {sorted(features)}; got {pairs}")
    parts = [_leave_out_sums(features[a], features[b], clusters, ks) for a, b in pairs]
    return ConsistencySums(pairs=tuple(pairs), ks=tuple(ks), sums=np.stack(parts, axis=1))


def pair_means(sums: Num[np.ndarray, "draw pair column"]) -> Float64[np.ndarray, "draw pair statistic"]:
    """Return the mean cosine and retrieval accuracies of each pair.

    Args:
        sums: (draw, pair, column) sums from `consistency_sums`.

    Returns:
        (draw, pair, column - 1); NaN where there is no patch.

    Examples:
        >>> pair_means(np.array([[[2.0, 1.8, 1.0]]])).tolist()
        [[[0.9, 0.5]]]
    """
    patches = sums[:, :, :1]
    return np.divide(sums[:, :, 1:], patches, out=np.full(sums[:, :, 1:].shape, np.nan), where=patches > 0)


def median_over_pairs(
    column: int, among: Sequence[int] | None = None
) -> Callable[[Num[np.ndarray, "draw pair column"]], Float64[np.ndarray, " draw"]]:
    """Return a score of sums: the median over pairs of one column of `pair_means`.

    Args:
        column: From `ConsistencySums.column`.
        among: Indices of the pairs, such as those of two scanners and one stain; None is all.

    Examples:
        >>> median_over_pairs(0)(np.array([[[2.0, 1.8], [2.0, 1.4], [2.0, 1.0]]])).tolist()
        [0.7]
    """
    chosen = slice(None) if among is None else list(among)
    return lambda sums: np.median(pair_means(sums)[:, chosen, column], axis=1)
