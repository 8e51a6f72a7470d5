"""One Dask array over a cohort's stored features."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import dask.array as da
import numpy as np
from jaxtyping import Int64

from g2l_core.errors import UnknownNameError
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.rows import pieces
from g2l_core.types import Features


@dataclass(frozen=True, repr=False)
class CohortRows:
    """Tells which slide and which stored row each global row of a cohort's array is."""

    slide_ids: tuple[str, ...]
    """In the array's order: sorted."""
    starts: Int64[np.ndarray, " slide_and_end"]
    """The first global row of each slide; the last entry is the number of rows."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"<CohortRows: {len(self):,} rows of {len(self.slide_ids):,} slides>"

    def of(self, slide_id: str) -> slice:
        """The global rows of a slide.

        Raises:
            UnknownNameError: It has none.
        """
        if slide_id not in self.slide_ids:
            raise UnknownNameError("slide", slide_id, self.slide_ids)
        index = self.slide_ids.index(slide_id)
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def locate(self, row: int) -> tuple[str, int]:
        """The slide and the stored row of a global row.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self.starts.tolist(), row) - 1
        return self.slide_ids[index], row - int(self.starts[index])


def dask_rows(store: FeatureStore) -> CohortRows:
    """The row order of `dask_features`: slides sorted by id, each in its stored order, unreadable patches included."""
    slides = list(store.slides())
    starts = np.cumsum([0, *map(len, slides)], dtype=np.int64)
    return CohortRows(tuple(slide.slide_id for slide in slides), starts)


def dask_features(store: FeatureStore, encoder: str, *, view: int = 0) -> da.Array:
    """One view's features of the whole cohort, read only when computed.

    Args:
        store: Its path must be reachable wherever the array is computed.
        encoder: Key of the encoder.
        view: Which view; 0 is canonical.

    Returns:
        float16 (rows of `dask_rows`, dim); a chunk is a shard. Rows of unreadable patches are NaN. Computing
        raises StoreCorruptError where a shard is not what was written.

    Raises:
        UnknownNameError: The store does not know the encoder.
        StoreMissingError: A slide's features are not complete, or there is no slide.
    """
    slides = store.complete_slides(encoder, view=view)
    return lazy_features([(slide, None) for slide in slides], encoder, view, int(store.encoders[encoder].dim))


def lazy_features(
    parts: Sequence[tuple[StoredSlide, Int64[np.ndarray, "_"] | None]], encoder: str, view: int, dim: int
) -> da.Array:
    """One view's features of some rows of some slides; a chunk is what is taken of a shard.

    Args:
        parts: Slides, each with its stored rows in ascending order, or None for all of them.
        encoder: Key of the encoder.
        view: Which view.
        dim: Width of a feature.
    """
    jobs = [(slide, *job) for slide, rows in parts for job in pieces(slide, rows)]

    def read(block_id: tuple[int, int]) -> Features:
        slide, start, stop, rows = jobs[block_id[0]]
        features = slide.read_rows(encoder, start, stop, view=view)
        return features if rows is None else features[rows - start]

    sizes = tuple(stop - start if rows is None else len(rows) for _, start, stop, rows in jobs)
    if not jobs:
        return da.empty((0, dim), dtype=np.float16)
    return da.map_blocks(read, chunks=(sizes, (dim,)), dtype=np.float16, meta=np.empty((0, 0), np.float16))
