"""Robustness to the medical center: two indices on the same neighbor counts.

Of a query's k nearest neighbors, those of its own slide left out, these are counted:

- SS: same class, same center;
- SO: same class, other center (near because of the biology);
- OS: other class, same center (near because of the center).

Sums of these counts over queries give both indices. For their intervals each patient is left out, as a query and as a
neighbor (`knn.leave_out`).

Neighbors are searched among all rows, or in the paired design: within balanced subsets of two classes and two
centers. There SO and OS are equally likely by chance if each slide holds one class, so that 1/2 means that neither
dominates. (Where slides hold both classes, leaving out the query's slide removes some OS.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.leave_out import Search, leave_out_sums
from g2l_core.metrics.knn.neighbors import Neighbors, knn_predict
from g2l_core.metrics.patients import leave_out_groups
from g2l_core.metrics.probe import balanced_accuracy, confusion
from g2l_core.metrics.statistics import cluster_codes, require_aligned
from g2l_core.rng import keyed_generator


def robustness_counts(
    neighbors: Neighbors,
    biological_classes: Shaped[np.ndarray, " row"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    *,
    k: int,
) -> Int64[np.ndarray, "row 3"]:
    """Count each row's neighbors of kind SS, SO and OS among the first k.

    Args:
        neighbors: From `nearest` with `queries` None and the slides as `groups`.
        biological_classes: (row,) tissue class of each row.
        medical_centers: (row,) center of each row.
        k: At most the number of neighbors in `neighbors`.

    Returns:
        (row, 3): SS, SO and OS.

    Raises:
        TaskError: If the lengths differ, there is one class or one center only, k is out of range, or no
            neighbor at all is of its query's center, as when every center has a single slide. Both indices are
            then meaningless.

    Examples:
        >>> from g2l_core.metrics.knn.neighbors import nearest
        >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
        >>> graph = nearest(features, None, 2)
        >>> classes, centers = np.array(["t", "t", "n", "n"]), np.array([1, 2, 1, 2])
        >>> robustness_counts(graph, classes, centers, k=2).tolist()
        [[0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 1, 1]]
    """
    require_aligned(rows=len(neighbors.indices), classes=len(biological_classes), centers=len(medical_centers))
    if not 1 <= k <= neighbors.indices.shape[1]:
        raise TaskError(f"k must lie between 1 and the {neighbors.indices.shape[1]} neighbors found; got {k}")
    for name, values in (("class", biological_classes), ("medical center", medical_centers)):
        if len(np.unique(values)) < 2:
            raise TaskError(f"robustness needs two of each at least; every row has the {name} {values[0]}")
    near = neighbors.indices[:, :k]
    same_class = biological_classes[near] == biological_classes[:, None]
    same_center = medical_centers[near] == medical_centers[:, None]
    if not same_center.any():
        raise TaskError(
            "no neighbor is of its query's medical center; "
            "as those of the same slide are left out, some center needs two slides at least"
        )
    return _count_kinds(same_class, same_center)


def robustness_sums(
    features: Float[np.ndarray, "row dim"],
    biological_classes: Shaped[np.ndarray, " row"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    slides: Shaped[np.ndarray, " slide_row"],
    clusters: Shaped[np.ndarray, " cluster_row"],
    *,
    ks: Sequence[int],
) -> tuple[Mapping[int, Float64[np.ndarray, "set 3"]], Mapping[int, float]]:
    """Count the neighbors of other slides by the cosine: of all rows, then without each group of patients.

    Args:
        features: (row, dim) features of any float type, not normalized.
        biological_classes: (row,) tissue class of each row.
        medical_centers: (row,) center of each row.
        slides: (row,) slide of each row, whose rows are no neighbors.
        clusters: (row,) patient of each row, which is left out with its queries and as a neighbor.
        ks: Numbers of neighbors.

    Returns:
        For each k the SS, SO and OS, and the share of rows with a neighbor of kind SO or OS.

    Raises:
        TaskError: As `robustness_counts` and `nearest`.
    """
    groups, count = leave_out_groups(clusters)
    search = Search(reference=features, k=max(ks), groups=slides, left_out_with=groups)

    sums = leave_out_sums([search], partial(_kinds, biological_classes, medical_centers, ks), groups, count)
    for k in ks:
        robustness_counts(sums.first[0], biological_classes, medical_centers, k=k)  # refuses what has no index
    totals, base = (table.reshape(len(table), len(ks), 3) for table in (sums.totals, sums.base))
    support = base[:, :, 1:].any(axis=2).mean(axis=0)
    return {k: totals[:, i] for i, k in enumerate(ks)}, dict(zip(ks, support.tolist(), strict=True))


def _kinds(
    classes: Shaped[np.ndarray, " row"],
    centers: Shaped[np.ndarray, " row"],
    ks: Sequence[int],
    queries: Int64[np.ndarray, " query"],
    graph: Neighbors,
) -> Int64[np.ndarray, "query column"]:
    """SS, SO and OS of some queries at each k."""
    same_class = classes[graph.indices] == classes[queries, None]
    same_center = centers[graph.indices] == centers[queries, None]
    return np.hstack([_count_kinds(same_class[:, :k], same_center[:, :k]) for k in ks])


def _count_kinds(
    same_class: Bool[np.ndarray, "row k"], same_center: Bool[np.ndarray, "row k"]
) -> Int64[np.ndarray, "row 3"]:
    kinds = (same_class & same_center, same_class & ~same_center, ~same_class & same_center)
    return np.stack([kind.sum(axis=1) for kind in kinds], axis=1)


def ratio_index(totals: Num[np.ndarray, "draw 3"]) -> Float64[np.ndarray, " draw"]:
    """Compute the ratio of neighbors of the same class and of the same center: (SS + SO) / (SS + OS).

    Above 1, the biology dominates. It has no upper bound, and depends on k and on how many rows each class
    and center has.

    Args:
        totals: (draw, 3) SS, SO and OS, summed over the queries of each draw.

    Returns:
        The (draw,) index; NaN where no neighbor is of the same center.

    References:
        de Jong et al., Current Pathology Foundation Models are unrobust to Medical Center Differences
        (2025), arXiv 2501.18055.

    Examples:
        >>> ratio_index(np.array([[2, 4, 1]])).tolist()
        [2.0]
    """
    return _ratio(totals[:, 0] + totals[:, 1], totals[:, 0] + totals[:, 2])


def pathorob_index(totals: Num[np.ndarray, "draw 3"]) -> Float64[np.ndarray, " draw"]:
    """Compute PathoROB's robustness index, SO / (SO + OS), between 0 and 1.

    Args:
        totals: (draw, 3) SS, SO and OS, summed over the queries of each draw.

    Returns:
        The (draw,) index; NaN where all neighbors share both class and center, or neither.

    References:
        Kömen et al., Towards Robust Foundation Models for Digital Pathology (2025), arXiv 2507.17845.

    Examples:
        >>> pathorob_index(np.array([[2, 3, 1]])).tolist()
        [0.75]
    """
    return _ratio(totals[:, 1], totals[:, 1] + totals[:, 2])


def _ratio(above: Num[np.ndarray, " draw"], below: Num[np.ndarray, " draw"]) -> Float64[np.ndarray, " draw"]:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A balanced subset: two classes in two centers, equally many rows of each of the four strata."""

    classes: Shaped[np.ndarray, "2"]
    centers: Shaped[np.ndarray, "2"]
    rows: Int64[np.ndarray, " row"]
    """Ascending."""


