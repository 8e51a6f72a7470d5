"""Rows of features taken block by block, and checked."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from g2l_core.errors import TaskError

T = TypeVar("T")

_BLOCK_ROWS = 4096
_THREAD_ROWS = 256
"""Their float64 copies stay in the cache, which makes passes over them two to five times as fast as over 4,096. Not a
share of the threads, which would change the order of sums."""
THREADS = min(8, os.cpu_count() or 1)


def row_blocks(rows: int, size: int | None = None) -> Iterator[slice]:
    """Slices that cut `rows` rows into blocks, small enough to be cast to float64 or of the size given."""
    size = size or _BLOCK_ROWS
    for start in range(0, rows, size):
        yield slice(start, start + size)


def over_blocks(function: Callable[[slice], T], rows: int) -> list[T]:
    """What a function gives of each block, in order; blocks are taken by several threads.

    For work of NumPy that is bound by memory: products of matrices have threads of their own.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, row_blocks(rows, _THREAD_ROWS)))


def require_finite(features: Float[np.ndarray, "row dim"], name: str) -> None:
    """Checks that every feature is a finite number.

    Args:
        features: Features of any float type.
        name: What to call them in the message.

    Raises:
        TaskError: Naming how many rows are not.
    """
    bad = sum(over_blocks(lambda rows: int((~np.isfinite(features[rows]).all(axis=1)).sum()), len(features)))
    if bad:
        raise TaskError(
            f"{bad:,} of {len(features):,} rows of {name} hold NaN or infinity; "
            "leave out the rows whose patch_status is not 0"
        )
