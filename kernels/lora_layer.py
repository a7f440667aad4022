r"""A frozen Llama layer with LoRA: three autograd functions that keep what backward needs and no more.

    qkv:           n = norm(x);  q, k, v = n W^T + LoRA;  q and k turned by their positions
    feed_forward:  n = norm(x);  g, u = n W^T + LoRA;  h = silu(g) u;  out = x + h W_down^T + LoRA
    add:           out = residual + x W^T + LoRA   (the attention's output projection)

Kept per token: x of each half and its norm's statistic, g and u, the thin z = A n; n and h are rebuilt. A frozen
weight or norm gets no gradient, and x none where nothing below is trained. The residual is the starting value of the
product that is added to it, so it costs no pass of its own.

LoRA dropout multiplies what A reads by a mask of zeros and 1 / (1 - p). One mask serves all projections of one input
(PEFT draws one for each: the same expectation, another noise). A mask is drawn document by document from
(document's seed, layer, place), so no split of a batch changes it; backward draws it again.

Shapes: T tokens, E hidden, F intermediate, H query and K key heads, D head_dim; A (r, I), B (O, r).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ptst.kernels.lora import thin
from ptst.kernels.rms_norm import norm_again, norm_rows, norm_rows_backward
from ptst.kernels.rope import turn
from ptst.kernels.swiglu import gated, gated_again, gated_backward

Pair = tuple[Tensor, Tensor] | None  # (A, B) of a projection, or None for one without an adapter


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one batch at one layer: rate, a seed for each document, where documents begin."""

    rate: float
    seeds: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    layer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"LoRA dropout is {self.rate}; it must be at least 0 and below 1")
        if len(self.seeds) != len(self.cu_seqlens) - 1:
            raise ValueError(f"{len(self.seeds)} dropout seeds for {len(self.cu_seqlens) - 1} documents")

    def mask(self, place: str, like_TI: Tensor) -> Tensor:
        """(T, I) of zeros and 1 / (1 - rate), in the dtype and on the device of `like`."""
        mask_TI = torch.empty(like_TI.shape, dtype=like_TI.dtype, device=like_TI.device)
        generator = torch.Generator(like_TI.device)
        for seed, (a, b) in zip(self.seeds, pairwise(self.cu_seqlens), strict=True):
            # torch's generator on a CPU takes 32 bits of its seed.
            digest = hashlib.blake2b(f"{seed}:{self.layer}:{place}".encode(), digest_size=4).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            mask_TI[a:b].bernoulli_(1 - self.rate, generator=generator)
        return mask_TI.mul_(1 / (1 - self.rate))


def _mask(dropout: Dropout | None, place: str, like_TI: Tensor, lows: Sequence[Tensor | None]) -> Tensor | None:
    """The mask where there is dropout and an A to read through it."""
    return None if dropout is None or all(a is None for a in lows) else dropout.mask(place, like_TI)


