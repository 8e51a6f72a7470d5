"""Which patches make which batch: the order of an epoch, a function of (seed, epoch) alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from g2l_core.rng import keyed_generator

BLOCK_ROWS = 64
"""Rows of a whole cell, for turning a number of blocks into a number of rows."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """One epoch, drawn to its end. Places count the blocks in the epoch's random order."""

    order: Int64[np.ndarray, " block"]
    """The block at each place."""
    batches: Int32[np.ndarray, "step batch 2"]
    """(place, row within the block) of every row of every whole batch; 8 bytes a patch."""

    def jobs(self, first: int, share: slice) -> list[tuple[int, Int64[np.ndarray, " _"]]]:
        """What one rank has to read from step `first` on, in the order in which its batches will ask for it.

        Args:
            first: Step within the epoch.
            share: The part of every batch that is the rank's.

        Returns:
            (place, rows within that block, increasing), places increasing.
        """
        mine = self.batches[first:, share].reshape(-1, 2).astype(np.int64)
        mine = mine[np.lexsort((mine[:, 1], mine[:, 0]))]
        places, starts = np.unique(mine[:, 0], return_index=True)
        rows = np.split(mine[:, 1], starts[1:]) if len(places) else []
        return list(zip(places.tolist(), rows, strict=True))


def plan_epoch(block_rows: Sequence[int], *, batch_size: int, pool_blocks: int, seed: int, epoch: int) -> EpochPlan:
    """Draw an epoch's batches from a sliding pool of blocks: without replacement, whole batches only.

    The remainder, fewer rows than a batch, is left out: it would distort batch statistics.

    Args:
        block_rows: Rows of each block.
        batch_size: Rows of a batch, of all ranks together.
        pool_blocks: Blocks' worth of rows that a batch is drawn from: 256 give a batch of 32 rows of 30 blocks.
        seed: Names the order.
        epoch: Which.
    """
    rng = keyed_generator("epoch", seed, epoch)
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
        while taken < len(rows) and len(pool) < pool_blocks * BLOCK_ROWS:
            end = int(ends[rows[taken, 0]])
            pool, taken = np.concatenate([pool, rows[taken:end]]), end
        picks = rng.choice(len(pool), batch_size, replace=False)
        batches[step] = pool[picks]
        pool = np.delete(pool, picks, axis=0)
    return EpochPlan(order=order, batches=batches)
