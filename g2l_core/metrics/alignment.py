"""Similarity of two encoders beyond linear CKA (kernels, neighbors, rotation), and the effective rank of one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from g2l_core.errors import TaskError
from g2l_core.metrics.knn.neighbors import Neighbors
from g2l_core.metrics.moments import CkaMoments
from g2l_core.metrics.rows import require_finite, row_blocks
from g2l_core.metrics.similarity import kernel_cka
from g2l_core.metrics.statistics import require_aligned


def rbf_cka(
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row_y dim_y"],
    *,
    debiased: bool,
    bandwidth: float = 1.0,
    max_rows: int = 2048,
    seed: int,
) -> float:
    """Compute CKA with the kernels exp(-|x - x'|^2 / (2 s^2)), s being `bandwidth` times the median distance of rows.

    A small bandwidth compares which rows are near each other; with a large one, the value tends to linear CKA.

    Args:
        x: (row, dim_x) features of one encoder; any float type.
        y: (row, dim_y) features of the other on the same patches.
        debiased: See `similarity.linear_cka`.
        bandwidth: In median distances of each encoder's own rows.
        max_rows: Of more rows, this many are drawn without replacement. 2,048 rows take three kernels of 32 MiB.
        seed: Random seed of the draw.

    Returns:
        The alignment, 1 for equal kernels.

    Raises:
        TaskError: If the lengths differ, there are fewer than four rows, a row holds NaN, or half of all pairs are
            equal.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited (2019), section 4.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((20, 3))
        >>> round(rbf_cka(x, 2 * x[:, ::-1] + 1, debiased=True, seed=0), 6)
        1.0
    """
    require_aligned(x=len(x), y=len(y))
    if bandwidth <= 0:
        raise TaskError(f"the bandwidth is a positive multiple of the median distance; got {bandwidth}")
    if len(x) > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(len(x), max_rows, replace=False))
        x, y = x[rows], y[rows]
    return kernel_cka(_rbf_kernel(x, bandwidth, "x"), _rbf_kernel(y, bandwidth, "y"), debiased=debiased)


def _rbf_kernel(features: Float[np.ndarray, "row dim"], bandwidth: float, name: str) -> Float64[np.ndarray, "row row"]:
    require_finite(features, name)
    centered = features.astype(np.float64)
    centered -= centered.mean(axis=0)
    lengths = np.einsum("ij,ij->i", centered, centered)
    squares = centered @ centered.T
    squares *= -2
    squares += lengths + lengths[:, None]
    np.maximum(squares, 0.0, out=squares)
    np.fill_diagonal(squares, 0.0)
    if len(squares) < 4:
        raise TaskError(f"CKA needs at least 4 rows; got {len(squares)}")
    median = float(np.median(squares[np.triu_indices(len(squares), 1)]))
    if median == 0:
        raise TaskError(f"the median distance of the rows of {name} is 0: most are equal, so it sets no bandwidth")
    squares /= -2 * bandwidth**2 * median
    return np.exp(squares, out=squares)


def mutual_neighbors(one: Neighbors, other: Neighbors, k: Sequence[int]) -> Int64[np.ndarray, "row k"]:
    """Count how many of each row's first k neighbors in one encoder are among its first k in the other.

    Divided by k and averaged over rows, this is the mutual k-nearest-neighbor alignment: 1 where the neighbors
    agree, k / (rows to choose from) by chance.

    Args:
        one: From `nearest` on one encoder's features.
        other: From `nearest` on the other's, of the same rows and with the same groups left out.
        k: One or several numbers of neighbors.

    Returns:
        The (row, k) counts.

    Raises:
        TaskError: If the numbers of rows differ, or a k is larger than the number of neighbors.

    References:
        Huh et al., The Platonic Representation Hypothesis (2024), appendix A.

    Examples:
        >>> one = Neighbors(metric="cosine", indices=np.array([[1, 2]]), distances=np.zeros((1, 2)))
        >>> other = Neighbors(metric="cosine", indices=np.array([[2, 3]]), distances=np.zeros((1, 2)))
        >>> mutual_neighbors(one, other, [1, 2]).tolist()
        [[0, 1]]
    """
    require_aligned(one=len(one.indices), other=len(other.indices))
    available = min(one.indices.shape[1], other.indices.shape[1])
    if not k or min(k) < 1 or max(k) > available:
        raise TaskError(f"k must lie between 1 and the {available} neighbors found; got {list(k)}")
    shared = np.zeros((len(one.indices), len(k)), np.int64)
    for rows in row_blocks(len(shared)):
        same = one.indices[rows, : max(k), None] == other.indices[rows, None, : max(k)]
        for column, size in enumerate(k):
            shared[rows, column] = same[:, :size, :size].sum(axis=(1, 2))
    return shared


def procrustes_similarity(moments: CkaMoments) -> float:
    """Measure how well a rotation maps one encoder's features to the other's: the nuclear norm |X'Y|_*.

    X and Y are centered and scaled to |X| = |Y| = 1 (Frobenius), so that the orthogonal Procrustes distance
    min |X Q - Y|^2 over matrices Q with orthonormal rows or columns is 2 - 2 |X'Y|_*, between 0 and 2. The similarity
    does not fall to 0 for independent features unless rows by far outnumber the dimensions.

    Args:
        moments: From `moments.cka_moments`, about a center near the mean.

    Returns:
        Between 0 and 1.

    Raises:
        TaskError: If one encoder's features do not vary.

    References:
        Schönemann, A Generalized Solution of the Orthogonal Procrustes Problem (1966); as a measure of
        representations: Ding et al., Grounding Representation Similarity with Statistical Testing (2021), section 2.

    Examples:
        >>> from g2l_core.metrics.moments import cka_moments
        >>> x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> rotated = x @ np.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> round(procrustes_similarity(cka_moments(x, rotated)), 6)
        1.0
    """
    centered = centered_gram(moments)
    x, y = moments.columns(0), moments.columns(1)
    spread = float(np.trace(centered[x, x])) * float(np.trace(centered[y, y]))
    if spread <= 0:
        raise TaskError(f"Procrustes is undefined: the {moments.n:,} rows of x or of y are all alike")
    return float(np.linalg.svd(centered[x, y], compute_uv=False).sum()) / spread**0.5


def centered_gram(moments: CkaMoments) -> Float64[np.ndarray, "dim dim"]:
    """Return the (dim, dim) sums of products of [x | y] about their mean.

    Examples:
        >>> from g2l_core.metrics.moments import cka_moments
        >>> centered_gram(cka_moments(np.array([[1.0], [3.0]]), np.array([[2.0], [6.0]]))).tolist()
        [[2.0, 4.0], [4.0, 8.0]]
    """
    return moments.gram - np.outer(moments.total, moments.total) / moments.n


def effective_rank(features: Float[np.ndarray, "row dim"]) -> float:
    """Compute how many directions features use: exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j.

    s are the singular values of the centered features. The rank lies between 1 and the smaller of dim and rows - 1.

    Args:
        features: (row, dim) features; any float type.

    Raises:
        TaskError: If a row holds NaN, or all rows are alike.

    References:
        Roy & Vetterli, The Effective Rank: a Measure of Effective Dimensionality (2007), definition 1.

    Examples:
        >>> round(effective_rank(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 6)
        2.0
    """
    require_finite(features, "the features")
    mean = features.mean(axis=0, dtype=np.float64)
    gram = np.zeros((len(mean), len(mean)))
    for rows in row_blocks(len(features)):
        block = features[rows] - mean
        gram += block.T @ block
    values = np.linalg.eigvalsh(gram)
    if values[-1] <= 0:
        raise TaskError(f"the effective rank is undefined: all {len(features):,} rows are alike")
    singular = np.sqrt(values[values > len(mean) * np.finfo(np.float64).eps * values[-1]])
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def central_rows(
    x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row_y dim_y"], *, share: float = 0.01
) -> Bool[np.ndarray, " row"]:
    """Select the rows for a CKA that a few outliers cannot decide: all but those farthest from the median, in x or y.

    A row enters HSIC(K, K) with the fourth power of its distance from the mean, so that one pen mark or one blank
    patch among thousands can contribute most of the sum. For each encoder, the given share of rows (rounded down) that
    lie farthest from the columns' medians are left out. (Outliers would move the mean.)

    Args:
        x: (row, dim_x) features of one encoder.
        y: (row, dim_y) features of the other on the same patches.
        share: Fraction of rows to leave out for each encoder; at most twice as many are left out. 0 keeps all.

    Returns:
        (row,) whether to keep each row: pass x[kept] and y[kept] to `similarity.leave_out_each`.

    Raises:
        TaskError: If the lengths differ, a row holds NaN, or the share is outside [0, 0.5).

    Examples:
        >>> x = np.array([[0.0], [1.0], [2.0], [99.0]])
        >>> central_rows(x, x, share=0.25).tolist()
        [True, True, True, False]
    """
    require_aligned(x=len(x), y=len(y))
    if not 0 <= share < 0.5:
        raise TaskError(f"the share of rows to leave out lies in [0, 0.5); got {share}")
    kept = np.ones(len(x), bool)
    for name, features in (("x", x), ("y", y)):
        require_finite(features, name)
        center = np.median(features.astype(np.float32), axis=0).astype(np.float64)
        distances = np.concatenate(
            [np.linalg.norm(features[rows] - center, axis=1) for rows in row_blocks(len(features))]
        )
        kept[np.argsort(distances, kind="stable")[len(x) - int(share * len(x)) :]] = False
    return kept
