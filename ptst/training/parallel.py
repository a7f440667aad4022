"""Several ranks, as under `torchrun`: plain data parallelism: every rank holds the whole model, computes its share of a
step's micro-batches, and the gradients are summed. The divisor of the loss (trained tokens of the whole step) is known
to every rank beforehand, as all compute the same plan.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ptst.errors import UserError
from ptst.training.heartbeat import Heartbeat, own_connection
from ptst.training.launch import Launch, read_launch

BUCKET = 2**25  # elements summed at once
TO_COME = timedelta(minutes=2)  # from the first rank to the last


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
        return self._reduce(value, dist.ReduceOp.SUM)

    def sum_all(self, values: Sequence[int]) -> list[int]:
        """Whole numbers, each summed over the ranks (all must call with as many)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64, device=_on())
        dist.all_reduce(total)
        return list(map(int, total.tolist()))

    def min(self, value: float) -> float:
        """The smallest number of the ranks (all must call)."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def _reduce(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_on())
        dist.all_reduce(total, how)
        return float(total)

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, as many on each (all must call)."""
        if self.size == 1:
            return [data]
        own = torch.tensor(list(data), dtype=torch.uint8, device=_on())
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [bytes(part.tolist()) for part in parts]

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


def _on() -> str:
    """Where the backend wants its tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def world() -> Iterator[World]:
    """The ranks that a launcher started, over nccl on GPUs and gloo on CPUs; without one, this process alone.

    Raises UserError for a launcher that does not tell how ranks find each other, for ranks that do not come, and, in
    place of the broken connection that follows, where another rank has failed.
    """
    launch = read_launch()
    if not launch.several:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_device(launch))
    heartbeat = _join(launch)
    told = "stopped"  # by a signal, unless it ends otherwise
    try:
        yield World(launch.rank, launch.size)
        told = ""
    except SystemExit:
        told = ""
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError) and _broken(error):
            raise UserError(told := heartbeat.why()) from None
        raise
    finally:
        heartbeat.stop(told)
        dist.destroy_process_group()


def _join(launch: Launch) -> Heartbeat:
    """Become a member of the group. Raises UserError where not all ranks come."""
    try:
        meeting = dist.rendezvous("env://", launch.rank, launch.size, timeout=TO_COME)
        store, _, _ = next(iter(meeting))
        heartbeat = Heartbeat(own_connection(store), launch.rank, launch.size)
        heartbeat.start(TO_COME.total_seconds())
        # Rank 0 may be sampling answers while the others wait.
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(hours=1),
        )
    except dist.DistError as error:
        cause = f"rank {launch.rank} of {launch.size} did not meet the others ({str(error).splitlines()[0]})"
        raise UserError(cause, "see what the other ranks say, and check MASTER_ADDR and MASTER_PORT") from None
    return heartbeat


def _device(launch: Launch) -> int:
    """The GPU of this rank. Raises UserError where the launcher does not tell the rank on this node."""
    count = torch.cuda.device_count()
    local = 0 if launch.local_rank is None and count == 1 else launch.local_rank
    if local is None:
        raise UserError(f"LOCAL_RANK is not set, and there are {count} GPUs", "set it to the rank on this node")
    if local >= count:
        raise UserError(f"this is process {local + 1} on a node with {count} GPUs", "start one process for each GPU")
    return local


def take_gpu(local: int | None) -> None:
    """Compute on the GPU of a worker's rank on its node (`worker_ranks`), where there are several. Raises UserError
    where it has none of its own."""
    count = torch.cuda.device_count()
    if count > 1 and local is not None:
        torch.cuda.set_device(_device(Launch(local_rank=local)))


def _broken(error: RuntimeError) -> bool:
    """Whether an error is that of a collective operation whose peer has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


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
