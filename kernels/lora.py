r"""LoRA's linear layer (Hu et al. 2021, arXiv 2106.09685): y = x W^T + s (x A^T) B^T, W frozen.

With z = x A^T (T, r) kept from the forward pass and e = s dy B (T, r):

    dx = dy W + e A        dA = e^T x        dB = s dy^T z

No gradient is ever formed for W, and dx only where something below is trained.
Shapes: T tokens, I inputs, O outputs, r rank; x (T, I), W (O, I), A (r, I), B (O, r).
"""

from __future__ import annotations

import torch
from torch import Tensor


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, w_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
        z_Tr = x_TI @ a_rI.t().to(x_TI.dtype)
        y_TO = x_TI @ w_OI.t()
        y_TO.addmm_(z_Tr, b_Or.t().to(x_TI.dtype), alpha=scale)
        ctx.save_for_backward(x_TI, w_OI, a_rI, b_Or, z_Tr)
        ctx.scale = scale
        return y_TO

    @staticmethod
    def backward(ctx, dy_TO: Tensor):
        x_TI, w_OI, a_rI, b_Or, z_Tr = ctx.saved_tensors
        e_Tr = (dy_TO @ b_Or.to(dy_TO.dtype)).mul_(ctx.scale)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ w_OI
            dx_TI.addmm_(e_Tr, a_rI.to(dy_TO.dtype))
        # The adapter is float32 also over a bfloat16 base; its gradients are summed in float32.
        da_rI = (e_Tr.t() @ x_TI).to(a_rI.dtype) if ctx.needs_input_grad[2] else None
        db_Or = (dy_TO.t() @ z_Tr).mul_(ctx.scale).to(b_Or.dtype) if ctx.needs_input_grad[3] else None
        return dx_TI, None, da_rI, db_Or, None


def lora_linear(x_TI: Tensor, w_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """y (T, O) = x W^T + scale (x A^T) B^T; differentiable in x, A and B. W must not require a gradient."""
    assert not w_OI.requires_grad, "the base weight under an adapter is frozen"
    return _LoraLinear.apply(x_TI, w_OI, a_rI, b_Or, scale)
