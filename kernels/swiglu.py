r"""SwiGLU (Shazeer 2020, arXiv 2002.05202): h = silu(g) * u, with silu(g) = g * sigmoid(g).

Backward, with s = sigmoid(g):  du = dh * g s,   dg = dh * u * s (1 + g (1 - s)).
Both are recomputed from g and u; neither silu(g) nor the product is kept.
Shapes: T tokens, F intermediate_size; g and u may be the two halves of one (T, 2F) product.
"""

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, jit, tl, triton, use_triton

BLOCK = 1024


@jit
def _forward(gate, up, h, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    g = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * F + f, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=inside)


@jit
def _backward(dh, gate, up, dgate, dup, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    d = tl.load(dh + row * F + f, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + row * F + f, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + row * F + f, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)


@torch.library.custom_op("ptst::swiglu", mutates_args=())
def _op(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    if not use_triton(gate_TF, up_TF):
        return torch.nn.functional.silu(gate_TF).mul_(up_TF)
    T, F = gate_TF.shape
    h_TF = gate_TF.new_empty((T, F))
    if h_TF.numel():
        grid = (T, triton.cdiv(F, BLOCK))
        _forward[grid](gate_TF, up_TF, h_TF, gate_TF.stride(0), up_TF.stride(0), F, BLOCK=BLOCK, num_warps=4)
    return h_TF


@_op.register_fake
def _(gate_TF, up_TF):
    return gate_TF.new_empty(gate_TF.shape)


@torch.library.custom_op("ptst::swiglu_backward", mutates_args=())
def _backward_op(dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    if not use_triton(gate_TF, up_TF):
        du_TF = torch.nn.functional.silu(gate_TF).mul_(dh_TF)
        return torch.ops.aten.silu_backward(dh_TF * up_TF, gate_TF), du_TF
    T, F = gate_TF.shape
    dgate_TF, dup_TF = torch.empty_like(dh_TF), torch.empty_like(dh_TF)
    if dh_TF.numel():
        grid = (T, triton.cdiv(F, BLOCK))
        strides = gate_TF.stride(0), up_TF.stride(0)
        _backward[grid](dh_TF, gate_TF, up_TF, dgate_TF, dup_TF, *strides, F, BLOCK=BLOCK, num_warps=4)
    return dgate_TF, dup_TF


@_backward_op.register_fake
def _(dh_TF, gate_TF, up_TF):
    return torch.empty_like(dh_TF), torch.empty_like(dh_TF)


_op.register_autograd(
    lambda ctx, dh_TF: torch.ops.ptst.swiglu_backward(dh_TF.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu_recompute(gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor | None]:
    """(silu(gate) * up, silu(gate) if `swiglu_backward` can use it)."""
    if use_triton(gate_TF, up_TF):
        return _op(gate_TF, up_TF), None
    silu_TF = torch.nn.functional.silu(gate_TF)
    return silu_TF * up_TF, silu_TF


def swiglu_backward(dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, silu_TF: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dgate, dup); `dh` and `silu` are overwritten."""
    if silu_TF is None:
        return torch.ops.ptst.swiglu_backward(dh_TF, gate_TF, up_TF)
    du_TF = silu_TF.mul_(dh_TF)
    return torch.ops.aten.silu_backward(dh_TF.mul_(up_TF), gate_TF), du_TF


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise: (T, F) each. Raises ValueError if shapes, devices or dtypes do not fit."""
    if gate_TF.dim() != 2 or gate_TF.shape != up_TF.shape:
        raise ValueError(f"gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must both be (T, F)")
    check_alike(gate=gate_TF, up=up_TF)
    return _op(gate_TF, up_TF)
