"""Agreement of features of the same tissue between scanners and stains: registered patches, as in PLISM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Float64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import nearest
from g2l_core.metrics.statistics import cluster_sums, require_aligned


@dataclass(frozen=True, kw_only=True)
class ConsistencySums:
    """Sums over the patches of each cluster, for every pair of conditions: `statistics.of_sums` takes them."""

    pairs: tuple[tuple[str, str], ...]
    ks: tuple[int, ...]
    sums: Float64[np.ndarray, "cluster pair column"]
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
    pool = np.concatenate([first, second])
    graph = nearest(pool, None, max(ks) + 1)
    counterpart = (np.arange(2 * count) + count) % (2 * count)
    own = graph.indices == counterpart[:, None]
    distance = np.where(own.any(axis=1), np.where(own, graph.distances, 0).sum(axis=1), np.inf)
    hits = [distance < graph.distances[:, k] for k in ks]  # the counterpart is one of the k + 1: k - 1 others at most
    both = [(hit[:count].astype(np.float64) + hit[count:]) / 2 for hit in hits]
    return np.column_stack([np.ones(count), _cosines(first, second), *both])


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

    `statistics.of_sums(median_over_pairs(sums.column()), sums.sums)` is the median cosine over pairs, ready for
    a bootstrap over the clusters. `pair_means` gives the values of each pair.

    Args:
        features: (patch, dim) features of the same patches, in the same order, by condition (scanner and stain).
        clusters: (patch,) what is independent of the rest: the specimen or region of each patch.
        pairs: Pairs of conditions; None is all of them.
        ks: Numbers of neighbors.

    Returns:
        The sums of each cluster and pair.

    Raises:
        TaskError: As `registered_pair`, and if there is no pair, a name is unknown, or the lengths differ.

    Examples:
        >>> conditions = {"a": np.eye(3), "b": np.eye(3) + 0.1}
        >>> consistency_sums(conditions, np.array(["s1", "s1", "s2"]), ks=[1]).sums.round(3).tolist()
        [[[2.0, 1.984, 2.0]], [[1.0, 0.992, 1.0]]]
    """
    pairs = list(combinations(features, 2)) if pairs is None else list(pairs)
    unknown = sorted({name for pair in pairs for name in pair} - set(features))
    if not pairs or unknown or any(a == b for a, b in pairs):
        raise TaskError(f"consistency needs pairs of two of the conditions {sorted(features)}; got {pairs}")
    parts = [cluster_sums(registered_pair(features[a], features[b], ks=ks), clusters) for a, b in pairs]
    return ConsistencySums(pairs=tuple(pairs), ks=tuple(ks), sums=np.stack(parts, axis=1))


def pair_means(sums: Num[np.ndarray, "draw pair column"]) -> Float64[np.ndarray, "draw pair statistic"]:
    """Return the mean cosine and retrieval accuracies of each pair over the patches drawn.

    Args:
        sums: (draw, pair, column) sums, added up over the clusters of each draw.

    Returns:
        (draw, pair, column - 1); NaN where a draw has no patch.

    Examples:
        >>> pair_means(np.array([[[2.0, 1.8, 1.0]]])).tolist()
        [[[0.9, 0.5]]]
    """
    patches = sums[:, :, :1]
    return np.divide(sums[:, :, 1:], patches, out=np.full(sums[:, :, 1:].shape, np.nan), where=patches > 0)


def median_over_pairs(
    column: int, among: Sequence[int] | None = None
) -> Callable[[Num[np.ndarray, "draw pair column"]], Float64[np.ndarray, " draw"]]:
    """Return the score that `statistics.of_sums` needs for the median over pairs of one column of `pair_means`.

    Args:
        column: From `ConsistencySums.column`.
        among: Indices of the pairs, such as those of two scanners and one stain; None is all.

    Examples:
        >>> median_over_pairs(0)(np.array([[[2.0, 1.8], [2.0, 1.4], [2.0, 1.0]]])).tolist()
        [0.7]
    """
    chosen = slice(None) if among is None else list(among)
    return lambda sums: np.median(pair_means(sums)[:, chosen, column], axis=1)
