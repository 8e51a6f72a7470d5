"""The stream of (view pixels, teacher features) that distillation reads from a store.

Blocks (the cells of a slide) stand in a keyed random order, a pool of them is kept in memory, and batches are
drawn from the pool. The order is a function of (seed, epoch) alone: not of threads, nor of ranks, nor of where a run
was interrupted; a position in it is one integer, the number of batches drawn.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from g2l_core.concurrency import run_ahead
from g2l_core.distillation.sampling import EpochPlan, plan_epoch
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


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What is replayed, and in which order."""

    encoder: str | None
    """Key of the teacher in the store; None replays pixels alone, for a teacher that runs live."""
    n_augmented: int
    """Views 1 to this are replayed, one a patch and epoch; 0 draws a new view every epoch, without end."""
    batch_size: int = 32
    """Patches of a step, of all ranks together."""
    pool_blocks: int = 256
    """Blocks from which a batch is drawn: 256 give a batch of 32 rows of 30 different blocks."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a stream that cannot be drawn."""
        if self.batch_size < 2:
            raise UsageError(f"a batch of {self.batch_size} has no batch statistics; use at least 2, the paper has 32")
        if self.pool_blocks < 1 or self.n_augmented < 0:
            raise UsageError("pool_blocks must be at least 1, n_augmented at least 0")
        if self.encoder is not None and not self.n_augmented:
            raise UsageError(
                "a new view every epoch needs a teacher that runs live: stored features have so many views"
            )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How patches and targets are read. None of it changes what is read."""

    workers: int = 2
    """Threads that read and augment."""
    rank: int = 0
    world: int = 1
    """This process's number among those that train together, and how many they are: each reads its part of a batch."""
    targets_gb: float = 4.0
    """Targets of up to so many GB (1e9 bytes) are read into memory before training; larger ones block by block."""
    pixel_cache: PixelCache | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the student sees at one step, on one rank."""

    position: int
    epoch: int
    pixels: UInt8[np.ndarray, "batch height width 3"]
    targets: Float16[np.ndarray, "batch dim"]
    """Without columns where the teacher runs live."""


@dataclass(frozen=True)
class _Block:
    slide: "SlideTables"
    rows: Int64[np.ndarray, " row"]
    """Stored rows, increasing."""


class SlideTables:
    """A slide's small tables, and a check that its file is the one that was cached."""

    def __init__(self, stored: StoredSlide, grid: GridSpec, views: ViewSpec) -> None:
        require_same_slide(stored, Path(stored.facts.source))
        self.slide_id = stored.slide_id
        self.stored = stored
        self.params, self.hashes = stored.view_params, stored.pixel_hash
        self.cells = blocks(stored.coords, Level0Px(stored.facts.patch_px_level0), grid)
        self.targets: dict[int, np.ndarray] = {}
        """Features of whole views, where they are held in memory."""
        self._views, self._coords, self._patch_ids = views, stored.coords, stored.patch_ids

    def view_params(self, rows: Int64[np.ndarray, " row"], views: Int64[np.ndarray, " row"]) -> ViewParams:
        """One view's parameters of each row: the stored ones, or drawn by the same rule where none are stored."""
        stored = views < self.params.shape[1]
        if stored.all():
            return self.params[rows, views][:, None]
        ids = None if self._patch_ids is None else [self._patch_ids[row] for row in rows.tolist()]
        drawn = sample_views(self._views, self.slide_id, self._coords[rows], np.unique(views).tolist(), ids)
        found = drawn[np.arange(len(rows)), np.searchsorted(np.unique(views), views)]
        found[stored] = self.params[rows[stored], views[stored]]
        return found[:, None]

    def known_hashes(self, rows: Int64[np.ndarray, " row"], views: Int64[np.ndarray, " row"]) -> PixelHash:
        """Hashes of the rows' views as stage one saw them; 0 where it saw none, (row, 1)."""
        stored = views < self.hashes.shape[1]
        found = np.zeros(len(rows), np.uint64)
        found[stored] = self.hashes[rows[stored], views[stored]]
        return found[:, None]


