"""Few-shot classification by prototypes, and retrieval of patches of the same class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import Neighbors
from g2l_core.metrics.rows import require_finite, row_blocks
from g2l_core.metrics.statistics import cluster_codes, require_aligned


def draw_shots(
    labels: Shaped[np.ndarray, " row"], patients: Shaped[np.ndarray, " patient_row"], shots: int, *, seed: int
) -> Int64[np.ndarray, " shot"]:
    """Draw rows of each class, from different patients where there are enough.

    The patients of a class are taken in random order, one row of each at random, then a second one of each, and so on,
    because rows of one patient are similar.

    Args:
        labels: (row,) class of each row.
        patients: (row,) patient of each.
        shots: Number of rows of each class.
        seed: Random seed.

    Returns:
        The (class x shots,) rows, class by class.

    Raises:
        TaskError: If the lengths differ, shots is below 1, or a class has fewer rows.

    Examples:
        >>> labels, patients = np.array([0, 0, 0, 1, 1, 1]), np.array(["a", "a", "b", "a", "b", "b"])
        >>> rows = draw_shots(labels, patients, 2, seed=0)
        >>> labels[rows].tolist(), patients[rows].tolist()
        ([0, 0, 1, 1], ['a', 'b', 'a', 'b'])
    """
    require_aligned(labels=len(labels), patients=len(patients))
    if shots < 1:
        raise TaskError(f"shots is at least 1; got {shots}")
    rng = np.random.default_rng(seed)
    codes, count = cluster_codes(patients)
    order, drawn = rng.permutation(count), []
    for name in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == name))
        if len(rows) < shots:
            raise TaskError(f"class {name} has {len(rows)} rows, fewer than the {shots} shots wanted")
        rows = rows[np.argsort(order[codes[rows]], kind="stable")]
        _, first, sizes = np.unique(order[codes[rows]], return_index=True, return_counts=True)
        turn = np.arange(len(rows)) - np.repeat(first, sizes)
        drawn.append(rows[np.argsort(turn, kind="stable")[:shots]])
    return np.concatenate(drawn)


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """The means of the classes among centered rows of unit length."""

    classes: Shaped[np.ndarray, " class"]
    center: Float64[np.ndarray, " dim"]
    means: Float64[np.ndarray, "class dim"]

    def similarities(self, features: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, "row class"]:
        """Return minus the squared distance of each row, centered and of unit length, to each prototype."""
        similarities = np.empty((len(features), len(self.classes)))
        for rows in row_blocks(len(features)):
            unit = _centered_unit(features[rows], self.center)
            similarities[rows] = 2 * unit @ self.means.T - 1 - (self.means**2).sum(axis=1)
        return similarities

    def predict(self, features: Float[np.ndarray, "row dim"]) -> Shaped[np.ndarray, " row"]:
        """Return the (row,) class of the nearest prototype."""
        return self.classes[self.similarities(features).argmax(axis=1)]


def _centered_unit(
    features: Float[np.ndarray, "row dim"], center: Float64[np.ndarray, " dim"]
) -> Float64[np.ndarray, "row dim"]:
    centered = features - center
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    return centered / np.where(lengths > 0, lengths, 1.0)


def prototypes(
    features: Float[np.ndarray, "row dim"],
    labels: Shaped[np.ndarray, " label"],
    center: Float64[np.ndarray, " center_dim"] | None = None,
) -> Prototypes:
    """Fit SimpleShot's classifier "CL2N": center, scale to unit length, average by class.

    With u = (x - center) / |x - center|, the prototype of a class is the mean of u over its shots.

    Args:
        features: (shot, dim) features of the shots.
        labels: (shot,) class of each.
        center: (dim,) mean of the rows that the shots were drawn from, as in the paper. None: the mean of the shots.

    Returns:
        The prototypes, which predict.

    Raises:
        TaskError: If the lengths differ, a row holds NaN, or there is one class only.

    References:
        Wang et al., SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning (2019), section 3.

    Examples:
        >>> shots = np.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0], [4.0, 0.0]])
        >>> prototypes(shots, np.array(["a", "a", "b", "b"])).predict(np.array([[1.0, 9.0], [5.0, 1.0]])).tolist()
        ['a', 'b']
    """
    require_aligned(features=len(features), labels=len(labels))
    require_finite(features, "the shots")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TaskError(f"prototypes need two classes at least; all {len(labels):,} labels are {classes[0]}")
    center = features.mean(axis=0, dtype=np.float64) if center is None else center
    require_aligned(dim=features.shape[1], center=len(center))
    unit = _centered_unit(features, center)
    means = np.stack([unit[codes == code].mean(axis=0) for code in range(len(classes))])
    return Prototypes(classes=classes, center=center, means=means)


def retrieval_sums(
    neighbors: Neighbors,
    labels: Shaped[np.ndarray, " row"],
    k: Sequence[int],
    query_labels: Shaped[np.ndarray, " query"] | None = None,
) -> Float64[np.ndarray, "query column"]:
    """Score the retrieval of each query: whether a row of its class is among the first k, and the average precision.

    Average precision at k is the mean of the precisions at the ranks, up to k, of rows of the query's class; 0 where
    there is none. Averaged over queries, the columns are the top-k hit rates and mAP@k.

    Args:
        neighbors: From `nearest` with `queries` None, the slides or patients left out as `groups`.
        labels: (row,) class of each row.
        k: One or several numbers of neighbors.
        query_labels: (query,) class of each query; None: every row is one, in the order of the rows.

    Returns:
        (query, 2 len(k)): the hits at each k, then the average precisions at each k.

    Raises:
        TaskError: If the lengths differ, or a k is larger than the number of neighbors.

    References:
        Manning et al., Introduction to Information Retrieval (2008), section 8.4; over the relevant rows among the
        first k, as the total of relevant rows depends on the archive.

    Examples:
        >>> graph = Neighbors(metric="cosine", indices=np.array([[1, 2], [2, 0], [1, 0]]), distances=np.zeros((3, 2)))
        >>> retrieval_sums(graph, np.array(["a", "b", "a"]), [1, 2]).tolist()
        [[0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.5]]
    """
    wanted = labels if query_labels is None else query_labels
    require_aligned(queries=len(neighbors.indices), labels=len(wanted))
    available = neighbors.indices.shape[1]
    if not k or min(k) < 1 or max(k) > available:
        raise TaskError(f"k must lie between 1 and the {available} neighbors found; got {list(k)}")
    hits = (labels[neighbors.indices] == wanted[:, None]).astype(np.float64)
    counts = hits.cumsum(axis=1)
    gained = (hits * counts / np.arange(1, available + 1)).cumsum(axis=1)
    ends = np.asarray(k) - 1
    precisions = gained[:, ends] / np.maximum(counts[:, ends], 1)
    return np.concatenate([(counts[:, ends] > 0).astype(np.float64), precisions], axis=1)
