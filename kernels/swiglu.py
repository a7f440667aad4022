r"""SwiGLU (Shazeer 2020, arXiv 2002.05202): h = silu(g) * u, with silu(g) = g * sigmoid(g).

Backward, with s = sigmoid(g):  du = dh * g s,   dg = dh * u * s (1 + g (1 - s)).
Both are recomputed from g and u; neither silu(g) nor the product is kept. The backward pass may write h too, for the
gradient of an adapter that reads it: six passes over (T, F) where recomputing it first takes eight.
Shapes: T tokens, F intermediate_size; g and u may be the two halves of one (T, 2F) product.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, jit, tl, triton, use_triton
from ptst.kernels.operators import operator

BLOCK = 1024
Made = TypeVar("Made")


@jit
def _forward(gate, up, h, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    g = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * F + f, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=inside)


@jit
def _backward(dh, gate, up, dgate, dup, h, gate_stride, up_stride, F, H: tl.constexpr, BLOCK: tl.constexpr):
    """dgate and dup, and with H h as `_forward` rounds it."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    d = tl.load(dh + row * F + f, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + row * F + f, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + row * F + f, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
    if H:
        tl.store(h + row * F + f, (g * s * u).to(h.dtype.element_ty), mask=inside)


@operator("swiglu")
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


@operator("swiglu_backward")
def _backward_op(dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, need_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, h (empty unless needed))."""
    if not use_triton(gate_TF, up_TF):
        du_TF = torch.nn.functional.silu(gate_TF).mul_(dh_TF)
        h_TF = _op(gate_TF, up_TF) if need_h else dh_TF.new_empty(0)
        return torch.ops.aten.silu_backward(dh_TF * up_TF, gate_TF), du_TF, h_TF
    T, F = gate_TF.shape
    dgate_TF, dup_TF, h_TF = _gradients(dh_TF, gate_TF, up_TF, need_h)
    if dh_TF.numel():
        grid = (T, triton.cdiv(F, BLOCK))
        _backward[grid](
            *(dh_TF, gate_TF, up_TF, dgate_TF, dup_TF, h_TF if need_h else dgate_TF),
            *(gate_TF.stride(0), up_TF.stride(0), F),
            H=need_h, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dgate_TF, dup_TF, h_TF


@_backward_op.register_fake
def _gradients(dh_TF, gate_TF, up_TF, need_h):
    return dh_TF.new_empty(dh_TF.shape), dh_TF.new_empty(dh_TF.shape), dh_TF.new_empty(dh_TF.shape if need_h else 0)


_op.register_autograd(
    lambda ctx, dh_TF: torch.ops.ptst.swiglu_backward(dh_TF.contiguous(), *ctx.saved_tensors, False)[:2],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu_gradients(
    dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, use_h: Callable[[Tensor], Made] | None
) -> tuple[tuple[Tensor, Tensor], Made | None]:
    """((dgate, dup), what `use_h` makes of h); `dh` is overwritten, and h lives no longer than that."""
    if use_triton(gate_TF, up_TF):
        dgate_TF, dup_TF, h_TF = torch.ops.ptst.swiglu_backward(dh_TF, gate_TF, up_TF, use_h is not None)
        return (dgate_TF, dup_TF), use_h and use_h(h_TF)
    silu_TF = torch.nn.functional.silu(gate_TF)
    made = use_h and use_h(silu_TF * up_TF)
    du_TF = silu_TF.mul_(dh_TF)
    return (torch.ops.aten.silu_backward(dh_TF.mul_(up_TF), gate_TF), du_TF), made


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise: (T, F) each. Raises ValueError if shapes, devices or dtypes do not fit."""
    if gate_TF.dim() != 2 or gate_TF.shape != up_TF.shape:
        raise ValueError(f"gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must both be (T, F)")
    check_alike(gate=gate_TF, up=up_TF)
    return _op(gate_TF, up_TF)