class ReplayLoader:
    """Replays a store's views and their teacher features, in an order that any position can resume."""

    def __init__(
        self,
        store: FeatureStore,
        rows: Mapping[str, Int64[np.ndarray, " _"]],
        spec: ReplaySpec,
        reading: Reading | None = None,
    ) -> None:
        """Open the slides and check that everything needed is there.

        Args:
            store: With complete features of the teacher for views 1 to `spec.n_augmented`.
            rows: Stored rows to train on, by slide id.
            spec: What and in which order.
            reading: How.

        Raises:
            StoreMissingError: A slide misses views of the teacher.
            StoreMismatchError: A slide's file has changed.
            StoreCorruptError: Targets that are held in memory are not finite.
            UsageError: There are fewer rows than a batch has, or a batch cannot be parted among the ranks.
        """
        self.spec, self._reading = spec, reading or Reading()
        self._views = ViewSpec.from_json(store.views)
        share, rest = divmod(spec.batch_size, self._reading.world)
        if rest or share < 1:
            raise UsageError(f"a batch of {spec.batch_size} cannot be parted among {self._reading.world} ranks")
        self._share = slice(self._reading.rank * share, (self._reading.rank + 1) * share)
        slides = self._open(store, rows)
        self._blocks = [block for slide, chosen in slides for block in _blocks_of(slide, chosen)]
        self._block_rows = [len(block.rows) for block in self._blocks]
        self._plan = lru_cache(2)(self._plan_epoch)
        if sum(self._block_rows) < spec.batch_size:
            raise UsageError(
                f"{sum(self._block_rows)} patches to train on are fewer than one batch of {spec.batch_size}: "
                "cache more slides, or lower --batch-size"
            )
        self._hold_targets(slides)

    def _open(
        self, store: FeatureStore, rows: Mapping[str, Int64[np.ndarray, " _"]]
    ) -> list[tuple[SlideTables, Int64[np.ndarray, " _"]]]:
        grid, found = GridSpec.from_json(store.grid), []
        for slide_id, chosen in sorted(rows.items()):
            stored = store.slide(slide_id)
            if self.spec.encoder is not None:
                for view in range(1, 1 + self.spec.n_augmented):
                    stored.require_complete(self.spec.encoder, view)
            found.append((SlideTables(stored, grid, self._views), chosen))
        tables = {slide.slide_id: slide for slide, _ in found}
        self._slides = ReaderPool(lambda slide_id: _open(tables[slide_id].stored, grid, self._reading.pixel_cache))
        return found

    def _hold_targets(self, slides: list[tuple[SlideTables, Int64[np.ndarray, " _"]]]) -> None:
        """Read the targets into memory if they fit, and refuse those that are not finite before training starts."""
        encoder = self.spec.encoder
        if encoder is None:
            return
        width = slides[0][0].stored.features_array(encoder).shape[2]
        size = sum(len(slide.stored) for slide, _ in slides) * self.spec.n_augmented * width * 2
        if size > 1e9 * self._reading.targets_gb:
            return
        for slide, chosen in slides:
            for view in range(1, 1 + self.spec.n_augmented):
                features = slide.stored.features(encoder, view=view)
                require_finite(slide, encoder, chosen, features[chosen])
                slide.targets[view] = features

    @property
    def n_rows(self) -> int:
        """Patches of one epoch."""
        return sum(self._block_rows)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch; the remainder is left out, since it would distort batch statistics."""
        return self.n_rows // self.spec.batch_size

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self._block_rows,
            batch_size=self.spec.batch_size,
            pool_blocks=self.spec.pool_blocks,
            seed=self.spec.seed,
            epoch=epoch,
        )

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield this rank's part of the batches without end, from position `start` on."""
        rendered = run_ahead(
            self._render,
            self._jobs(start),
            workers=self._reading.workers,
            lookahead=max(2 * self._reading.workers, self.spec.pool_blocks // 4),
        )
        position = start
        while True:
            epoch, done = divmod(position, self.batches_per_epoch)
            plan = self._plan(epoch)
            ready: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
            expected = iter(plan.jobs(done, self._share))
            read = -1
            for drawn in plan.batches[done:, self._share]:
                while read < drawn[:, 0].max():
                    read, _ = next(expected)
                    ready |= _by_row(read, *next(rendered))
                pixels, targets = zip(*(ready.pop((p, r)) for p, r in drawn.tolist()), strict=True)
                yield Batch(position=position, epoch=epoch, pixels=np.stack(pixels), targets=np.stack(targets))
                position += 1

    def _jobs(self, start: int) -> Iterator[tuple[_Block, Int64[np.ndarray, " row"], int]]:
        """Yield (block, rows within it, epoch) in the order in which batches will ask for them."""
        epoch, done = divmod(start, self.batches_per_epoch)
        while True:
            plan = self._plan(epoch)
            for place, rows in plan.jobs(done, self._share):
                yield self._blocks[plan.order[place]], rows, epoch
            epoch, done = epoch + 1, 0

    def _render(
        self, job: tuple[_Block, Int64[np.ndarray, " row"], int]
    ) -> tuple[Int64[np.ndarray, " row"], np.ndarray, np.ndarray]:
        """Rows within the block, their views' pixels and the teacher's features of the same views."""
        block, within, epoch = job
        slide, rows = block.slide, block.rows[within]
        views = self._views_of(slide, rows, epoch)
        params, known = slide.view_params(rows, views), slide.known_hashes(rows, views)
        with self._slides.reading(slide.slide_id) as reader:
            rendered = render_block(reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), self._views)
        if rendered.reasons:
            raise ReadError(
                f"slide {slide.slide_id}: a patch that stage one read cannot be read now, "
                f"{next(iter(rendered.reasons.values()))}"
            )
        require_same_pixels(slide, rows, views, known[:, 0], rendered.hashes[:, 0])
        if self.spec.encoder is None:
            return within, rendered.pixels[:, 0], np.empty((len(rows), 0), np.float16)
        return within, rendered.pixels[:, 0], _targets(slide, self.spec.encoder, rows, views)

    def _views_of(self, slide: SlideTables, rows: Int64[np.ndarray, " row"], epoch: int) -> Int64[np.ndarray, " row"]:
        """Which view of each patch this epoch shows: an epoch mixes views, and none repeats before all were shown."""
        if not self.spec.n_augmented:
            return np.full(len(rows), 1 + epoch)
        turn = (slide.hashes[rows, 0] + np.uint64(epoch)) % np.uint64(self.spec.n_augmented)
        return 1 + turn.astype(np.int64)


