"""Likeness of two encoders beyond linear CKA: by kernels, by neighbors, by rotation; and the rank of one."""

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
    """CKA with the kernels exp(-|x - x'|^2 / (2 s^2)), s being `bandwidth` times the median distance of two rows.

    A small bandwidth asks whether near rows are the same ones, a large one tends to linear CKA.

    Args:
        x: Features of one encoder; any float type.
        y: Features of the other on the same patches.
        debiased: See `similarity.linear_cka`.
        bandwidth: In median distances, those of each encoder for itself.
        max_rows: Of more rows, so many are drawn without replacement: three kernels of 32 MiB for 2,048.
        seed: Draws them.

    Raises:
        TaskError: If the lengths differ, there are fewer than four rows, a row holds NaN, or half of all pairs are
            equal.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited (2019), section 4.
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
    """How many of each row's first k neighbors in one encoder are among its first k in the other.

    Divided by k and averaged over rows, this is the mutual k-nearest-neighbor alignment: 1 where the neighbors
    agree, k / (rows to choose from) by chance.

    Args:
        one: From `nearest` on one encoder's features.
        other: On the other's, of the same rows and with the same groups left out.
        k: One or several.

    Raises:
        TaskError: If the rows differ in number, or a k is outside what was found.

    References:
        Huh et al., The Platonic Representation Hypothesis (2024), appendix A.
    """
    require_aligned(one=len(one.indices), other=len(other.indices))
    found = min(one.indices.shape[1], other.indices.shape[1])
    if not k or min(k) < 1 or max(k) > found:
        raise TaskError(f"k must lie between 1 and the {found} neighbors found; got {list(k)}")
    shared = np.zeros((len(one.indices), len(k)), np.int64)
    for rows in row_blocks(len(shared)):
        same = one.indices[rows, : max(k), None] == other.indices[rows, None, : max(k)]
        for column, size in enumerate(k):
            shared[rows, column] = same[:, :size, :size].sum(axis=(1, 2))
    return shared


def procrustes_similarity(moments: CkaMoments) -> float:
    """How much of one encoder's features a rotation brings onto the other's: the nuclear norm of X'Y.

    Both are centered and scaled to |X| = |Y| = 1 (Frobenius), so that the orthogonal Procrustes distance
    min |X Q - Y|^2 over matrices Q with orthonormal rows or columns is 2 - 2 times this, from 0 to 2. It does not
    fall to 0 for independent features unless rows by far outnumber the dimensions.

    Args:
        moments: From `similarity.cka_moments`, about a center near the mean.

    Returns:
        Between 0 and 1.

    Raises:
        TaskError: If one encoder's features do not vary.

    References:
        Schönemann, A Generalized Solution of the Orthogonal Procrustes Problem (1966); as a measure of
        representations: Ding et al., Grounding Representation Similarity with Statistical Testing (2021), section 2.
    """
    centered = centered_gram(moments)
    x, y = moments.columns(0), moments.columns(1)
    spread = float(np.trace(centered[x, x])) * float(np.trace(centered[y, y]))
    if spread <= 0:
        raise TaskError(f"Procrustes is undefined: the {moments.n:,} rows of x or of y are all alike")
    return float(np.linalg.svd(centered[x, y], compute_uv=False).sum()) / spread**0.5


def centered_gram(moments: CkaMoments) -> Float64[np.ndarray, "dim dim"]:
    """The sums of products of [x | y] about their mean."""
    return moments.gram - np.outer(moments.total, moments.total) / moments.n


def effective_rank(features: Float[np.ndarray, "row dim"]) -> float:
    """The exponential of the entropy of the singular values, which are scaled to sum to 1; of centered features.

    Between 1 and the smaller of dim and rows - 1: how many directions the features really use.

    Args:
        features: Any float type.

    Raises:
        TaskError: If a row holds NaN, or all rows are alike.

    References:
        Roy & Vetterli, The Effective Rank: a Measure of Effective Dimensionality (2007), definition 1.
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
    """The rows for a CKA that a few outliers cannot decide: all but those farthest from the median, in x or in y.

    A row enters HSIC(K, K) with the fourth power of its distance from the mean, so that one pen mark or one blank
    patch among thousands can give most of the sum. Of each encoder, the `share` of rows (rounded down) that lie
    farthest from the median of each column are left out; the median, as the outliers would move the mean.

    Args:
        x: Features of one encoder.
        y: Features of the other on the same patches.
        share: To leave out by each encoder; 2 `share` go at most. 0 keeps all.

    Returns:
        Whether to keep each row: give x[kept] and y[kept] to `similarity.leave_out_each`.

    Raises:
        TaskError: If the lengths differ, a row holds NaN, or the share is outside [0, 0.5).
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
