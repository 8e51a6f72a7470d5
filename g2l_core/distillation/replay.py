"""Where a batch's rows come from: views replayed from the slides, with the teacher's stored features of them.

The pixels are rendered from the slides as they were for the teacher, and their hashes are compared with those that the
store recorded, so that a student never learns features of other pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8, UInt64

from g2l_core.errors import ReadError, StoreCorruptError, StoreMismatchError, StoreMissingError, UsageError
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.identity import require_same_slide
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.patches.reader_pool import ReaderPool
from g2l_core.patches.render import PatchReader, open_patches, render_block
from g2l_core.patches.views import ViewSpec, sample_views, stain_twin
from g2l_core.store import schema
from g2l_core.store.features import FeatureStore, Shard, StoredSlide
from g2l_core.store.schema import PATCH_ID, REPLAY_ROWS, STATUS, UNKNOWN_HASH
from g2l_core.types import PixelHash, ViewParams

Rows = Int64[np.ndarray, " row"]


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What is replayed, and in which order."""

    encoders: tuple[str, ...]
    """The teachers' keys in the store. None replay pixels without targets, for teachers that run live."""
    may_miss: bool = False
    """Whether slides may lack some of the teachers' features; their targets are NaN."""
    n_augmented: int | None
    """The last replayed view; the first is 1, and every epoch shows one view of each patch. 0 draws a new view every
    epoch, without end. None replays the canonical view alone, in every epoch."""
    batch_size: int = 32
    """Patches of a step, of all ranks together."""
    pool_blocks: int = 256
    """Blocks from which a batch is drawn. With 256, a batch of 32 has rows of 30 different blocks."""
    seed: int = 0
    at_once: int = 1
    """Different views of each patch in one batch."""
    is_paired: bool = False
    """Whether two views at once are a view and the one that differs from it only in stain."""

    def __post_init__(self) -> None:
        """Check that batches can be drawn.

        Raises:
            UsageError: They cannot.
        """
        if self.batch_size < 2:
            raise UsageError(f"a batch of {self.batch_size} has no batch statistics; use at least 2, the paper has 32")
        if self.pool_blocks < 1 or (self.n_augmented or 0) < 0:
            raise UsageError("pool_blocks must be at least 1, n_augmented at least 0")
        if self.encoders and not self.views:
            raise UsageError(
                "a new view every epoch needs a teacher that runs live: stored features have so many views"
            )
        if self.n_augmented and not 1 <= self.at_once <= self.n_augmented:
            raise UsageError(f"{self.at_once} different views of a patch need as many; there are {self.n_augmented}")
        if self.is_paired and (self.at_once != 2 or self.n_augmented is None or self.n_augmented % 2):
            raise UsageError(
                f"views that differ only in stain are pairs: {self.at_once} at once of {self.n_augmented} augmented "
                "ones cannot be paired"
            )

    @property
    def views(self) -> range:
        """The stored views that are replayed; empty where every epoch draws a new one."""
        return range(1) if self.n_augmented is None else range(1, 1 + self.n_augmented)


ChosenRows = Mapping[str, Rows | None]
"""Stored rows by slide id; None stands for all good rows of a slide, which are counted but not listed."""

Given = Mapping[str, Float16[np.ndarray, "row dim"]]
"""Targets of all stored rows by slide id, behind encoders' features or in place of them: labels as numbers."""

OPEN_TABLES = 128
"""Slides whose tables are held in memory; with five views and 10,000 patches, 3 MB each."""


