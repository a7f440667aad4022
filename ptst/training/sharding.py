"""Training a decoder whose weights are spread over ranks (ptst/model/sharded_weights.py).

Every pass through the decoder is a collective operation: a rank that has no micro-batch left passes two tokens whose
loss counts for nothing, for as long as another rank has one. Gradients of weights arrive summed and divided into rows
after each micro-batch, so that no rank ever holds all of them; each rank updates its rows, which are float32 and so
their own masters.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ptst.data.packing import IGNORE_INDEX, Batch, rank_micro_batches
from ptst.model.decoder import Decoder
from ptst.model.loss import batch_loss
from ptst.model.sharded_weights import Rows, gather_rows, own_rows, release, rows_of
from ptst.training.masters import Masters
from ptst.training.parallel import World, sum_over_ranks
from ptst.training.schedule import WeightUpdate

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NOTHING = Batch([0, 0], [0, 1], [0, 2], [0, IGNORE_INDEX], [0])


def idle_passes(decoder: Decoder, lengths: Sequence[int], micro_batch_tokens: int, world: World) -> int:
    """How many passes this rank makes for the sake of others, after its own micro-batches of documents of these
    lengths; none where the decoder is not sharded."""
    if not decoder.sharded:
        return 0
    counts = [len(rank_micro_batches(lengths, micro_batch_tokens, r, world.size)) for r in range(world.size)]
    return max(counts) - counts[world.rank]


def idle_loss(decoder: Decoder) -> Tensor:
    """A loss of zero, with a gradient of zero for every trained weight."""
    return 0 * batch_loss(decoder, _NOTHING, 1.0)


def masters_of(
    decoder: Decoder, parameters: Mapping[str, nn.Parameter], update: WeightUpdate, seed: int, world: World
) -> Masters:
    """What the optimizer updates: rows of sharded weights, or else what `Masters` says."""
    if decoder.sharded and any(rows_of(p) for p in parameters.values()):
        return ShardedMasters(decoder, parameters, world)
    return Masters(parameters, update, seed)


class ShardedMasters(Masters):
    """The rows that this rank keeps of `parameters`, by the same names: views, so that writing them is writing the
    weights. `rows`: which."""

    def __init__(self, decoder: Decoder, parameters: Mapping[str, nn.Parameter], world: World):
        super().__init__({}, "master", 0)
        self.decoder, self.parameters, self.world = decoder, parameters, world
        self.weights = {name: nn.Parameter(own_rows(p)) for name, p in parameters.items()}
        found = {name: rows_of(p) for name, p in parameters.items()}
        self.rows = {name: rows for name, rows in found.items() if rows is not None}

    @property
    def written(self) -> Collection[Tensor]:
        return self.weights.values()

    def write(self) -> None:
        """Give up what is whole of earlier values."""
        release(self.decoder)

    def step(self, optimizer: Optimizer, number: int) -> None:
        optimizer.step()
        self.write()

    def sum_gradients(self, losses: Tensor, pull: Callable[[], Tensor] | None, clip: float) -> Tensor:
        """Give the rows their gradients, summed over the ranks already, sum losses, add the pull of an anchor, and clip
        the gradients; returns their norm before clipping, which is that of the whole weights. All ranks must call."""
        for name, parameter in self.parameters.items():
            own = self.weights[name]
            own.grad = torch.zeros_like(own) if parameter.grad is None else own_rows(parameter.grad)
            parameter.grad = None
        if pull is not None:
            losses[1] += pull()  # of this rank's rows
        sum_over_ranks([losses], self.world)
        weights = list(self.weights.values())
        grads = [w.grad for w in weights if w.grad is not None]
        square = nn.utils.get_total_norm(grads).double().square()
        dist.all_reduce(square)
        norm = square.sqrt().to(grads[0].dtype)
        nn.utils.clip_grads_with_norm_(weights, clip, norm)
        return norm


def gathered(tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], world: World) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) on rank 0's host, one after another, in the order of `tensors`; on the others nothing, but
    all must iterate. `rows`: what this rank keeps, by name; others are whole on every rank."""
    for name, tensor in tensors.items():
        found: Tensor | None = tensor.detach()
        if name in rows:
            found = gather_rows(tensor.detach(), rows[name], world.rank, world.size)
        if world.is_main_process:
            assert found is not None
            yield name, found.cpu()


def mesh_of(world: World) -> "DeviceMesh":
    """All ranks in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
