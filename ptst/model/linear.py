"""Linear layers with a LoRA adapter, and several linear layers applied to one input at once.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptst.kernels.lora import Projections, lora_group


class LoraLinear(nn.Module):
    """A frozen linear layer and a LoRA adapter, float32 (or float64) over a base of any dtype."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = base.weight
        self.scale = scale
        out_features, in_features = base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        device = base.weight.device
        # As in the paper (section 4.1) A is random and B is zero: training starts exactly from the base model. The
        # bound is PEFT's (Kaiming uniform with a = sqrt(5)).
        a_rI = torch.empty(rank, in_features, dtype=dtype)
        a_rI.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
        self.lora_A = nn.Parameter(a_rI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))

    def forward(self, x_TI: Tensor) -> Tensor:
        return project(x_TI, self)[0]


def project(x_TI: Tensor, *layers: nn.Linear | LoraLinear) -> tuple[Tensor, ...]:
    """Every layer's output (T, O) for one input, which the adapters read once."""
    if not any(isinstance(layer, LoraLinear) for layer in layers):
        return tuple(layer(x_TI) for layer in layers)
    return lora_group(x_TI, *projections(*layers))


def projections(*layers: nn.Linear | LoraLinear) -> Projections:
    """The layers' weights, adapters and scale, as kernels/lora.py and kernels/lora_layer.py take them."""
    adapters = [(layer.lora_A, layer.lora_B) if isinstance(layer, LoraLinear) else None for layer in layers]
    scale = next((layer.scale for layer in layers if isinstance(layer, LoraLinear)), 1.0)
    return Projections([layer.weight for layer in layers], adapters, scale)
