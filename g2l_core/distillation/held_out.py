"""The held-out patches of a distillation, held in memory: canonical views and the teacher's features of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from g2l_core.distillation.replay import SlideTables, require_finite, require_same_pixels
from g2l_core.errors import StoreMissingError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.render import open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """Canonical views with the teacher's features of them, held in memory."""

    pixels: UInt8[np.ndarray, "n height width 3"]
    targets: Float16[np.ndarray, "n dim"]


def read_held_out(
    store: FeatureStore, rows: Mapping[str, Int64[np.ndarray, " _"]], encoder: str | None, *, limit: int, seed: int
) -> HeldOutSet:
    """Read view 0 of some rows.

    Args:
        store: The store.
        rows: Rows to choose from, by slide id.
        encoder: The teacher's key in the store; None reads no targets, for a teacher that runs live.
        limit: Maximum number of rows; they are drawn at random over all slides.
        seed: Random seed.

    Raises:
        StoreMissingError: The teacher's canonical view is not complete, or there are no rows.
        StoreCorruptError: The teacher's features of it are not finite.
    """
    total = sum(map(len, rows.values()))
    if not total:
        raise StoreMissingError("no patches are held out")
    kept = np.zeros(total, bool)
    kept[keyed_generator("validation", seed).permutation(total)[:limit]] = True
    pixels, targets, first = [], [], 0
    spec = ViewSpec.from_json(store.views)
    for slide_id, chosen in sorted(rows.items()):
        drawn = np.sort(chosen)[kept[first : first + len(chosen)]]
        first += len(chosen)
        if not len(drawn):
            continue
        slide = SlideTables(store.slide(slide_id), GridSpec.from_json(store.grid), spec)
        reader = open_patches(slide.stored, GridSpec.from_json(store.grid))
        block = render_block(reader, drawn.tolist(), slide.params[drawn, :1], np.zeros(len(drawn), np.uint8), spec)
        reader.close()
        require_same_pixels(slide, drawn, np.zeros(len(drawn), np.int64), block.hashes)
        pixels.append(block.pixels[:, 0])
        targets.append(_read_targets(slide, encoder, drawn))
    return HeldOutSet(pixels=np.concatenate(pixels), targets=np.concatenate(targets))


def _read_targets(slide: SlideTables, encoder: str | None, rows: np.ndarray) -> Float16[np.ndarray, "row dim"]:
    if encoder is None:
        return np.empty((len(rows), 0), np.float16)
    features = slide.stored.features(encoder)[rows]
    require_finite(slide, encoder, rows, features)
    return features