def _open(stored: StoredSlide, grid: GridSpec, cache: PixelCache | None) -> PatchReader:
    """A slide's patches, through the cache of decoded ones where there is one."""
    if cache is None:
        return open_patches(stored, grid)
    key = f"{stored.facts.fingerprint} {stored.slide_id} {grid}"
    return cache.wrap(lambda: open_patches(stored, grid), key, len(stored), grid.patch_px)


def _blocks_of(slide: SlideTables, chosen: Int64[np.ndarray, " row"]) -> list[_Block]:
    """A slide's blocks with the chosen rows that lie in them."""
    chosen = np.sort(chosen)
    edges = np.searchsorted(chosen, slide.cells)
    return [_Block(slide, chosen[a:b]) for a, b in edges.tolist() if b > a]


def _by_row(
    position: int, rows: np.ndarray, pixels: np.ndarray, targets: np.ndarray
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    return {(position, int(row)): (pixels[i], targets[i]) for i, row in enumerate(rows)}


def require_same_pixels(
    slide: SlideTables, rows: np.ndarray, views: np.ndarray, known: np.ndarray, hashes: np.ndarray
) -> None:
    """Refuse pixels that the teacher did not see. Hashing costs 4 % of augmenting, so every view is checked."""
    other = np.flatnonzero((known != hashes) & (known != UNKNOWN_HASH))
    if len(other):
        i = int(other[0])
        raise StoreMismatchError(
            f"slide {slide.slide_id}, row {rows[i]}, view {views[i]}: the pixels are not those that the teacher saw. "
            "Likely another version of OpenSlide or OpenCV than the one that made the store (g2l store info); "
            "use that version, or cache again"
        )


def _targets(slide: SlideTables, encoder: str, rows: np.ndarray, views: np.ndarray) -> Float16[np.ndarray, "row dim"]:
    """The teacher's features: from memory, or one contiguous read for each view that occurs."""
    start, stop = int(rows.min()), int(rows.max()) + 1
    out = np.empty((len(rows), slide.stored.features_array(encoder).shape[2]), np.float16)
    for view in np.unique(views).tolist():
        mine = views == view
        if view in slide.targets:
            out[mine] = slide.targets[view][rows[mine]]
        else:
            out[mine] = slide.stored.read_rows(encoder, start, stop, view=view)[rows[mine] - start]
    require_finite(slide, encoder, rows, out)
    return out


def require_finite(slide: SlideTables, encoder: str, rows: np.ndarray, features: np.ndarray) -> None:
    """Refuse stored features that are not finite.

    Raises:
        StoreCorruptError: Names the first row.
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
