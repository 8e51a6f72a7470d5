"""Rows of features taken block by block, and checked."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from g2l_core.errors import TaskError

_BLOCK_ROWS = 4096


def row_blocks(rows: int) -> Iterator[slice]:
    """Slices that cut `rows` rows into blocks small enough to be cast to float64."""
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, start + _BLOCK_ROWS)


def require_finite(features: Float[np.ndarray, "row dim"], name: str) -> None:
    """Checks that every feature is a finite number.

    Args:
        features: Features of any float type.
        name: What to call them in the message.

    Raises:
        TaskError: Naming how many rows are not.
    """
    bad = sum(int((~np.isfinite(features[rows]).all(axis=1)).sum()) for rows in row_blocks(len(features)))
    if bad:
        raise TaskError(
            f"{bad:,} of {len(features):,} rows of {name} hold NaN or infinity; "
            "leave out the rows whose patch_status is not 0"
        )