class SlideTables:
    """A slide's small tables, read block by block when they are needed, each once."""

    def __init__(self, stored: StoredSlide, views: ViewSpec) -> None:
        self.slide_id, self.stored = stored.slide_id, stored
        self._views = views
        self._block = lru_cache(maxsize=64)(self._read_block)

    def _read_block(self, name: str, start: int, view: int | None = None) -> np.ndarray:
        stop = min(start + schema.SHARD_ROWS, len(self.stored))
        return np.asarray(self.stored.read_block(name, start, stop, view=view))

    def take(self, name: str, rows: Rows, view: int | None = None) -> np.ndarray:
        """Some rows of a table, of one view where it has views."""
        starts = rows // schema.SHARD_ROWS * schema.SHARD_ROWS
        blocks = {start: self._block(name, start, view) for start in np.unique(starts).tolist()}
        if len(blocks) == 1:
            ((start, block),) = blocks.items()
            return block[rows - start]
        parts = [blocks[start][row - start] for start, row in zip(starts.tolist(), rows.tolist(), strict=True)]
        return np.array(parts)

    def view_params(self, rows: Rows, views: Rows) -> ViewParams:
        """One view's parameters of each row: the stored ones, or drawn by the same rule where none are stored."""
        distinct = np.unique(views).tolist()
        by_view = {view: self._params_of(rows, view) for view in distinct}
        return np.stack([by_view[view][i] for i, view in enumerate(views.tolist())])[:, None]

    def _params_of(self, rows: Rows, view: int) -> np.ndarray:
        if view < self.stored.n_views:
            return self.take("view_params", rows, view)
        ids = self.take(PATCH_ID, rows).tolist() if self.stored.has_patch_ids else None
        return sample_views(self._views, self.slide_id, self.take("coords", rows), [view], ids)[:, 0]

    def known_hashes(self, rows: Rows, views: Rows) -> UInt64[np.ndarray, " row"]:
        """Pixel hashes of one view of each row, as extraction saw them; 0 where it did not see the view."""
        hashes = np.zeros(len(rows), np.uint64)
        for view in np.unique(views).tolist():
            if view < self.stored.n_views:
                hashes[views == view] = self.take("pixel_hash", rows[views == view], view)
        return hashes


