"""Sums over rows from which linear CKA, Procrustes and ridge regression follow. They take one pass and add up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64

from g2l_core.errors import TaskError
from g2l_core.metrics.rows import require_finite, row_blocks
from g2l_core.metrics.statistics import require_aligned

Side = Literal[0, 1]


@dataclass(frozen=True, kw_only=True)
class CkaMoments:
    """Sums over rows z = [x | y] - center from which linear CKA follows exactly.

    Moments with the same center add up (`+`) in any order and can be taken away again (`-`), so they can be
    gathered batch by batch and slide by slide. 2,560 columns take 52 MB, however many the rows.
    """

    n: int
    """Number of rows."""
    dim_x: int
    """Number of x's columns."""
    center: Float64[np.ndarray, " dim"]
    total: Float64[np.ndarray, " dim"]
    """Sum of z."""
    gram: Float64[np.ndarray, "dim dim"]
    """Sum of z z'; its blocks are X'X, X'Y and Y'Y."""
    norm_total: Float64[np.ndarray, "2 dim"]
    """Sum of |x|^2 z, and of |y|^2 z."""
    norm_gram: Float64[np.ndarray, "2 2"]
    """Sums of |x|^4, |x|^2 |y|^2, |y|^4."""

    def __add__(self, other: "CkaMoments") -> "CkaMoments":
        """Return the moments of both sets of rows."""
        return self._combined(other, 1)

    def __sub__(self, other: "CkaMoments") -> "CkaMoments":
        """Return the moments of the rows that are not among those of `other`."""
        return self._combined(other, -1)

    def _combined(self, other: "CkaMoments", sign: int) -> "CkaMoments":
        if self.dim_x != other.dim_x or not np.array_equal(self.center, other.center):
            raise TaskError(
                f"moments combine only if taken about the same center, of the same widths; got x of width "
                f"{self.dim_x} and {other.dim_x} in {len(self.center)} and {len(other.center)} columns"
            )
        return replace(
            self,
            n=self.n + sign * other.n,
            total=self.total + sign * other.total,
            gram=self.gram + sign * other.gram,
            norm_total=self.norm_total + sign * other.norm_total,
            norm_gram=self.norm_gram + sign * other.norm_gram,
        )

    def columns(self, side: Side) -> slice:
        """Return the columns of x (0) or y (1)."""
        return slice(self.dim_x, None) if side else slice(0, self.dim_x)


def cka_center(x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row_y dim_y"]) -> Float64[np.ndarray, " dim"]:
    """Return the (dim_x + dim_y,) mean of [x | y], about which `cka_moments` loses no digits.

    The mean of a first batch serves as well.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> cka_center(np.array([[1.0], [3.0]]), np.array([[0.0, 1.0], [2.0, 1.0]])).tolist()
        [2.0, 1.0, 1.0]
    """
    require_aligned(x=len(x), y=len(y))
    return np.concatenate([x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)])


def cka_moments(
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row_y dim_y"],
    *,
    center: Float64[np.ndarray, " dim"] | None = None,
    device: str = "cpu",
) -> CkaMoments:
    """Gather the sums that linear CKA needs from a batch of rows, in float64 and in blocks of 4,096 rows.

    CKA does not change when x or y is shifted, but every sum does. Where the mean is large, the sums are
    large, and their differences, which are the result, lose their digits. With the mean m standard
    deviations away from zero, about m^-4 of the digits' precision is left. So pass a center.

    Args:
        x: (row, dim_x) features of one encoder; float16, float32 or float64.
        y: (row, dim_y) features of the other on the same patches.
        center: (dim_x + dim_y,) point about which to take the sums; see `cka_center`. None is the origin.
        device: Where the products are taken: "cpu" (NumPy), or a torch device. A GPU adds in another order, so the
            last digits differ.

    Raises:
        TaskError: If the lengths differ, the center's is not the width of both, or a row holds NaN or
            infinity.

    Examples:
        >>> moments = cka_moments(np.array([[1.0], [3.0]]), np.array([[2.0], [4.0]]))
        >>> moments.n, moments.total.tolist(), moments.gram.tolist()
        (2, [4.0, 6.0], [[10.0, 14.0], [14.0, 20.0]])
    """
    require_aligned(x=len(x), y=len(y))
    require_finite(x, "x")
    require_finite(y, "y")
    dim, dim_x = x.shape[1] + y.shape[1], x.shape[1]
    center = np.zeros(dim) if center is None else center
    require_aligned(columns=dim, center=len(center))
    on = _placing(device)
    of_side = on(np.repeat(np.eye(2), (dim_x, dim - dim_x), axis=0))
    sums = [on(np.zeros(shape)) for shape in ((dim,), (dim, dim), (2, dim), (2, 2))]
    for rows in row_blocks(len(x)):
        z = np.concatenate([x[rows], y[rows]], axis=1, dtype=np.float64)
        z -= center
        for total, part in zip(sums, _block_sums(on(z), of_side), strict=True):
            total += part
    total, gram, norm_total, norm_gram = (np.asarray(s if device == "cpu" else s.cpu()) for s in sums)
    return CkaMoments(
        n=len(x), dim_x=dim_x, center=center, total=total, gram=gram, norm_total=norm_total, norm_gram=norm_gram
    )


def _placing(device: str) -> Callable[[Float64[np.ndarray, "..."]], Any]:
    """Return a function that moves an array to the device: it stays as it is on the CPU, else becomes a tensor."""
    if device == "cpu":
        return lambda array: array
    import torch

    return lambda array: torch.from_numpy(array).to(device)


def _block_sums(z: Any, of_side: Any) -> tuple[Any, Any, Any, Any]:
    """Return `total`, `gram`, `norm_total`, `norm_gram` of some rows: NumPy arrays, or tensors on one device.

    Args:
        z: (rows, dim) centered features.
        of_side: (dim, 2): 1 where the column is x's, and where it is y's.
    """
    norms = (z * z) @ of_side
    return z.sum(0), z.T @ z, norms.T @ z, norms.T @ norms
