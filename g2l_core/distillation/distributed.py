"""The processes that train together: torchrun starts them, `init_distributed` connects them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from g2l_core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """This process among those that train together. A single process, the default, gathers nothing."""

    rank: int = 0
    world: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process trains."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def gather(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
        """All ranks' rows, one rank after the other; gradients flow back to the rank that each row came from."""
        if self.world == 1:
            return z
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(z.contiguous()))

    def local(self, z: Float[Tensor, "all d"]) -> Float[Tensor, "n d"]:
        """This rank's part of gathered rows."""
        return z.chunk(self.world)[self.rank]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over ranks after every backward pass."""
        if self.world == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def mean(self, value: float) -> float:
        """The mean of a value over ranks, the same on each rank."""
        if self.world == 1:
            return value
        dtype = torch.float32 if self.device.type == "cuda" else torch.float64
        total = torch.tensor(value, dtype=dtype, device=self.device)
        distributed.all_reduce(total)
        return float(total) / self.world

    def wait(self) -> None:
        """Return once every rank has called this."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def init_distributed(device: torch.device) -> Iterator[ProcessGroup]:
    """Connect the processes that torchrun started, and disconnect them at the end of the block.

    Args:
        device: Where to train. On GPUs each process takes the one with its local rank.

    Yields:
        This process's group: a single process where torchrun did not start it.

    Raises:
        UsageError: There are more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UsageError(f"{local_rank + 1} processes need as many GPUs, this machine has {n_gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield ProcessGroup(rank=rank, world=world, device=device)
    finally:
        distributed.destroy_process_group()
