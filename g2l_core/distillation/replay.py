"""Where a batch's rows come from: views replayed from the slides, with the teacher's stored features of them.

The pixels are rendered from the slides as they were for the teacher, and their hashes are compared with those that the
store recorded, so that a student never learns features of other pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8, UInt64

from g2l_core.errors import ReadError, StoreCorruptError, StoreMismatchError, UsageError
from g2l_core.patches.grid import GridSpec, blocks
from g2l_core.patches.identity import require_same_slide
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.patches.reader_pool import ReaderPool
from g2l_core.patches.render import PatchReader, open_patches, render_block
from g2l_core.patches.views import ViewSpec, sample_views
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import STATUS, UNKNOWN_HASH
from g2l_core.types import Level0Px, PixelHash, ViewParams

Rows = Int64[np.ndarray, " row"]


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What is replayed, and in which order."""

    encoder: str | None
    """The teacher's key in the store. None replays pixels without targets, for a teacher that runs live."""
    n_augmented: int
    """The last replayed view; the first is 1, and every epoch shows one view of each patch. 0 draws a new view every
    epoch, without end."""
    batch_size: int = 32
    """Patches of a step, of all ranks together."""
    pool_blocks: int = 256
    """Blocks from which a batch is drawn. With 256, a batch of 32 has rows of 30 different blocks."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that batches can be drawn.

        Raises:
            UsageError: They cannot.
        """
        if self.batch_size < 2:
            raise UsageError(f"a batch of {self.batch_size} has no batch statistics; use at least 2, the paper has 32")
        if self.pool_blocks < 1 or self.n_augmented < 0:
            raise UsageError("pool_blocks must be at least 1, n_augmented at least 0")
        if self.encoder is not None and not self.n_augmented:
            raise UsageError(
                "a new view every epoch needs a teacher that runs live: stored features have so many views"
            )


class SlideTables:
    """A slide's small tables. Making them checks that the slide's file is the one that was cached."""

    def __init__(self, stored: StoredSlide, grid: GridSpec, views: ViewSpec) -> None:
        require_same_slide(stored, Path(stored.facts.source))
        self.slide_id = stored.slide_id
        self.stored = stored
        self.params, self.hashes = stored.view_params, stored.pixel_hash
        self.cells = blocks(stored.coords, Level0Px(stored.facts.patch_px_level0), grid)
        self.targets: dict[int, np.ndarray] = {}
        """Features by view, where they are held in memory."""
        self._views, self._coords, self._patch_ids = views, stored.coords, stored.patch_ids

    def view_params(self, rows: Rows, views: Rows) -> ViewParams:
        """One view's parameters of each row: the stored ones, or drawn by the same rule where none are stored."""
        stored = views < self.params.shape[1]
        if stored.all():
            return self.params[rows, views][:, None]
        ids = None if self._patch_ids is None else [self._patch_ids[row] for row in rows.tolist()]
        distinct = np.unique(views)
        drawn = sample_views(self._views, self.slide_id, self._coords[rows], distinct.tolist(), ids)
        params = drawn[np.arange(len(rows)), np.searchsorted(distinct, views)]
        params[stored] = self.params[rows[stored], views[stored]]
        return params[:, None]

    def known_hashes(self, rows: Rows, views: Rows) -> UInt64[np.ndarray, " row"]:
        """Pixel hashes of one view of each row, as extraction saw them; 0 where it did not see the view."""
        stored = views < self.hashes.shape[1]
        hashes = np.zeros(len(rows), np.uint64)
        hashes[stored] = self.hashes[rows[stored], views[stored]]
        return hashes


@dataclass(frozen=True)
class Block:
    """A cell of a slide, with the rows of it that are replayed: they lie close together in the slide and the store."""

    slide: SlideTables
    rows: Rows
    """Stored rows, increasing."""