@dataclass(frozen=True, kw_only=True)
class PairedCounts:
    """Neighbors of each kind in the paired design, for one k."""

    counts: Int64[np.ndarray, "row 3"]
    """SS, SO and OS of each row, summed over the combinations that hold it."""
    totals: Float64[np.ndarray, "set 3"]
    """SS, SO and OS of all rows; then without each group of clusters (`patients.leave_out_groups`)."""
    combinations: Int64[np.ndarray, "combination 3"]
    """SS, SO and OS summed over the rows of each combination."""
    occurrences: int
    """Number of rows, each counted once for each combination that holds it."""
    informative: int
    """Number of those that have a neighbor of kind SO or OS among the k."""
    class_accuracy: float
    """Balanced accuracy of the k nearest neighbors' vote for the class, the mean over combinations."""

    @property
    def support(self) -> float:
        """The share of occurrences that the index rests on. An index with little support is uncertain."""
        return self.informative / self.occurrences


def paired_combinations(
    biological_classes: Shaped[np.ndarray, " row"],
    medical_centers: Shaped[np.ndarray, " center_row"],
    slides: Shaped[np.ndarray, " slide_row"],
    *,
    k: int,
    rows_per_stratum: int | None = None,
    seed: int,
) -> tuple[Combination, ...]:
    """Combine all pairs of classes with all pairs of centers into balanced subsets: PathoROB's 2x2 design.

    A stratum is the rows of one class in one center. It is used if it has at least two slides; otherwise a query
    in it has no neighbor of kind SS. The four strata of a combination contribute as many rows as the smallest has,
    taken from their slides by turns, in an order that depends on the seed and the stratum's name.

    Args:
        biological_classes: (row,) tissue class of each row.
        medical_centers: (row,) center of each row.
        slides: (row,) slide (or patient) of each row.
        k: Combinations in which some query would have fewer than k rows of other slides are left out.
        rows_per_stratum: Maximum number of rows of each stratum, at least 2; None is no limit.
        seed: Random seed of the draw of rows.

    Returns:
        The combinations.

    Raises:
        TaskError: If the lengths differ, a number is too small, or no combination is left.

    References:
        Kömen et al. (2025), arXiv 2507.17845, section on the robustness index (TCGA-2x2).

    Examples:
        >>> classes, centers = np.repeat(["n", "t"], 4), np.tile([1, 1, 2, 2], 2)
        >>> design = paired_combinations(classes, centers, np.arange(8), k=3, seed=0)
        >>> len(design), design[0].rows.tolist()
        (1, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    require_aligned(classes=len(biological_classes), centers=len(medical_centers), slides=len(slides))
    if k < 1 or (rows_per_stratum is not None and rows_per_stratum < 2):
        raise TaskError(f"k is at least 1 and rows_per_stratum at least 2; got {k} and {rows_per_stratum}")
    strata = _strata(biological_classes, medical_centers, slides, seed)
    class_pairs = combinations(np.unique(biological_classes), 2)
    center_pairs = list(combinations(np.unique(medical_centers), 2))
    design = []
    for classes, centers in product(class_pairs, center_pairs):
        names = list(product(classes, centers))
        if all(name in strata for name in names):
            size = min([len(strata[name]) for name in names] + [rows_per_stratum or len(slides)])
            rows = np.sort(np.concatenate([strata[name][:size] for name in names]))
            if len(rows) - np.unique(slides[rows], return_counts=True)[1].max() >= k:
                design.append(Combination(classes=np.array(classes), centers=np.array(centers), rows=rows))
    if not design:
        raise TaskError(
            "the paired design needs two classes that both occur in two centers, on two slides at least in each, "
            f"with {k} rows of other slides for every query; no four strata do (use a smaller k, or the unpaired index)"
        )
    return tuple(design)


def _strata(
    classes: Shaped[np.ndarray, " row"],
    centers: Shaped[np.ndarray, " row"],
    slides: Shaped[np.ndarray, " row"],
    seed: int,
) -> dict[tuple[object, object], Int64[np.ndarray, " member"]]:
    """Return the rows of each (class, center) on at least two slides, in the order in which they are taken."""
    strata = {}
    for name in product(np.unique(classes), np.unique(centers)):
        rows = np.flatnonzero((classes == name[0]) & (centers == name[1]))
        if len(np.unique(slides[rows])) > 1:
            drawn = keyed_generator("paired design", seed, *map(str, name)).permutation(rows)
            strata[name] = drawn[np.argsort(_turns(slides[drawn]), kind="stable")]
    return strata


def _turns(slides: Shaped[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """Return how many rows of the same slide come before each row."""
    codes, _ = cluster_codes(slides)
    order = np.argsort(codes, kind="stable")
    turns = np.empty(len(codes), np.int64)
    turns[order] = np.arange(len(codes)) - np.searchsorted(codes[order], codes[order])
    return turns


def paired_counts(
    features: Float[np.ndarray, "row dim"],
    biological_classes: Shaped[np.ndarray, " row"],
    medical_centers: Shaped[np.ndarray, " row"],
    slides: Shaped[np.ndarray, " row"],
    design: Sequence[Combination],
    *,
    ks: Sequence[int],
    clusters: Shaped[np.ndarray, " row"] | None = None,
) -> Mapping[int, PairedCounts]:
    """Count neighbors by the cosine within each combination, those of the query's slide left out.

    The index of the design is `pathorob_index` of the summed `counts`: evidence is pooled over combinations, and
    every neighbor of kind SO or OS has the same weight. croma (1.0) does the same, but lets a query with
    fewer than k rows of other slides vote with fewer, which is an error here. PathoROB's published code keeps
    only the last combination of a patch that is in several, so it agrees where no two share a patch.

    Args:
        features: (row, dim) features of any float type, not normalized.
        biological_classes: (row,) tissue class of each row.
        medical_centers: (row,) center of each row.
        slides: (row,) slide (or patient) of each row.
        design: From `paired_combinations`, for the greatest of `ks`.
        ks: Numbers of neighbors.
        clusters: (row,) patient of each row, for `PairedCounts.totals`; None: the slides.

    Returns:
        The counts at each k.

    Raises:
        TaskError: If there is no k or no combination, a query has too few rows to choose from, or a row is
            zero or NaN.

    Examples:
        >>> classes, centers, slides = np.repeat(["n", "t"], 4), np.tile([1, 1, 2, 2], 2), np.arange(8)
        >>> features = np.stack([classes == "n", classes == "t", centers == 1], axis=1).astype(float)
        >>> design = paired_combinations(classes, centers, slides, k=3, seed=0)
        >>> counts = paired_counts(features, classes, centers, slides, design, ks=[3])[3].counts
        >>> counts[0].tolist(), pathorob_index(counts.sum(axis=0, keepdims=True)).tolist()
        ([1, 2, 0], [1.0])
    """
    if not ks or not design:
        raise TaskError(f"paired counts need a k and a combination; got ks {list(ks)}, {len(design)} combinations")
    groups, count = leave_out_groups(slides if clusters is None else clusters)
    parts = []
    for rows in (combination.rows for combination in design):
        of_rows = features[rows], biological_classes[rows], medical_centers[rows], slides[rows], groups[rows]
        parts.append(_within(*of_rows, count, ks))
    return {k: _pooled([part[k] for part in parts], design, len(features)) for k in ks}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One combination at one k."""

    counts: Int64[np.ndarray, "row 3"]
    totals: Float64[np.ndarray, "set 3"]
    class_accuracy: float


