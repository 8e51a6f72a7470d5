"""Read some rows of a slide's features: shard by shard, from the first chunk that is needed to the last."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from g2l_core.store import schema
from g2l_core.store.slide import StoredSlide
from g2l_core.types import Features


def pieces(
    slide: StoredSlide, rows: Int64[np.ndarray, "_"] | None
) -> Iterator[tuple[int, int, Int64[np.ndarray, "_"] | None]]:
    """(Start, stop, rows between them or None for all) of every shard of which something is taken."""
    for shard in slide.shards([0]):
        if rows is None:
            yield shard.start, shard.stop, None
            continue
        inside = rows[np.searchsorted(rows, shard.start) : np.searchsorted(rows, shard.stop)]
        if len(inside):
            start, stop = _span(inside, shard.stop)
            yield start, stop, inside


def _span(rows: Int64[np.ndarray, "_"], limit: int) -> tuple[int, int]:
    """The stored rows from the first chunk to the last that hold some rows of a shard, which ends at `limit`."""
    first, last = int(rows[0]) // schema.CHUNK_ROWS, int(rows[-1]) // schema.CHUNK_ROWS
    return first * schema.CHUNK_ROWS, min((last + 1) * schema.CHUNK_ROWS, limit)


def read_selected(slide: StoredSlide, encoder: str, rows: Int64[np.ndarray, "_"] | None, *, view: int) -> Features:
    """The features of some stored rows of a slide in ascending order, or of all, float16 (rows, dim).

    Raises:
        StoreCorruptError: They are not what was written.
    """
    if rows is None:
        return slide.read_rows(encoder, 0, len(slide), view=view)
    parts = [
        features if inside is None or len(inside) == stop - start else features[inside - start]
        for start, stop, inside in pieces(slide, rows)
        for features in [slide.read_rows(encoder, start, stop, view=view)]
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, slide.feature_facts(encoder).dim), np.float16)
