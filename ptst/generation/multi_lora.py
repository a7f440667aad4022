"""Multi-LoRA: several adapters over one base model in one batch, each row of a step with its own.

The base product is computed once for all rows, an adapter's shrink (A) and expand (B) only for its own rows: on a GPU
in one launch each for all adapters (`StackedLora`), elsewhere one adapter after the other.

Shapes: T tokens, I inputs and O outputs of a projection, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.kernels.multi_lora import Stacked, stack
from ptst.model.adapter_files import adapter_matrices, read_lora_config
from ptst.model.config import TARGETS
from ptst.model.decoder import Decoder, LoraLinear
from ptst.model.lora import target_weights

# Projections that read the same input: one base product, one shrink and one expand for each group.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Adapter:
    """Matrices A (r, I) and B (O, r) by the name of the projection (`layers.0.self_attn.q_proj`), and the factor
    of B A (alpha / r)."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    scale: float


def read_adapter(decoder: Decoder, folder: Path) -> Adapter:
    """The adapter of a PEFT folder, for this decoder, which does not change. Raises UserError for an adapter of another
    base model, for kinds and options that are not supported, and for a damaged file."""
    config = read_lora_config(folder)
    shapes = {name: tuple(w.shape) for name, w in target_weights(decoder).items()}
    return Adapter(adapter_matrices(folder, config, shapes), config.scale)


def attached_adapter(decoder: Decoder) -> Adapter | None:
    """The adapter that is attached to the decoder (by `load_adapter` or training), or None."""
    layers = {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLinear)}
    if not layers:
        return None
    scales = {m.scale for m in layers.values()}
    assert len(scales) == 1, "one adapter has one scale"
    return Adapter({name: (m.lora_A.detach(), m.lora_B.detach()) for name, m in layers.items()}, scales.pop())


class GroupLora:
    """An adapter's matrices for one group of projections: A stacked, B block-diagonal."""

    def __init__(self, a_rI: Tensor, b_Or: Tensor):
        self.a_Ir, self.b_rO = a_rI.t(), b_Or.t().contiguous()

    def add_to(self, y_TO: Tensor, x_TI: Tensor, rows: Tensor | None) -> None:
        """y += B A x in these rows (None: all)."""
        if rows is None:
            y_TO.addmm_(x_TI @ self.a_Ir, self.b_rO)
        else:
            y_TO.index_add_(0, rows, (x_TI[rows] @ self.a_Ir) @ self.b_rO)


def group_adapter(adapter: Adapter, decoder: Decoder, dtype: torch.dtype) -> list[list[GroupLora | None]]:
    """For every layer one GroupLora for each of GROUPS (None where the adapter has no matrices). Raises UserError for
    an adapter whose shapes do not fit the decoder."""
    weights = target_weights(decoder)
    matrices = {}
    for name, (a_rI, b_Or) in adapter.matrices.items():
        assert name.rpartition(".")[2] in TARGETS
        shape = (b_Or.shape[0], a_rI.shape[1])
        model_shape = tuple(weights[name].shape) if name in weights else None
        if model_shape != shape:
            theirs = f"the adapter changes {name} of {shape[0]} x {shape[1]}"
            found = model_shape or "no such projection"
            raise UserError(f"{theirs}, and the model has {found}: it was trained on another model")
        matrices[name] = a_rI.to(decoder.device, dtype), (b_Or * adapter.scale).to(decoder.device, dtype)
    layers = []
    for index in range(decoder.config.num_layers):
        groups: list[GroupLora | None] = []
        for group in GROUPS:
            block = "self_attn" if group[0] in ("q_proj", "o_proj") else "mlp"
            names = [f"layers.{index}.{block}.{leaf}" for leaf in group]
            pairs = [matrices.get(n) or _rank_0(weights[n].shape, decoder.device, dtype) for n in names]
            a_rI, b_Or = torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))
            groups.append(GroupLora(a_rI, b_Or) if len(a_rI) else None)
        layers.append(groups)
    return layers


class StackedLora:
    """All adapters of a forward pass in one tensor for each layer and group, for kernels that take an adapter by row;
    `layers` are `group_adapter`'s, by name, and become views of it."""

    def __init__(self, adapters: Mapping[str | None, list[list[GroupLora | None]]]):
        self.numbers = {name: number for number, name in enumerate(adapters)}
        self.layers = [
            [_stack_group(groups) for groups in zip(*layers, strict=True)]
            for layers in zip(*adapters.values(), strict=True)
        ]

    def which(self, names: Sequence[str | None]) -> list[int]:
        """The number of each row's adapter, -1 for the base."""
        return [self.numbers.get(name, -1) for name in names]


def _stack_group(groups: Sequence[GroupLora | None]) -> Stacked | None:
    stacked = stack([None if lora is None else (lora.a_Ir.t(), lora.b_rO) for lora in groups])
    if stacked is not None:
        for lora, a_RI, b_RO in zip(groups, stacked.a_NRI, stacked.b_NRO, strict=True):
            if lora is not None:
                rank = len(lora.b_rO)
                lora.a_Ir, lora.b_rO = a_RI[:rank].t(), b_RO[:rank]
    return stacked


def _rank_0(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (0, I) and B (O, 0) of a projection without an adapter."""
    return tuple(torch.empty(size, device=device, dtype=dtype) for size in ((0, shape[1]), (shape[0], 0)))  # type: ignore[return-value]
