"""The held-out patches of a distillation, held in memory: canonical views and the teacher's features of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from g2l_core.distillation.replay import (
    ChosenRows,
    SlideTables,
    count_rows,
    encoders_of,
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
    """Of several teachers, one's columns behind the other's; NaN where one has no features of a patch."""


def read_held_out(
    store: FeatureStore,
    rows: ChosenRows,
    encoders: Sequence[str],
    *,
    limit: int,
    seed: int,
    may_miss: bool = False,
) -> HeldOutSet:
    """Read view 0 of some rows.

    Args:
        store: The store.
        rows: Rows to choose from.
        encoders: The teachers' keys in the store; none reads no targets, for teachers that run live.
        limit: Maximum number of rows; they are drawn at random over all slides.
        seed: Random seed.
        may_miss: Whether slides may lack some of the teachers' features.

    Raises:
        StoreMissingError: A teacher's canonical view is not complete, or there are no rows.
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
        there = encoders_of(stored, encoders, [0]) if may_miss else encoders
        parts = [
            _read_targets(stored, key, taken)
            if key in there
            else np.full((len(taken), store.encoders[key].dim), np.nan, np.float16)
            for key in encoders
        ]
        targets.append(np.concatenate([np.empty((len(taken), 0), np.float16), *parts], axis=1))
    return HeldOutSet(pixels=np.concatenate(pixels), targets=np.concatenate(targets))


def _draw(total: int, limit: int, seed: int) -> Int64[np.ndarray, " drawn"]:
    """At most `limit` of so many rows, at random."""
    return np.arange(total) if limit >= total else keyed_generator("validation", seed).permutation(total)[:limit]


def _read_targets(slide: StoredSlide, encoder: str, rows: np.ndarray) -> Float16[np.ndarray, "row dim"]:
    features = slide.features(encoder)[rows]
    require_finite(slide, encoder, rows, features)
    return features
