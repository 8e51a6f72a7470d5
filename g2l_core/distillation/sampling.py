"""The order of batches: which patches make which batch, a function of (seed, position) alone.

Every epoch puts the blocks (up to 64 stored rows of a slide) into a new random order and cuts it into segments of a
million patches. A pool of blocks slides over a segment, and each batch is drawn from the pool. A segment is planned
when it is needed, so that only 4 bytes a block grow with the cohort. Nothing here reads a patch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from g2l_core.rng import keyed_generator
from g2l_core.store.schema import REPLAY_ROWS

SEGMENT_BLOCKS = 16_384
"""Blocks that are planned together, a million patches: their plan takes 50 MB and, on one core, some seconds."""

BlockRows = UInt8[np.ndarray, " block"]
"""Rows of each block."""


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """All batches of one segment of an epoch. Places count the blocks in the epoch's random order."""

    first_place: int
    """The place of the segment's first block."""
    batches: Int32[np.ndarray, "step batch 2"]
    """(place, row within the block) of every row of every whole batch; 8 bytes a patch."""

    def reads(self, steps: slice, share: slice) -> list[tuple[int, Int64[np.ndarray, " _"]]]:
        """What one rank has to read for some steps, in the order in which its batches will need it.

        Args:
            steps: Steps within the segment.
            share: The part of every batch that is the rank's.

        Returns:
            (place, rows within that block, increasing), places increasing.
        """
        rows = self.batches[steps, share].reshape(-1, 2).astype(np.int64)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        places, starts = np.unique(rows[:, 0], return_index=True)
        rows_by_place = np.split(rows[:, 1], starts[1:]) if len(places) else []
        return list(zip(places.tolist(), rows_by_place, strict=True))


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The random order of an epoch's blocks, and how it is cut into segments."""

    epoch: int
    order: Int32[np.ndarray, " place"]
    """The block at each place."""
    steps: Int64[np.ndarray, " segment"]
    """Whole batches of each segment."""


def plan_segment(
    sizes: BlockRows, *, batch_size: int, pool_blocks: int, rng: np.random.Generator, first_place: int = 0
) -> SegmentPlan:
    """Draw a segment's batches from a sliding pool of blocks, without replacement.

    The remainder, fewer rows than a batch, is left out: it would distort batch statistics.

    Args:
        sizes: Rows of the block at each place.
        batch_size: Rows of a batch, of all ranks together.
        pool_blocks: Size of the pool, in blocks of `REPLAY_ROWS` rows. With 256, a batch of 32 has rows of 30 blocks.
        rng: Draws the batches.
        first_place: The place of the first block.
    """
    places = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    ends = np.cumsum(sizes, dtype=np.int64)
    within = (np.arange(len(places)) - np.repeat(ends - sizes, sizes)).astype(np.int32)
    steps = len(places) // batch_size
    batches = np.empty((steps, batch_size, 2), np.int32)
    # The pool holds indices into `places` and `within`, of which every row of the segment is one.
    pool, taken = np.empty(0, np.int32), 0
    for step in range(steps):
        # Fill the pool with whole blocks, then take a random batch out of it.
        while taken < len(places) and len(pool) < pool_blocks * REPLAY_ROWS:
            end = int(ends[places[taken]])
            pool, taken = np.concatenate([pool, np.arange(taken, end, dtype=np.int32)]), end
        picks = rng.choice(len(pool), batch_size, replace=False)
        batches[step, :, 0], batches[step, :, 1] = places[pool[picks]], within[pool[picks]]
        stays = np.ones(len(pool), bool)
        stays[picks] = False
        pool = pool[stays]
    batches[..., 0] += first_place
    return SegmentPlan(first_place=first_place, batches=batches)


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """One rank's part of the batch at a position."""

    position: int
    epoch: int
    rows: Int32[np.ndarray, "batch 2"]
    """(place, row within the block), in the batch's order."""


@dataclass(frozen=True, kw_only=True)
class BlockRead:
    """The rows of one block that a rank needs in one epoch."""

    epoch: int
    place: int
    block: int
    """Index of the block."""
    rows: Int64[np.ndarray, " _"]
    """Rows within the block, increasing."""


class BatchOrder:
    """The endless order of one rank's batches, and the order in which it has to read blocks for them."""

    def __init__(
        self,
        block_rows: BlockRows,
        *,
        batch_size: int,
        pool_blocks: int,
        seed: int,
        share: slice,
        segment_blocks: int = SEGMENT_BLOCKS,
    ) -> None:
        """Draw nothing yet: a segment is drawn when it is first asked for.

        Args:
            block_rows: Rows of each block.
            batch_size: Rows of a batch, of all ranks together.
            pool_blocks: As for `plan_segment`.
            seed: Random seed.
            share: The part of every batch that is the rank's.
            segment_blocks: Blocks of a segment.
        """
        n_segments = max(1, -(-len(block_rows) // segment_blocks))
        # Each segment leaves fewer rows than a batch, so this many batches are in every epoch, whatever its order.
        self.batches_per_epoch = max(0, int(block_rows.sum(dtype=np.int64)) // batch_size - (n_segments - 1))
        self._share = share
        starts = np.arange(0, max(1, len(block_rows)), segment_blocks)

        def order_of(epoch: int) -> tuple[EpochOrder, np.random.Generator]:
            rng = keyed_generator("epoch", seed, epoch)
            order = rng.permutation(len(block_rows)).astype(np.int32)
            rows = np.add.reduceat(block_rows[order], starts, dtype=np.int64)
            return EpochOrder(epoch=epoch, order=order, steps=rows // batch_size), rng

        @lru_cache(2)  # reads can be an epoch ahead of batches
        def order(epoch: int) -> EpochOrder:
            return order_of(epoch)[0]

        @lru_cache(2)  # and a segment
        def plan(epoch: int, segment: int) -> SegmentPlan:
            # One segment goes on with the generator that drew the order, as every epoch did before there were more.
            rng = keyed_generator("epoch", seed, epoch, segment) if segment else order_of(epoch)[1]
            first = int(starts[segment])
            sizes = block_rows[order(epoch).order[first : first + segment_blocks]]
            return plan_segment(sizes, batch_size=batch_size, pool_blocks=pool_blocks, rng=rng, first_place=first)

        self._order, self._plan = order, plan

    def _segments(self, start: int) -> Iterator[tuple[EpochOrder, int, slice]]:
        """Yield (epoch, segment, its steps) from position `start` on, without end."""
        first_epoch, step = divmod(start, self.batches_per_epoch)
        for epoch in count(first_epoch):
            order = self._order(epoch)
            left = self.batches_per_epoch - step
            for segment, steps in enumerate(order.steps.tolist()):
                skipped = min(step, steps)
                taken = min(steps - skipped, left)
                step, left = step - skipped, left - taken
                if taken:
                    yield order, segment, slice(skipped, skipped + taken)
            step = 0

    def batches(self, start: int) -> Iterator[BatchRows]:
        """Yield the batches from position `start` on, without end."""
        position = count(start)
        for order, segment, steps in self._segments(start):
            for rows in self._plan(order.epoch, segment).batches[steps, self._share]:
                yield BatchRows(position=next(position), epoch=order.epoch, rows=rows)

    def reads(self, start: int) -> Iterator[BlockRead]:
        """Yield what has to be read for these batches, in the order in which they need it."""
        for order, segment, steps in self._segments(start):
            for place, rows in self._plan(order.epoch, segment).reads(steps, self._share):
                yield BlockRead(epoch=order.epoch, place=place, block=int(order.order[place]), rows=rows)
