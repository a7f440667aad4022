"""A decoder whose weights are spread over ranks, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Every rank keeps some rows of each weight; all have a layer's whole weights only while they compute it. The decoder is
made without values (on the device `meta`), and each rank then reads its own rows, and no others, from the files. A
file of weights or of a checkpoint is one and the same however many ranks wrote it: rows are gathered on rank 0, one
tensor at a time. Adapters are whole on every rank, since they are small: their gradients are summed as without
sharding.
"""

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.model.read_in_place import Reader
from ptst.model.weights import empty_decoder, find_weights
from ptst.reading import check_header, check_regular
from ptst.storage import atomic_path

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Part = tuple[str, Tensor]
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a tensor of `shape`: what a rank keeps of it, possibly none."""

    shape: torch.Size
    start: int
    stop: int

    @classmethod
    def of(cls, shape: torch.Size, rank: int, size: int) -> "Rows":
        """Those of one of `size` ranks, as `fully_shard` divides a tensor (and torch.chunk): the first ranks have as
        many as any, the last may have fewer or none."""
        most = -(-shape[0] // size)
        return cls(shape, min(rank * most, shape[0]), min((rank + 1) * most, shape[0]))

    @property
    def own_shape(self) -> torch.Size:
        return torch.Size([self.stop - self.start, *self.shape[1:]])


def load_sharded_decoder(
    folder: Path | str, dtype: torch.dtype, mesh: "DeviceMesh", lora: LoraConfig | None, seed: int = 0
) -> tuple[Decoder, dict[str, nn.Parameter]]:
    """The decoder of a folder, spread over the ranks of `mesh`, and its trained parameters by name: adapters, whole on
    every rank, over a frozen base of `dtype`; or with `lora` None all weights, in float32 or wider (which makes them
    their own master weights) and computed in `dtype`. Gradients of weights are summed over the ranks in float32 or
    wider, not averaged. All ranks must call. Raises UserError as `load_decoder`."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes a second

    decoder = empty_decoder(folder)
    stored = find_weights(folder, decoder)
    wide = torch.promote_types(dtype, torch.float32)
    decoder.to(wide if lora is None else dtype).requires_grad_(lora is None)
    adapters = add_lora(decoder, lora, seed, mesh.device_type) if lora else {}
    values = {name: p.detach().clone() for name, p in adapters.items()}
    computed = MixedPrecisionPolicy(dtype, wide, cast_forward_inputs=False) if lora is None else None
    for module in (*decoder.layers, decoder):
        fully_shard(
            module,
            mesh=mesh,
            # The head is used after the decoder's own forward pass.
            reshard_after_forward=module is not decoder,
            mp_policy=computed or MixedPrecisionPolicy(cast_forward_inputs=False),
            ignored_params=set(adapters.values()),
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only
    decoder.to_empty(device=mesh.device_type)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        with Reader() as reader:
            for key in reader.in_file_order(stored):
                rows = rows_of(parameters[key])
                assert rows is not None
                # Masters begin as the weights, rounded.
                reader.read(stored[key], own_rows(parameters[key]), rows.start, via=dtype)
    decoder.sharded = True
    return decoder.eval(), {name: p for name, p in parameters.items() if lora is None or name in values}


def rows_of(parameter: Tensor) -> Rows | None:
    """Which rows of a parameter this rank keeps; None where it keeps all of it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    rows = Rows.of(parameter.shape, mesh.get_local_rank(), mesh.size())
    assert parameter.to_local().shape == rows.own_shape, "fully_shard divides otherwise"
    return rows


def own_rows(parameter: Tensor) -> Tensor:
    """The rows of a sharded parameter, or of its gradient, that this rank keeps: a view, detached."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def release(decoder: Decoder) -> None:
    """Give up weights that are whole since a forward pass, so that the next one gathers them anew."""
    from torch.distributed.fsdp import FSDPModule

    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def read_parts(path: Path, rows: Mapping[str, Rows], names: Collection[str] | None = None) -> Iterator[Part]:
    """(name, tensor) of a file; of those in `rows` these rows, and the others are not read. `names`: of these alone.
    Raises UserError for a file that is missing or damaged or has two tensors of one name, and for a tensor of another
    shape than its rows are of."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            check_header(path)
            found = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118
        for name in found:
            with safe_open(path, framework="pt") as file:  # anew: pages that were read count as long as it is open
                stored, part = file.get_slice(name), rows.get(name)
                if part is None:
                    yield name, file.get_tensor(name).clone()
                    continue
                if (shape := torch.Size(stored.get_shape())) != part.shape:
                    raise UserError(f"{name} has shape {list(shape)}, not {list(part.shape)}", where=path)
                yield name, stored[part.start : part.stop].clone()  # a view would keep the file's pages
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise UserError(f"truncated or damaged ({error})", "fetch the file again", path) from None


def gather_rows(own: Tensor, rows: Rows, rank: int, size: int) -> Tensor | None:
    """A whole tensor, on rank 0's host, from the rows of all ranks; None on the others. All must call."""
    most = Rows.of(rows.shape, 0, size).own_shape
    padded = own.new_zeros(most)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat(parts)[: rows.shape[0]].cpu()


def write_tensors(
    path: Path, described: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time. `tensors`: in the order of `described`,
    which has wider types first, so that each lies at a multiple of its size. The library would write the same bytes."""
    sizes = {name: dtype.itemsize * shape.numel() for name, (dtype, shape) in described.items()}
    assert list(sizes) == in_file_order(described)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), (wanted, (dtype, shape)) in zip(tensors, described.items(), strict=True):
            assert (name, tensor.dtype, tensor.shape) == (wanted, dtype, shape)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def in_file_order(described: Mapping[str, tuple[torch.dtype, torch.Size]]) -> list[str]:
    """Names in the order of a safetensors file: wider types first, then by name."""
    return sorted(described, key=lambda name: (-described[name][0].itemsize, name))