def _within(
    features: Float[np.ndarray, "row dim"],
    classes: Shaped[np.ndarray, " row"],
    centers: Shaped[np.ndarray, " row"],
    slides: Shaped[np.ndarray, " row"],
    groups: Int64[np.ndarray, " row"],
    count: int,
    ks: Sequence[int],
) -> dict[int, _Part]:
    """Return for each k the counts within one combination, and the balanced accuracy of the class's vote."""
    search = Search(reference=features, k=max(ks), groups=slides, left_out_with=groups)

    sums = leave_out_sums([search], partial(_kinds, classes, centers, ks), groups, count)
    return {
        k: _Part(
            counts=sums.base[:, 3 * i : 3 * i + 3].astype(np.int64),
            totals=sums.totals[:, 3 * i : 3 * i + 3],
            class_accuracy=float(balanced_accuracy(confusion(classes, knn_predict(sums.first[0], classes, k=k)))[0]),
        )
        for i, k in enumerate(ks)
    }


def _pooled(parts: Sequence[_Part], design: Sequence[Combination], rows: int) -> PairedCounts:
    counts = np.zeros((rows, 3), np.int64)
    for combination, part in zip(design, parts, strict=True):
        counts[combination.rows] += part.counts
    return PairedCounts(
        counts=counts,
        totals=np.sum([part.totals for part in parts], axis=0),
        combinations=np.stack([part.counts.sum(axis=0) for part in parts]),
        occurrences=sum(len(part.counts) for part in parts),
        informative=sum(int(part.counts[:, 1:].any(axis=1).sum()) for part in parts),
        class_accuracy=float(np.mean([part.class_accuracy for part in parts])),
    )
