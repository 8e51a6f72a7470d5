"""The stream of (view pixels, teacher features) that distillation reads from a store.

Blocks (the cells of a slide) stand in a keyed random order, a pool of them is kept in memory, and batches are
drawn from the pool. The order is a function of (seed, epoch) alone: not of threads, nor of where a run was
interrupted; a position in it is one integer, the number of batches drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from g2l_core.engine import run_ahead
from g2l_core.errors import ReadError, StoreCorruptError, StoreMismatchError, StoreMissingError, UsageError
from g2l_core.grid import GridSpec, blocks
from g2l_core.laying import require_same_slide
from g2l_core.patches import open_patches, render_block
from g2l_core.randomness import keyed_generator
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.schema import STATUS
from g2l_core.types import Level0Px
from g2l_core.views import ViewSpec

BLOCK_ROWS = 64
"""Rows of a whole cell, for turning a number of blocks into a number of rows."""


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What is replayed, and in which order."""

    encoder: str
    """Key of the teacher in the store."""
    n_augmented: int
    """Views 1 to this are replayed, one a patch and epoch."""
    batch_size: int = 32
    pool_blocks: int = 256
    """Blocks from which a batch is drawn: 256 give a batch of 32 rows of 30 different blocks."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a stream that cannot be drawn."""
        if self.batch_size < 2:
            raise UsageError(f"a batch of {self.batch_size} has no batch statistics; use at least 2, the paper has 32")
        if self.pool_blocks < 1 or self.n_augmented < 1:
            raise UsageError("pool_blocks and n_augmented must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the student sees at one step."""

    position: int
    epoch: int
    pixels: UInt8[np.ndarray, "batch height width 3"]
    targets: Float16[np.ndarray, "batch dim"]


class EpochOrder:
    """Draws one epoch's batches from a sliding pool of blocks.

    Positions count the blocks in the epoch's random order; a batch is rows of (position, row in the block).
    """

    def __init__(self, block_rows: Sequence[int], spec: ReplaySpec, epoch: int) -> None:
        self._rng = keyed_generator("epoch", spec.seed, epoch)
        self.order: Int64[np.ndarray, " block"] = self._rng.permutation(len(block_rows))
        self._block_rows = np.asarray(block_rows)[self.order]
        self._capacity = spec.pool_blocks * BLOCK_ROWS
        self._batch_size = spec.batch_size
        self._pool = np.empty((0, 2), np.int64)
        self._taken = 0
        self._fill()

    def _fill(self) -> None:
        while self._taken < len(self._block_rows) and len(self._pool) < self._capacity:
            rows = np.arange(self._block_rows[self._taken])
            block = np.stack([np.full_like(rows, self._taken), rows], axis=1)
            self._pool = np.concatenate([self._pool, block])
            self._taken += 1

    def draw(self) -> Int64[np.ndarray, "batch 2"] | None:
        """The next batch; None when fewer rows than a batch are left."""
        if len(self._pool) < self._batch_size:
            return None
        picks = self._rng.choice(len(self._pool), self._batch_size, replace=False)
        batch = self._pool[picks]
        self._pool = np.delete(self._pool, picks, axis=0)
        self._fill()
        return batch

    def waiting(self) -> Iterator[tuple[int, Int64[np.ndarray, " row"]]]:
        """Yield (position, rows) of every block that still has rows to be drawn, pool first, in order."""
        for position in np.unique(self._pool[:, 0]).tolist():
            yield position, np.sort(self._pool[self._pool[:, 0] == position, 1])
        for position in range(self._taken, len(self._block_rows)):
            yield position, np.arange(self._block_rows[position])


@dataclass(frozen=True)
class _Block:
    slide: "_OpenSlide"
    rows: Int64[np.ndarray, " row"]
    """Stored rows, increasing."""


class _OpenSlide:
    """A slide's reader and its small tables."""

    def __init__(self, stored: StoredSlide, grid: GridSpec) -> None:
        require_same_slide(stored, Path(stored.facts["source"]))
        self.slide_id = stored.slide_id
        self.stored = stored
        self.reader = open_patches(stored, grid)
        self.params, self.hashes = stored.view_params, stored.pixel_hash
        self.cells = blocks(stored.coords, Level0Px(stored.facts["patch_px_level0"]), grid)


class ReplayLoader:
    """Replays a store's views and their teacher features, in an order that any position can resume."""

    def __init__(
        self, store: FeatureStore, rows: Mapping[str, Int64[np.ndarray, " row"]], spec: ReplaySpec, *, workers: int = 2
    ) -> None:
        """Open the slides and check that everything needed is there.

        Args:
            store: With complete features of the teacher for views 1 to `spec.n_augmented`.
            rows: Stored rows to train on, by slide id.
            spec: What and in which order.
            workers: Threads that read and augment; they change nothing but the speed.

        Raises:
            StoreMissingError: A slide misses views of the teacher.
            StoreMismatchError: A slide's file has changed.
            UsageError: There are fewer rows than a batch has.
        """
        self.spec = spec
        self._workers = workers
        self._views = ViewSpec(**store.views)
        grid = GridSpec(**store.grid)
        self._blocks: list[_Block] = []
        for slide_id, chosen in sorted(rows.items()):
            stored = store.slide(slide_id)
            for view in range(1, 1 + spec.n_augmented):
                stored.require_complete(spec.encoder, view)
            self._blocks += _blocks_of(_OpenSlide(stored, grid), chosen)
        self._block_rows = [len(block.rows) for block in self._blocks]
        if sum(self._block_rows) < spec.batch_size:
            raise UsageError(
                f"{sum(self._block_rows)} patches to train on are fewer than one batch of {spec.batch_size}: "
                "cache more slides, or lower --batch-size"
            )

    @property
    def n_rows(self) -> int:
        """Patches of one epoch."""
        return sum(self._block_rows)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch; the remainder is left out, since it would distort batch statistics."""
        return self.n_rows // self.spec.batch_size

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches without end, from position `start` on."""
        rendered = run_ahead(
            self._render,
            self._blocks_to_read(start),
            workers=self._workers,
            lookahead=max(2 * self._workers, self.spec.pool_blocks // 4),
        )
        position = start
        while True:
            epoch = position // self.batches_per_epoch
            order = self._order_at(position)
            ready: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
            expected = [place for place, _ in order.waiting()]
            while (drawn := order.draw()) is not None:
                while expected and expected[0] <= drawn[:, 0].max():
                    ready |= _by_row(expected.pop(0), *next(rendered))
                pixels, targets = zip(*(ready.pop((p, r)) for p, r in drawn.tolist()), strict=True)
                yield Batch(position=position, epoch=epoch, pixels=np.stack(pixels), targets=np.stack(targets))
                position += 1
            for _ in expected:  # blocks whose rows all fell into the remainder of the epoch
                next(rendered)

    def _order_at(self, position: int) -> EpochOrder:
        """The order of the position's epoch, with the batches before it drawn."""
        epoch, done = divmod(position, self.batches_per_epoch)
        order = EpochOrder(self._block_rows, self.spec, epoch)
        for _ in range(done):
            order.draw()
        return order

    def _blocks_to_read(self, start: int) -> Iterator[tuple[_Block, Int64[np.ndarray, " row"], int]]:
        """Yield (block, rows within it, epoch) in the order in which batches will ask for them."""
        position = start
        while True:
            epoch = position // self.batches_per_epoch
            order = self._order_at(position)
            for place, rows in order.waiting():
                yield self._blocks[order.order[place]], rows, epoch
            position = (epoch + 1) * self.batches_per_epoch

    def _render(
        self, job: tuple[_Block, Int64[np.ndarray, " row"], int]
    ) -> tuple[Int64[np.ndarray, " row"], np.ndarray, np.ndarray]:
        """Rows within the block, their views' pixels and the teacher's features of the same views."""
        block, within, epoch = job
        slide, rows = block.slide, block.rows[within]
        views = 1 + (slide.hashes[rows, 0] + np.uint64(epoch)) % np.uint64(self.spec.n_augmented)
        params = slide.params[rows, views][:, None]
        rendered = render_block(slide.reader, rows.tolist(), params, np.zeros(len(rows), np.uint8), self._views)
        if rendered.reasons:
            raise ReadError(
                f"slide {slide.slide_id}: a patch that stage one read cannot be read now, "
                f"{next(iter(rendered.reasons.values()))}"
            )
        _require_same_pixels(slide, rows, views, rendered.hashes[:, 0])
        return within, rendered.pixels[:, 0], _targets(slide, self.spec.encoder, rows, views)


def _blocks_of(slide: _OpenSlide, chosen: Int64[np.ndarray, " row"]) -> list[_Block]:
    """A slide's blocks with the chosen rows that lie in them."""
    chosen = np.sort(chosen)
    edges = np.searchsorted(chosen, slide.cells)
    return [_Block(slide, chosen[a:b]) for a, b in edges.tolist() if b > a]


def _by_row(
    position: int, rows: np.ndarray, pixels: np.ndarray, targets: np.ndarray
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    return {(position, int(row)): (pixels[i], targets[i]) for i, row in enumerate(rows)}


def _require_same_pixels(slide: _OpenSlide, rows: np.ndarray, views: np.ndarray, hashes: np.ndarray) -> None:
    """Refuse pixels that the teacher did not see. Hashing costs 4 % of augmenting, so every view is checked."""
    other = np.flatnonzero(slide.hashes[rows, views] != hashes)
    if len(other):
        i = int(other[0])
        raise StoreMismatchError(
            f"slide {slide.slide_id}, row {rows[i]}, view {views[i]}: the pixels are not those that the teacher saw. "
            "Likely another version of OpenSlide or OpenCV than the one that made the store (g2l store info); "
            "use that version, or cache again"
        )


def _targets(slide: _OpenSlide, encoder: str, rows: np.ndarray, views: np.ndarray) -> Float16[np.ndarray, "row dim"]:
    """The teacher's features, one contiguous read for each view that occurs."""
    start, stop = int(rows.min()), int(rows.max()) + 1
    out = np.empty((len(rows), slide.stored.features_array(encoder).shape[2]), np.float16)
    for view in np.unique(views).tolist():
        read = slide.stored.read_rows(encoder, start, stop, view=view)
        out[views == view] = read[rows[views == view] - start]
    if not np.isfinite(out).all():
        row = rows[np.flatnonzero(~np.isfinite(out).all(axis=1))[0]]
        raise StoreCorruptError(
            f"slide {slide.slide_id}, row {row}: stored features of {encoder} are not finite; run g2l store verify"
        )
    return out


@dataclass(frozen=True, kw_only=True)
class CanonicalSet:
    """Canonical views with the teacher's features of them, held in memory."""

    pixels: UInt8[np.ndarray, "n height width 3"]
    targets: Float16[np.ndarray, "n dim"]


def read_canonical(
    store: FeatureStore, rows: Mapping[str, Int64[np.ndarray, " row"]], encoder: str, *, limit: int, seed: int
) -> CanonicalSet:
    """View 0 of some rows, at most `limit` of them, drawn at random over all slides.

    Raises:
        StoreMissingError: The teacher's canonical view is not complete, or there are no rows.
    """
    total = sum(map(len, rows.values()))
    if not total:
        raise StoreMissingError("no patches are held out")
    kept = np.zeros(total, bool)
    kept[keyed_generator("validation", seed).permutation(total)[:limit]] = True
    pixels, targets, first = [], [], 0
    spec = ViewSpec(**store.views)
    for slide_id, chosen in sorted(rows.items()):
        mine = np.sort(chosen)[kept[first : first + len(chosen)]]
        first += len(chosen)
        if not len(mine):
            continue
        slide = _OpenSlide(store.slide(slide_id), GridSpec(**store.grid))
        block = render_block(slide.reader, mine.tolist(), slide.params[mine, :1], np.zeros(len(mine), np.uint8), spec)
        _require_same_pixels(slide, mine, np.zeros(len(mine), np.int64), block.hashes[:, 0])
        pixels.append(block.pixels[:, 0])
        targets.append(slide.stored.features(encoder)[mine])
    return CanonicalSet(pixels=np.concatenate(pixels), targets=np.concatenate(targets))


def good_rows(stored: StoredSlide) -> Int64[np.ndarray, " row"]:
    """Rows of a slide that have pixels and features."""
    return np.flatnonzero(stored.patch_status == STATUS["ok"])