class ReplaySource:
    """Renders rows of the store's slides, and reads the teacher's features of the same views."""

    def __init__(
        self,
        store: FeatureStore,
        rows: Mapping[str, Int64[np.ndarray, " _"]],
        spec: ReplaySpec,
        pixel_cache: PixelCache | None = None,
    ) -> None:
        """Open the slides, and check that all features are stored.

        Args:
            store: The store, with the teacher's features of views 1 to `spec.n_augmented`.
            rows: Stored rows to replay, by slide id.
            spec: The teacher and the views.
            pixel_cache: Decoded patches are kept here between epochs and runs.

        Raises:
            StoreMissingError: A slide misses views of the teacher.
            StoreMismatchError: A slide's file has changed.
        """
        grid = GridSpec.from_json(store.grid)
        self._spec, self._views = spec, ViewSpec.from_json(store.views)
        self._rows: dict[str, Int64[np.ndarray, " _"]] = {}
        self._slides: dict[str, SlideTables] = {}
        for slide_id, chosen in sorted(rows.items()):
            stored = store.slide(slide_id)
            if spec.encoder is not None:
                for view in range(1, 1 + spec.n_augmented):
                    stored.require_complete(spec.encoder, view)
            self._slides[slide_id], self._rows[slide_id] = SlideTables(stored, grid, self._views), np.sort(chosen)
        self._readers = ReaderPool(lambda slide_id: _open(self._slides[slide_id].stored, grid, pixel_cache))
        self.blocks = [
            Block(slide, self._rows[slide_id][start:stop])
            for slide_id, slide in self._slides.items()
            for start, stop in np.searchsorted(self._rows[slide_id], slide.cells).tolist()
            if stop > start
        ]

    def preload_targets(self, max_gb: float) -> None:
        """Read all targets into memory if they are at most `max_gb` GB (1e9 bytes), and check that they are finite.

        Raises:
            StoreCorruptError: They are not finite.
        """
        encoder, n_augmented = self._spec.encoder, self._spec.n_augmented
        if encoder is None:
            return
        slides = self._slides.values()
        width = next(iter(slides)).stored.features_array(encoder).shape[2]
        if sum(len(slide.stored) for slide in slides) * n_augmented * width * 2 > 1e9 * max_gb:
            return
        for slide in slides:
            rows = self._rows[slide.slide_id]
            for view in range(1, 1 + n_augmented):
                features = slide.stored.features(encoder, view=view)
                require_finite(slide, encoder, rows, features[rows])
                slide.targets[view] = features

    def read(
        self, block: int, within: Rows, epoch: int
    ) -> tuple[UInt8[np.ndarray, "row height width 3"], Float16[np.ndarray, "row dim"]]:
        """Pixels and targets of some rows of a block, in the views that an epoch shows.

        Args:
            block: Index in `blocks`.
            within: Rows within the block, increasing.
            epoch: Number of the epoch.

        Returns:
            Pixels, and the teacher's features of them; without columns where the teacher runs live.

        Raises:
            ReadError: A patch cannot be read.
            StoreMismatchError: The pixels are not those that the teacher saw.
            StoreCorruptError: The features are not finite.
        """
        slide, rows = self.blocks[block].slide, self.blocks[block].rows[within]
        views = self._views_of_epoch(slide, rows, epoch)
        params = slide.view_params(rows, views)
        with self._readers.reading(slide.slide_id) as reader:
            rendered = render_block(reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), self._views)
        if rendered.reasons:
            raise ReadError(
                f"slide {slide.slide_id}: a patch that stage one read cannot be read now, "
                f"{next(iter(rendered.reasons.values()))}"
            )
        require_same_pixels(slide, rows, views, rendered.hashes)
        if self._spec.encoder is None:
            return rendered.pixels[:, 0], np.empty((len(rows), 0), np.float16)
        return rendered.pixels[:, 0], _read_targets(slide, self._spec.encoder, rows, views)

    def _views_of_epoch(self, slide: SlideTables, rows: Rows, epoch: int) -> Rows:
        """The view of each row that an epoch shows: views are mixed, and none repeats before all were shown."""
        if not self._spec.n_augmented:
            return np.full(len(rows), 1 + epoch)
        turn = (slide.hashes[rows, 0] + np.uint64(epoch)) % np.uint64(self._spec.n_augmented)
        return 1 + turn.astype(np.int64)


def _open(stored: StoredSlide, grid: GridSpec, cache: PixelCache | None) -> PatchReader:
    """A slide's patches, through the cache of decoded ones where there is one."""
    if cache is None:
        return open_patches(stored, grid)
    key = f"{stored.facts.fingerprint} {stored.slide_id} {grid}"
    return cache.wrap(lambda: open_patches(stored, grid), key, len(stored), grid.patch_px)


def _read_targets(slide: SlideTables, encoder: str, rows: Rows, views: Rows) -> Float16[np.ndarray, "row dim"]:
    """The teacher's features of one view of each row: from memory, or by one contiguous read for each view."""
    start, stop = int(rows.min()), int(rows.max()) + 1
    targets = np.empty((len(rows), slide.stored.features_array(encoder).shape[2]), np.float16)
    for view in np.unique(views).tolist():
        in_view = views == view
        if view in slide.targets:
            targets[in_view] = slide.targets[view][rows[in_view]]
        else:
            targets[in_view] = slide.stored.read_rows(encoder, start, stop, view=view)[rows[in_view] - start]
    require_finite(slide, encoder, rows, targets)
    return targets


def require_same_pixels(slide: SlideTables, rows: Rows, views: Rows, hashes: PixelHash) -> None:
    """Check that pixels are those that the teacher saw. Hashing costs 4 % of augmenting, so every view is checked.

    Args:
        slide: The slide's tables.
        rows: Stored rows.
        views: The view of each row.
        hashes: Hashes of the rendered pixels, (row, 1).

    Raises:
        StoreMismatchError: They are not; names the first row.
    """
    known = slide.known_hashes(rows, views)
    different = np.flatnonzero((known != hashes[:, 0]) & (known != UNKNOWN_HASH))
    if len(different):
        i = int(different[0])
        raise StoreMismatchError(
            f"slide {slide.slide_id}, row {rows[i]}, view {views[i]}: the pixels are not those that the teacher saw. "
            "Likely another version of OpenSlide or OpenCV than the one that made the store (g2l store info); "
            "use that version, or cache again"
        )


def require_finite(
    slide: SlideTables, encoder: str, rows: Int64[np.ndarray, " _"], features: Float16[np.ndarray, "_ dim"]
) -> None:
    """Check that stored features are finite.

    Raises:
        StoreCorruptError: They are not; names the first row.
    """
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise StoreCorruptError(
            f"slide {slide.slide_id}, row {rows[np.flatnonzero(bad)[0]]}: stored features of {encoder} are not finite; "
            "run g2l store verify"
        )


def good_rows(stored: StoredSlide) -> Int64[np.ndarray, " row"]:
    """Rows of a slide that have pixels and features."""
    return np.flatnonzero(stored.patch_status == STATUS["ok"])
