"""Processes that train together: torchrun starts them, this joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from g2l_core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train together; a single one gathers nothing."""

    rank: int = 0
    world: int = 1

    def gather(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
        """All ranks' rows, one rank after the other; gradients flow back to the rank that each row came from."""
        if self.world == 1:
            return z
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(z.contiguous()))

    def own(self, z: Float[Tensor, "all d"]) -> Float[Tensor, "n d"]:
        """This rank's part of gathered rows."""
        return z.chunk(self.world)[self.rank]


@dataclass(frozen=True, kw_only=True)
class ProcessGroup(Ranks):
    """This process among those that train together."""

    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over ranks after every backward pass."""
        if self.world == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def mean(self, value: float) -> float:
        """The mean of a figure over ranks, the same on each."""
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.device.type == "cuda":
            found = found.float()
        distributed.all_reduce(found)
        return float(found) / self.world

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def init_distributed(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; alone where it did not.

    Args:
        device: Where to train; on GPUs each process takes the one of its local number.

    Raises:
        UsageError: There are more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup(device=device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"{local + 1} processes need as many GPUs, this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield ProcessGroup(rank=rank, world=world, device=device)
    finally:
        distributed.destroy_process_group()