def _flat(adapters: Sequence[Pair]) -> list[Tensor | None]:
    return [t for pair in adapters for t in pair or (None, None)]


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, cos, sin, head_dim, scale, dropout, weights, *adapters):
        ctx.thin, ctx.scale, ctx.dropout, ctx.eps = thin(x_TE, join=True), scale, dropout, eps
        n_TE, r_T = norm_rows(x_TE, norm_E, eps)
        mask_TE = _mask(dropout, "qkv", n_TE, adapters[::2])
        ys, z_TR = ctx.thin.forward(n_TE, weights, adapters[::2], adapters[1::2], scale, mask_TI=mask_TE)
        q_THD, k_TKD, v_TKD = (y.unflatten(1, (-1, head_dim)) for y in ys)
        q_THD, k_TKD = turn(q_THD, k_TKD, cos, sin, False)
        ctx.save_for_backward(x_TE, r_T, z_TR, norm_E, cos, sin, *weights, *adapters)
        return q_THD, k_TKD, v_TKD

    @staticmethod
    def backward(ctx, dq_THD, dk_TKD, dv_TKD):
        x_TE, r_T, z_TR, norm_E, cos, sin, *rest = ctx.saved_tensors
        weights, lows, highs = rest[:3], rest[3::2], rest[4::2]
        dq_THD, dk_TKD = turn(dq_THD.contiguous(), dk_TKD.contiguous(), cos, sin, True)
        dys = [d.flatten(1) for d in (dq_THD, dk_TKD, dv_TKD.contiguous())]
        need_dx = ctx.needs_input_grad[0]
        dx_TE, grads = ctx.thin.backward(
            dys, norm_again(x_TE, norm_E, ctx.eps, r_T), z_TR, weights, lows, highs, ctx.scale, need_dx,
            _mask(ctx.dropout, "qkv", x_TE, lows),
        )  # fmt: skip
        if need_dx:
            dx_TE = norm_rows_backward(dx_TE, None, x_TE, norm_E, r_T)
        return dx_TE, *[None] * 8, *grads


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, scale, dropout, weights, *adapters):
        ctx.thin, ctx.scale, ctx.dropout, ctx.eps = thin(x_TE, join=True), scale, dropout, eps
        n_TE, r_T = norm_rows(x_TE, norm_E, eps)
        lows, highs = adapters[::2], adapters[1::2]
        mask_TE = _mask(dropout, "gate_up", n_TE, lows[:2])
        (g_TF, u_TF), z_TR = ctx.thin.forward(n_TE, weights[:2], lows[:2], highs[:2], scale, mask_TI=mask_TE)
        del n_TE, mask_TE
        h_TF = gated(g_TF, u_TF)
        mask_TF = _mask(dropout, "down", h_TF, lows[2:])
        (out_TE,), zd_Tr = ctx.thin.forward(h_TF, weights[2:], lows[2:], highs[2:], scale, x_TE, mask_TF)
        ctx.save_for_backward(x_TE, r_T, z_TR, zd_Tr, g_TF, u_TF, norm_E, *weights, *adapters)
        return out_TE

    @staticmethod
    def backward(ctx, dout_TE):
        x_TE, r_T, z_TR, zd_Tr, g_TF, u_TF, norm_E, *rest = ctx.saved_tensors
        weights, lows, highs = rest[:3], rest[3::2], rest[4::2]
        dout_TE = dout_TE.contiguous()
        h_TF, silu_TF = gated_again(g_TF, u_TF)
        mask_TF = _mask(ctx.dropout, "down", g_TF, lows[2:])
        dh_TF, down_grads = ctx.thin.backward(
            [dout_TE], h_TF, zd_Tr, weights[2:], lows[2:], highs[2:], ctx.scale, True, mask_TF
        )
        del h_TF, mask_TF
        dys = gated_backward(dh_TF, g_TF, u_TF, silu_TF)
        del dh_TF, silu_TF
        need_dx = ctx.needs_input_grad[0]
        dx_TE, grads = ctx.thin.backward(
            dys, norm_again(x_TE, norm_E, ctx.eps, r_T), z_TR, weights[:2], lows[:2], highs[:2], ctx.scale, need_dx,
            _mask(ctx.dropout, "gate_up", x_TE, lows[:2]),
        )  # fmt: skip
        if need_dx:
            dx_TE = norm_rows_backward(dx_TE, dout_TE, x_TE, norm_E, r_T)
        return dx_TE, *[None] * 5, *grads, *down_grads


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TO, x_TI, w_OI, scale, dropout, a_rI, b_Or):
        ctx.thin, ctx.scale, ctx.dropout = thin(x_TI, join=True), scale, dropout
        mask_TI = _mask(dropout, "o", x_TI, [a_rI])
        (out_TO,), z_Tr = ctx.thin.forward(x_TI, [w_OI], [a_rI], [b_Or], scale, residual_TO, mask_TI)
        # x is kept for dA alone.
        ctx.save_for_backward(None if a_rI is None else x_TI, z_Tr, w_OI, a_rI, b_Or)
        return out_TO

    @staticmethod
    def backward(ctx, dout_TO):
        x_TI, z_Tr, w_OI, a_rI, b_Or = ctx.saved_tensors
        mask_TI = _mask(ctx.dropout, "o", x_TI, [a_rI])
        dx_TI, grads = ctx.thin.backward(
            [dout_TO], x_TI, z_Tr, [w_OI], [a_rI], [b_Or], ctx.scale, ctx.needs_input_grad[1], mask_TI
        )
        return dout_TO, dx_TI, None, None, None, *grads


def lora_qkv(
    x_TE: Tensor, norm_E: Tensor, eps: float, cos: Tensor, sin: Tensor, head_dim: int,
    weights: Sequence[Tensor], adapters: Sequence[Pair], scale: float, dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Turned q (T, H, D) and k (T, K, D), and v, of the normed x; differentiable in x and the adapters alone.

    `cos` and `sin` are `rope.tables`' (T, 1, D/2); weights and adapters are those of q, k and v.
    """
    return _QKV.apply(x_TE, norm_E, eps, cos, sin, head_dim, scale, dropout, tuple(weights), *_flat(adapters))


def lora_feed_forward(
    x_TE: Tensor, norm_E: Tensor, eps: float, weights: Sequence[Tensor], adapters: Sequence[Pair], scale: float,
    dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """x + down(silu(gate(norm x)) * up(norm x)), (T, E); differentiable in x and the adapters alone.

    Weights and adapters are those of gate, up and down.
    """
    return _FeedForward.apply(x_TE, norm_E, eps, scale, dropout, tuple(weights), *_flat(adapters))


def lora_add(
    residual_TO: Tensor, x_TI: Tensor, w_OI: Tensor, adapter: Pair, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """residual + x W^T + scale (x A^T) B^T, (T, O); differentiable in residual, x, A and B."""
    return _Add.apply(residual_TO, x_TI, w_OI, scale, dropout, *(adapter or (None, None)))
