"""The held-out patches of a distillation, held in memory: canonical views and the teacher's features of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from g2l_core.distillation.replay import (
    ChosenRows,
    SlideTables,
    count_rows,
    good_rows,
    require_finite,
    require_same_pixels,
)
from g2l_core.errors import StoreMissingError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.identity import require_same_slide
from g2l_core.patches.render import open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore, StoredSlide


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """Canonical views with the teacher's features of them, held in memory."""

    pixels: UInt8[np.ndarray, "n height width 3"]
    targets: Float16[np.ndarray, "n dim"]


def read_held_out(store: FeatureStore, rows: ChosenRows, encoder: str | None, *, limit: int, seed: int) -> HeldOutSet:
    """Read view 0 of some rows.

    Args:
        store: The store.
        rows: Rows to choose from.
        encoder: The teacher's key in the store; None reads no targets, for a teacher that runs live.
        limit: Maximum number of rows; they are drawn at random over all slides.
        seed: Random seed.

    Raises:
        StoreMissingError: The teacher's canonical view is not complete, or there are no rows.
        StoreCorruptError: The teacher's features of it are not finite.
    """
    counts = count_rows(store, rows)
    total = sum(counts.values())
    if not total:
        raise StoreMissingError("no patches are held out")
    drawn = np.sort(_draw(total, limit, seed))
    pixels, targets, first = [], [], 0
    spec, grid = ViewSpec.from_json(store.views), GridSpec.from_json(store.grid)
    for slide_id in sorted(rows):
        picks = drawn[(drawn >= first) & (drawn < first + counts[slide_id])] - first
        first += counts[slide_id]
        if not len(picks):
            continue
        stored, chosen = store.slide(slide_id), rows[slide_id]
        require_same_slide(stored, Path(stored.facts.source))
        taken = (good_rows(stored) if chosen is None else np.sort(chosen))[picks]
        slide, canonical = SlideTables(stored, spec), np.zeros(len(taken), np.int64)
        reader = open_patches(stored, grid)
        params = slide.view_params(taken, canonical)
        block = render_block(reader, taken.tolist(), params, np.zeros(len(taken), np.uint8), spec)
        reader.close()
        require_same_pixels(slide, taken, canonical, block.hashes)
        pixels.append(block.pixels[:, 0])
        targets.append(_read_targets(stored, encoder, taken))
    return HeldOutSet(pixels=np.concatenate(pixels), targets=np.concatenate(targets))


def _draw(total: int, limit: int, seed: int) -> Int64[np.ndarray, " drawn"]:
    """At most `limit` of so many rows, at random."""
    return np.arange(total) if limit >= total else keyed_generator("validation", seed).permutation(total)[:limit]


def _read_targets(slide: StoredSlide, encoder: str | None, rows: np.ndarray) -> Float16[np.ndarray, "row dim"]:
    if encoder is None:
        return np.empty((len(rows), 0), np.float16)
    features = slide.features(encoder)[rows]
    require_finite(slide, encoder, rows, features)
    return features
