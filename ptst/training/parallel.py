"""Several ranks under `torchrun`, as plain data parallelism: every rank holds the whole model, computes its share of a
step's micro-batches, and the gradients are summed. The divisor of the loss (trained tokens of the whole step) is known
to every rank beforehand, as all compute the same plan.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**25  # elements summed at once


@dataclass(frozen=True)
class World:
    """This process's place among `size` ranks."""

    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """A number summed over the ranks (all must call)."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(total)
        return float(total)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 alone at first, then the others: for files that rank 0 fetches or writes and the others
        then find."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()


ALONE = World()


@contextmanager
def world() -> Iterator[World]:
    """The ranks that `torchrun` started, over nccl on GPUs and gloo on CPUs; without it, this process alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Rank 0 may be sampling answers while the others wait.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensors: Iterable[Tensor], world: World) -> None:
    """Sum tensors over the ranks in place, in flat buckets. All ranks must give the same shapes in the same order."""
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            _sum(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum(bucket)


def _sum(bucket: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
