"""The stream of (view pixels, teacher features) that distillation learns from, as a dataset for PyTorch.

`sampling` decides which rows make which batch, `replay` reads the rows, and the dataset here joins them. The stream is
a function of the spec alone: not of the number of threads or ranks, nor of where a run was interrupted. A position in
it is one integer, the number of batches before it.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, UInt8
from torch.utils.data import IterableDataset, get_worker_info

from g2l_core.concurrency import run_ahead
from g2l_core.distillation.replay import ChosenRows, Given, ReplaySource, ReplaySpec
from g2l_core.distillation.sampling import BatchOrder, BlockRead
from g2l_core.errors import UsageError
from g2l_core.patches.pixel_cache import PixelCache
from g2l_core.store.features import FeatureStore


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


class Batch(NamedTuple):
    """What the student sees at one step, on one rank. As a named tuple, a DataLoader makes tensors of its arrays."""

    position: int
    epoch: int
    pixels: UInt8[np.ndarray, "batch *view height width 3"]
    """With an axis for views where several of a patch are shown at once."""
    targets: Float16[np.ndarray, "batch dim"]
    """The teacher's features of the pixels; without columns where the teacher runs live."""


class ReplayDataset(IterableDataset[Batch]):
    """An endless stream of whole batches, for `DataLoader(dataset, batch_size=None, num_workers=0)` or without one.

    It reads ahead in threads of its own, so a DataLoader must not add worker processes. `state_dict` holds the position
    of the next batch; a dataset that loads it continues with the same batches, bit for bit.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: ChosenRows,
        spec: ReplaySpec,
        reading: Reading | None = None,
        given: Given | None = None,
    ) -> None:
        """Open the slides and check that everything needed is there.

        Args:
            store: The store, with complete features of the teacher for `spec.views`.
            rows: Stored rows to train on, by slide id; None for all good rows of a slide.
            spec: What is replayed, and in which order.
            reading: How it is read.
            given: Targets that no encoder gives.

        Raises:
            StoreMissingError: A slide misses views of the teacher.
            StoreMismatchError: A slide's file has changed.
            StoreCorruptError: Targets that are held in memory are not finite.
            UsageError: There are fewer rows than a batch has, or a batch cannot be parted among the ranks.
        """
        self.spec, self._reading = spec, reading or Reading()
        rank, world = self._reading.rank, self._reading.world
        share, rest = divmod(spec.batch_size, world)
        if rest or share < 1:
            raise UsageError(f"a batch of {spec.batch_size} cannot be parted among {world} ranks")
        self._source = ReplaySource(store, rows, spec, self._reading.pixel_cache, given)
        block_rows = self._source.block_rows
        total = int(block_rows.sum(dtype=np.int64))
        if total < spec.batch_size:
            raise UsageError(
                f"{total} patches to train on are fewer than one batch of {spec.batch_size}: "
                "cache more slides, or lower --batch-size"
            )
        self._source.preload_targets(self._reading.targets_gb)
        self._order = BatchOrder(
            block_rows,
            batch_size=spec.batch_size,
            pool_blocks=spec.pool_blocks,
            seed=spec.seed,
            share=slice(rank * share, (rank + 1) * share),
        )
        self._position = 0

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch. The remainder is left out, since it would distort batch statistics."""
        return self._order.batches_per_epoch

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch that iterating yields."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin at a position."""
        self._position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from the position that was loaded, or where the last iteration ended.

        Raises:
            UsageError: A DataLoader runs this in a worker process.
        """
        if get_worker_info() is not None:
            raise UsageError("the replayed stream reads ahead in threads of its own: use DataLoader(num_workers=0)")
        for batch in self.batches(self._position):
            self._position = batch.position + 1
            yield batch

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield this rank's part of the batches without end, from position `start` on, whatever the state.

        Raises:
            ReadError: A patch cannot be read.
            StoreMismatchError: The pixels are not those that the teacher saw.
            StoreCorruptError: The features are not finite.
        """
        # Threads read the blocks in the order in which the batches below need them, some blocks ahead.
        blocks = run_ahead(
            self._read,
            self._order.reads(start),
            workers=self._reading.workers,
            lookahead=max(2 * self._reading.workers, self.spec.pool_blocks // 4),
        )
        # Rows that have been read and wait for their batch, by (place of their block, row within it).
        waiting: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        newest = (-1, -1)
        for batch in self._order.batches(start):
            # Blocks come by epoch and place. So the batch is complete once the last of its blocks has come.
            last = (batch.epoch, int(batch.rows[:, 0].max()))
            while newest < last:
                read, pixels, targets = next(blocks)
                newest = (read.epoch, read.place)
                waiting |= {(read.place, row): (pixels[i], targets[i]) for i, row in enumerate(read.rows.tolist())}
            # Each row belongs to one batch, so it is taken out; none is left at the end of an epoch.
            rows = [waiting.pop((place, row)) for place, row in batch.rows.tolist()]
            yield Batch(
                position=batch.position,
                epoch=batch.epoch,
                pixels=np.stack([pixels for pixels, _ in rows]),
                targets=np.stack([targets for _, targets in rows]),
            )

    def _read(self, read: BlockRead) -> tuple[BlockRead, np.ndarray, np.ndarray]:
        """A block's rows with their pixels and targets."""
        return read, *self._source.read(read.block, read.rows, read.epoch)