class ReplaySource:
    """Renders rows of the store's slides, and reads the teacher's features of the same views.

    Attributes:
        block_rows: How many rows each block has; a block is the chosen ones of `REPLAY_ROWS` stored rows of a slide.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: ChosenRows,
        spec: ReplaySpec,
        pixel_cache: PixelCache | None = None,
        given: Given | None = None,
    ) -> None:
        """Check that all features are stored and that the slides are there. Nothing of them is read yet.

        Args:
            store: The store, with the teacher's features of `spec.views`.
            rows: Stored rows to replay.
            spec: The teacher and the views.
            pixel_cache: Decoded patches are kept here between epochs and runs.
            given: Targets that no encoder gives.

        Raises:
            StoreMissingError: A slide misses views of a teacher, and may not; or of all of them.
            StoreMismatchError: A slide's file has changed.
        """
        grid = GridSpec.from_json(store.grid)
        self._spec, self._views, self._given = spec, ViewSpec.from_json(store.views), given
        stored = {slide.slide_id: slide for slide in store.slides() if slide.slide_id in rows}
        self._slides = [stored[slide_id] for slide_id in sorted(rows)]
        self._rows = [_sorted(rows[slide.slide_id]) for slide in self._slides]
        for slide in self._slides:
            require_same_slide(slide, Path(slide.facts.source))
        self._encoders = [self._require_targets(slide) for slide in self._slides]
        self._dims = {key: store.encoders[key].dim for key in spec.encoders}
        sizes = [_block_rows(store, slide, chosen) for slide, chosen in zip(self._slides, self._rows, strict=True)]
        self.block_rows = np.concatenate(sizes)
        self._first_block = np.cumsum([0, *map(len, sizes)], dtype=np.int64)
        self._tables = lru_cache(OPEN_TABLES)(lambda index: SlideTables(self._slides[index], self._views))
        self._readers = ReaderPool(lambda index: _open(self._slides[int(index)], grid, pixel_cache))
        self._held: dict[tuple[int, int], np.ndarray] = {}
        self._proven: set[tuple[int, str, Shard]] = set()

    def _require_targets(self, slide: StoredSlide) -> tuple[str, ...]:
        """The teachers whose features a slide has in all replayed views.

        Raises:
            StoreMissingError: One is missing that must be there.
        """
        views = self._spec.views
        if self._spec.may_miss:
            return encoders_of(slide, self._spec.encoders, views)
        for encoder in self._spec.encoders:
            for view in views:
                slide.require_complete(encoder, view)
        return self._spec.encoders

    def preload_targets(self, max_gb: float) -> None:
        """Read all targets into memory if they are at most `max_gb` GB (1e9 bytes), and check that they are finite.

        Raises:
            StoreCorruptError: They are not finite, or not what was written.
        """
        views, width = self._spec.views, sum(self._dims.values())
        if not width or sum(map(len, self._slides)) * len(views) * width * 2 > 1e9 * max_gb:
            return
        for index, slide in enumerate(self._slides):
            chosen = self._rows[index]
            rows = good_rows(slide) if chosen is None else chosen
            for view in views:
                self._held[index, view] = self._all_targets(index, view, rows)

    def _all_targets(self, index: int, view: int, rows: Rows) -> Float16[np.ndarray, "stored dim"]:
        """The targets of all rows of a slide, those of some rows checked. Those of one teacher are not copied."""
        slide, parts = self._slides[index], list[np.ndarray]()
        for encoder, dim in self._dims.items():
            if encoder not in self._encoders[index]:
                parts.append(np.full((len(slide), dim), np.nan, np.float16))
                continue
            features = slide.features(encoder, view=view)
            require_finite(slide, encoder, rows, features[rows])
            parts.append(features)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def read(
        self, block: int, within: Rows, epoch: int
    ) -> tuple[UInt8[np.ndarray, "row *view height width 3"], Float16[np.ndarray, "row dim"]]:
        """Pixels and targets of some rows of a block, in the views that an epoch shows.

        Args:
            block: Index of the block.
            within: Rows within the block, increasing.
            epoch: Number of the epoch.

        Returns:
            Pixels, and the teachers' features of them, one teacher's columns behind the other's, and what is given
            behind them; without features where teachers run live, and NaN where a teacher's features may be missing and
            are. Of several views at once, pixels are (row, view, height, width, 3), and features those of the first.

        Raises:
            ReadError: A patch cannot be read.
            StoreMismatchError: The pixels are not those that the teacher saw.
            StoreCorruptError: The features are not finite, or not what was written.
        """
        index = int(np.searchsorted(self._first_block, block, side="right")) - 1
        tables = self._tables(index)
        rows = self._rows_of(index, block - int(self._first_block[index]), tables)[within]
        shown = [self._views_of_epoch(tables, rows, epoch, i) for i in range(self._spec.at_once)]
        if self._spec.is_paired:
            shown[1] = stain_twin(shown[0])
        params = np.concatenate([tables.view_params(rows, views) for views in shown], axis=1)
        with self._readers.reading(str(index)) as reader:
            rendered = render_block(reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), self._views)
        if rendered.reasons:
            raise ReadError(
                f"slide {tables.slide_id}: a patch that stage one read cannot be read now, "
                f"{next(iter(rendered.reasons.values()))}"
            )
        for i, views in enumerate(shown):
            require_same_pixels(tables, rows, views, rendered.hashes[:, i : i + 1])
        pixels = rendered.pixels if len(shown) > 1 else rendered.pixels[:, 0]
        return pixels, self._read_targets(index, rows, shown[0])

    def _rows_of(self, index: int, block: int, tables: SlideTables) -> Rows:
        """The chosen rows of a slide's block, increasing."""
        first, chosen = block * REPLAY_ROWS, self._rows[index]
        if chosen is not None:
            start, stop = np.searchsorted(chosen, [first, first + REPLAY_ROWS]).tolist()
            return chosen[start:stop]
        candidates = np.arange(first, min(first + REPLAY_ROWS, len(self._slides[index])))
        return candidates[tables.take("patch_status", candidates) == STATUS["ok"]]

    def _views_of_epoch(self, slide: SlideTables, rows: Rows, epoch: int, i: int) -> Rows:
        """The i-th view of each row that an epoch shows: views are mixed, and none repeats before all were shown."""
        views = self._spec.views
        if not views:
            return np.full(len(rows), 1 + epoch * self._spec.at_once + i)
        turn = (slide.take("pixel_hash", rows, 0) + np.uint64(epoch + i)) % np.uint64(len(views))
        return views.start + turn.astype(np.int64)

    def _read_targets(self, index: int, rows: Rows, views: Rows) -> Float16[np.ndarray, "row dim"]:
        """The teachers' features of one view of each row: from memory, or by one contiguous read for each view.

        What is given comes behind them.
        """
        targets = np.full((len(rows), sum(self._dims.values())), np.nan, np.float16)
        for view in np.unique(views).tolist():
            in_view = np.flatnonzero(views == view)
            if (index, view) in self._held:
                targets[in_view] = self._held[index, view][rows[in_view]]
            else:
                self._fill(targets, in_view, index, rows, view)
        if self._given is None:
            return targets
        return np.concatenate([targets, self._given[self._slides[index].slide_id][rows]], axis=1)

    def _fill(self, targets: np.ndarray, places: np.ndarray, index: int, rows: Rows, view: int) -> None:
        """Read the targets of one view into their places. Those that are there must be finite."""
        slide, start, stop, first = self._slides[index], int(rows.min()), int(rows.max()) + 1, 0
        for encoder, dim in self._dims.items():
            if encoder in self._encoders[index]:
                self._prove(index, encoder, start, stop, view)
                features = slide.read_unproven_rows(encoder, start, stop, view=view)[rows[places] - start]
                require_finite(slide, encoder, rows[places], features)
                targets[places, first : first + dim] = features
            first += dim

    def _prove(self, index: int, encoder: str, start: int, stop: int, view: int) -> None:
        """Compare the shards of some rows with their completion records, each once.

        Later reads take a few of a shard's chunks, whose own checksums do not tell a shard from another slide's.
        """
        slide = self._slides[index]
        for shard in slide.shards([view])[start // schema.SHARD_ROWS : (stop - 1) // schema.SHARD_ROWS + 1]:
            if (index, encoder, shard) not in self._proven:
                slide.read_rows(encoder, shard.start, shard.stop, view=view)
                self._proven.add((index, encoder, shard))


def encoders_of(slide: StoredSlide, encoders: Sequence[str], views: Iterable[int]) -> tuple[str, ...]:
    """Those of some encoders whose features a slide has in all of some views.

    Raises:
        StoreMissingError: It has none of them.
    """
    views = list(views)
    there = tuple(key for key in encoders if {s.name for s in slide.shards(views)} <= slide.records(key, views).keys())
    if encoders and not there:
        raise StoreMissingError(
            f"slide {slide.slide_id} has complete features of none of the teachers {', '.join(encoders)}: "
            "run g2l cache-teacher for it, or leave it out with --where"
        )
    return there


def _sorted(rows: Rows | None) -> Rows | None:
    return None if rows is None else np.sort(rows)


def _block_rows(store: FeatureStore, slide: StoredSlide, chosen: Rows | None) -> UInt8[np.ndarray, " block"]:
    """How many chosen rows each block of a slide has."""
    if chosen is None:
        return store.good_by_block(slide)
    n_blocks = -(-len(slide) // REPLAY_ROWS)
    return np.bincount(chosen // REPLAY_ROWS, minlength=n_blocks).astype(np.uint8)


def count_rows(store: FeatureStore, rows: ChosenRows) -> dict[str, int]:
    """How many rows are chosen of each slide."""
    slides = {slide.slide_id: slide for slide in store.slides() if slide.slide_id in rows}
    return {
        slide_id: int(store.good_by_block(slides[slide_id]).sum(dtype=np.int64)) if chosen is None else len(chosen)
        for slide_id, chosen in rows.items()
    }


def _open(stored: StoredSlide, grid: GridSpec, cache: PixelCache | None) -> PatchReader:
    """A slide's patches, through the cache of decoded ones where there is one."""
    if cache is None:
        return open_patches(stored, grid)
    same = str(grid).replace(", icc=False", "")  # so that caches from before there was any stay in use
    key = f"{stored.facts.fingerprint} {stored.slide_id} {same}"
    return cache.wrap(lambda: open_patches(stored, grid), key, len(stored), grid.patch_px)


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
    slide: StoredSlide, encoder: str, rows: Int64[np.ndarray, " _"], features: Float16[np.ndarray, "_ dim"]
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
