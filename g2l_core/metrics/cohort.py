"""CKA of cohorts that no single machine holds: the moments of each chunk are computed by its worker, then merged."""

from functools import reduce
from operator import add
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from jaxtyping import Bool, Float, Float64

from g2l_core.errors import TaskError
from g2l_core.metrics.moments import CkaMoments, cka_center, cka_moments
from g2l_core.metrics.statistics import require_aligned


def lazy_cka_moments(x: da.Array, y: da.Array, *, device: str = "cpu") -> Any:
    """Return a Dask graph of the moments of two encoders' features: one pass over the rows, sums merged in pairs.

    Each worker holds one chunk of rows and a few moments, which take 52 MB for 2,560 columns. The sums are about the
    mean of the first chunk.

    Args:
        x: (row, dim_x) features of one encoder, as from `store.arrays.dask_features`. A row that is all NaN, as that of
            an unreadable patch is, is left out of both.
        y: (row, dim_y) features of the other on the same patches. It is rechunked as x is.
        device: See `moments.cka_moments`; one that every worker has.

    Returns:
        A `dask.delayed.Delayed` whose `compute()` gives `CkaMoments`, for `similarity.linear_cka`. Computing raises
        TaskError as `cka_moments` does, e.g. for a row that is NaN in part.

    Raises:
        TaskError: If the lengths differ.

    Examples:
        >>> x = da.ones((6, 2), chunks=(3, 2))
        >>> lazy_cka_moments(x, 2 * x).compute().n
        6
    """
    require_aligned(x=len(x), y=len(y))
    y = y.rechunk((x.chunks[0], -1))
    chunks = list(zip(x.rechunk((x.chunks[0], -1)).to_delayed().ravel(), y.to_delayed().ravel(), strict=True))
    center = delayed(_center)(*chunks[0])
    parts = [delayed(_moments)(*chunk, center, device) for chunk in chunks]
    while len(parts) > 1:
        parts = [delayed(_merged)(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return delayed(_whole)(parts[0])


def _known(x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row dim_y"]) -> Bool[np.ndarray, " row"]:
    """Return which rows both encoders have."""
    return ~(np.isnan(x).all(axis=1) | np.isnan(y).all(axis=1))


def _center(x: Float[np.ndarray, "row dim_x"], y: Float[np.ndarray, "row dim_y"]) -> Float64[np.ndarray, " dim"]:
    """Return the mean of a chunk, or the origin where no patch could be read."""
    known = _known(x, y)
    return cka_center(x[known], y[known]) if known.any() else np.zeros(x.shape[1] + y.shape[1])


def _moments(
    x: Float[np.ndarray, "row dim_x"],
    y: Float[np.ndarray, "row dim_y"],
    center: Float64[np.ndarray, " dim"],
    device: str,
) -> CkaMoments | None:
    """Return the moments of a chunk, or None where no patch could be read."""
    known = _known(x, y)
    return cka_moments(x[known], y[known], center=center, device=device) if known.any() else None


def _merged(*parts: CkaMoments | None) -> CkaMoments | None:
    present = [part for part in parts if part is not None]
    return reduce(add, present) if present else None


def _whole(moments: CkaMoments | None) -> CkaMoments:
    if moments is None:
        raise TaskError("CKA needs at least 4 rows; no patch has features of both encoders")
    return moments
