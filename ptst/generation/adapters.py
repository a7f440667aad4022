"""LoRA adapters that are not attached to the decoder: many over one base, each request with its own.

The base product is computed once for all rows; an adapter's two thin products only for its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.model.linear import LoraLinear
from ptst.model.lora import adapter_tensors, read_lora_config
from ptst.model.lora_config import TARGETS

# Projections that read the same input, side by side: one product with the base, one with the adapters.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Adapter:
    """Matrices A (r, I) and B (O, r) by the name of the projection (`layers.0.self_attn.q_proj`), and alpha / r."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    scale: float


def read_adapter(decoder: Decoder, folder: Path) -> Adapter:
    """The adapter of a PEFT folder, for this decoder, which is left as it is. Raises UserError where it does not fit:
    an adapter of another base, kinds and options that are not supported, a damaged file."""
    folder = Path(folder)
    config = read_lora_config(folder)
    layers = {
        name: module.weight
        for name, module in decoder.named_modules()
        if isinstance(module, (nn.Linear, LoraLinear)) and name.rpartition(".")[2] in config.targets
    }
    shapes = {}
    for name, w_OI in layers.items():
        shapes[f"{name}.lora_A"] = (config.rank, w_OI.shape[1])
        shapes[f"{name}.lora_B"] = (w_OI.shape[0], config.rank)
    tensors = adapter_tensors(folder, shapes)
    return Adapter({n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in layers}, config.scale)


def attached_adapter(decoder: Decoder) -> Adapter | None:
    """The adapter that stands on the decoder itself (`load_adapter`, training), or None."""
    on = {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLinear)}
    if not on:
        return None
    scales = {m.scale for m in on.values()}
    assert len(scales) == 1, "one adapter has one scale"
    return Adapter({name: (m.lora_A.detach(), m.lora_B.detach()) for name, m in on.items()}, scales.pop())


class ThinPair:
    """An adapter's part of one group of projections: A stacked, B block-diagonal, so that two products do for all."""

    def __init__(self, a_rI: Tensor, b_Or: Tensor):
        self.a_Ir, self.b_rO = a_rI.t(), b_Or.t().contiguous()

    def add(self, y_TO: Tensor, x_TI: Tensor, rows: Tensor | None) -> None:
        """y += B A x in the rows given (None: all of them)."""
        if rows is None:
            y_TO.addmm_(x_TI @ self.a_Ir, self.b_rO)
        else:
            y_TO.index_add_(0, rows, (x_TI[rows] @ self.a_Ir) @ self.b_rO)


def thin_pairs(adapter: Adapter, decoder: Decoder, dtype: torch.dtype) -> list[list[ThinPair | None]]:
    """For every layer, a pair for each of GROUPS (None where the adapter has nothing there). Raises UserError for an
    adapter of another decoder, as far as shapes tell."""
    modules = dict(decoder.named_modules())
    for name, (a_rI, b_Or) in adapter.matrices.items():
        assert name.rpartition(".")[2] in TARGETS
        has = tuple(modules[name].weight.shape) if name in modules else None  # type: ignore[union-attr]
        if has != (b_Or.shape[0], a_rI.shape[1]):
            of = f"of {b_Or.shape[0]} x {a_rI.shape[1]}, and the model has {has or 'no such projection'}"
            raise UserError(f"the adapter changes {name} {of}: it was trained on another model")
    out = []
    for index, layer in enumerate(decoder.layers):
        pairs: list[ThinPair | None] = []
        for group in GROUPS:
            part = "self_attn" if group[0] in ("q_proj", "o_proj") else "mlp"
            widths = [getattr(getattr(layer, part), leaf).weight.shape[0] for leaf in group]
            found = [adapter.matrices.get(f"layers.{index}.{part}.{leaf}") for leaf in group]
            some = [f for f in found if f is not None]
            if not some:
                pairs.append(None)
                continue
            blocks = [
                f[1] * adapter.scale if f is not None else some[0][0].new_zeros(w, 0)
                for f, w in zip(found, widths, strict=True)
            ]
            a_rI, b_Or = torch.cat([a for a, _ in some]), torch.block_diag(*blocks)
            pairs.append(ThinPair(a_rI.to(decoder.device, dtype), b_Or.to(decoder.device, dtype)))
        out.append(pairs)
    return out
