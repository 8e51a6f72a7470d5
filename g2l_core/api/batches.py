"""Batches of patches for a torch DataLoader."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from g2l_core.api.row_blocks import RowBlocks


class PatchBatches(IterableDataset[dict[str, Any]]):
    """The readable patches of a cohort in batches, a torch IterableDataset. `Cohort.torch` makes it.

    A batch is a dict: `features` float32 (n, dim), `index` int64 (n,), the places in the cohort's table of patches, and
    with a label `target` int64 (n,), the place of the label among `classes`, -1 where a patch has none. Give a
    DataLoader `batch_size=None`; its workers share the patches.

    Attributes:
        classes: The different labels, sorted.
    """

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks
        self.classes = blocks.classes
        self._places = {name: place for place, name in enumerate(self.classes)}

    def set_epoch(self, epoch: int) -> None:
        """Take the patches in another random order."""
        self._blocks.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        for block in self._blocks.share(info.id, info.num_workers) if info else self._blocks:
            batch = {"features": torch.from_numpy(block.features), "index": torch.from_numpy(block.index)}
            targets = [self._places.get(name, -1) for name in block.labels.tolist()]
            yield batch | ({"target": torch.tensor(targets)} if self._blocks.options.label else {})

    def __repr__(self) -> str:
        return f"<PatchBatches of {self._blocks!r}>"
