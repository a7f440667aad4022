r"""SwiGLU (Shazeer 2020, arXiv 2002.05202): h = silu(g) * u, with silu(g) = g * sigmoid(g).

Backward, with s = sigmoid(g):  du = dh * g s,   dg = dh * u * s (1 + g (1 - s)).
Both are rebuilt from g and u; neither silu(g) nor the product is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return torch.nn.functional.silu(gate_TF).mul_(up_TF)

    @staticmethod
    def backward(ctx, dh_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        du_TF = torch.nn.functional.silu(gate_TF).mul_(dh_TF)
        dg_TF = torch.ops.aten.silu_backward(dh_TF * up_TF, gate_TF)
        return dg_TF, du_TF


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Shapes (T, F), T tokens and F the feed-forward width."""
    return _SwiGLU.apply(gate_TF, up_TF)
