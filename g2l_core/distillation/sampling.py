"""The order of batches: which patches make which batch, a function of (seed, position) alone.

Every epoch puts the blocks (the cells of a slide) into a new random order. A pool of blocks slides over that order, and
each batch is drawn from the pool. Nothing here reads a patch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from jaxtyping import Int32, Int64

from g2l_core.rng import keyed_generator

BLOCK_ROWS = 64
"""Rows of a whole cell, for turning a number of blocks into a number of rows."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """All batches of one epoch. Places count the blocks in the epoch's random order."""

    order: Int64[np.ndarray, " block"]
    """The block at each place."""
    batches: Int32[np.ndarray, "step batch 2"]
    """(place, row within the block) of every row of every whole batch; 8 bytes a patch."""

    def reads(self, first: int, share: slice) -> list[tuple[int, Int64[np.ndarray, " _"]]]:
        """What one rank has to read from step `first` on, in the order in which its batches will need it.

        Args:
            first: Step within the epoch.
            share: The part of every batch that is the rank's.

        Returns:
            (place, rows within that block, increasing), places increasing.
        """
        rows = self.batches[first:, share].reshape(-1, 2).astype(np.int64)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        places, starts = np.unique(rows[:, 0], return_index=True)
        rows_by_place = np.split(rows[:, 1], starts[1:]) if len(places) else []
        return list(zip(places.tolist(), rows_by_place, strict=True))


def plan_epoch(block_rows: Sequence[int], *, batch_size: int, pool_blocks: int, seed: int, epoch: int) -> EpochPlan:
    """Draw an epoch's batches from a sliding pool of blocks, without replacement.

    The remainder, fewer rows than a batch, is left out: it would distort batch statistics.

    Args:
        block_rows: Rows of each block.
        batch_size: Rows of a batch, of all ranks together.
        pool_blocks: Size of the pool, in blocks of `BLOCK_ROWS` rows. With 256, a batch of 32 has rows of 30 blocks.
        seed: Random seed.
        epoch: Number of the epoch.
    """
    rng = keyed_generator("epoch", seed, epoch)
    # Every row as (place, row within the block), in the random order of the blocks.
    order = rng.permutation(len(block_rows))
    sizes = np.asarray(block_rows)[order]
    places = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    within = (np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)).astype(np.int32)
    rows = np.stack([places, within], axis=1)
    steps = len(rows) // batch_size
    batches = np.empty((steps, batch_size, 2), np.int32)
    pool, taken = rows[:0], 0
    ends = np.cumsum(sizes)
    for step in range(steps):
        # Fill the pool with whole blocks, then take a random batch out of it.
        while taken < len(rows) and len(pool) < pool_blocks * BLOCK_ROWS:
            end = int(ends[rows[taken, 0]])
            pool, taken = np.concatenate([pool, rows[taken:end]]), end
        picks = rng.choice(len(pool), batch_size, replace=False)
        batches[step] = pool[picks]
        pool = np.delete(pool, picks, axis=0)
    return EpochPlan(order=order, batches=batches)


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
        self, block_rows: Sequence[int], *, batch_size: int, pool_blocks: int, seed: int, share: slice
    ) -> None:
        """Draw nothing yet: an epoch is drawn when it is first asked for.

        Args:
            block_rows: Rows of each block.
            batch_size: Rows of a batch, of all ranks together.
            pool_blocks: As for `plan_epoch`.
            seed: Random seed.
            share: The part of every batch that is the rank's.
        """
        self.batches_per_epoch = sum(block_rows) // batch_size
        self._share = share

        @lru_cache(2)  # reads can be an epoch ahead of batches
        def plan(epoch: int) -> EpochPlan:
            return plan_epoch(block_rows, batch_size=batch_size, pool_blocks=pool_blocks, seed=seed, epoch=epoch)

        self._plan = plan

    def _epochs(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, its first step) from position `start` on, without end."""
        epoch, step = divmod(start, self.batches_per_epoch)
        yield epoch, step
        yield from ((later, 0) for later in count(epoch + 1))

    def batches(self, start: int) -> Iterator[BatchRows]:
        """Yield the batches from position `start` on, without end."""
        position = count(start)
        for epoch, first in self._epochs(start):
            for rows in self._plan(epoch).batches[first:, self._share]:
                yield BatchRows(position=next(position), epoch=epoch, rows=rows)

    def reads(self, start: int) -> Iterator[BlockRead]:
        """Yield what has to be read for these batches, in the order in which they need it."""
        for epoch, first in self._epochs(start):
            plan = self._plan(epoch)
            for place, rows in plan.reads(first, self._share):
                yield BlockRead(epoch=epoch, place=place, block=int(plan.order[place]), rows=rows)
