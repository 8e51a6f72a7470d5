"""Decide whether a file that was copied again shows the slide that was damaged when it was cached."""

from pathlib import Path

import numpy as np

from g2l_core.errors import StoreMismatchError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.render import PatchReader, open_patches, render_block
from g2l_core.patches.views import ViewSpec
from g2l_core.rng import keyed_generator
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.store.features import StoredSlide
from g2l_core.store.schema import STATUS

COMPARED_PATCHES = 64
"""How many good patches are read again from the new file: as many as one cell has."""


def adopt_repaired(stored: StoredSlide, path: Path, grid: GridSpec, views: ViewSpec) -> None:
    """Accept `path` for a slide with unreadable patches, if it shows the known pixels wherever they are compared.

    Nothing happens if the file is the one that was cached.

    Raises:
        StoreMismatchError: Some pixels differ, or no patch was ever readable, so that nothing can be compared.
        SlideError: The file cannot be opened.
    """
    if stored.patch_ids is not None or fingerprint(path) == stored.facts.fingerprint:
        return
    good = np.flatnonzero(stored.patch_status == STATUS["ok"])
    rows = np.sort(keyed_generator("repair", grid.seed, stored.slide_id).permutation(good)[:COMPARED_PATCHES])
    if not len(rows) or not _shows_the_same(open_patches(stored, grid, path), stored, rows, views):
        raise StoreMismatchError(
            f"slide {stored.slide_id}: {path} is not the file that was cached, and the {len(rows)} patches that were "
            "compared do not show the same pixels. Cache it under another slide_id, or into another --store"
        )
    stored.set_source(path, fingerprint(path))


def _shows_the_same(reader: PatchReader, stored: StoredSlide, rows: np.ndarray, views: ViewSpec) -> bool:
    params = stored.view_params[rows][:, :1]
    block = render_block(reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), views)
    return bool((block.hashes[:, 0] == stored.pixel_hash[rows, 0]).all())
