r"""A frozen layer with LoRA: three autograd functions that keep only what the backward pass needs.

    qkv:           n = norm(x);  q, k, v = n W^T + b + LoRA
    feed_forward:  n = norm(x);  g, u = n W^T + LoRA;  h = silu(g) u;  out = x + h W_down^T + LoRA
    add:           out = residual + x W^T + LoRA   (the attention's output projection)

Kept per token: the input x of each half with its norm's statistic, g and u, and the low-rank z = A n; n and h are
recomputed. A frozen weight or norm gets no gradient, and x gets none if nothing below is trained. The residual is the
initial value of the product that is added to it, which saves a pass. Without a norm before it (a layer whose norms come
after) n is x, and the residual is added elsewhere.

LoRA dropout multiplies the input of A by a mask of zeros and 1 / (1 - p). One mask serves all projections of one input
(PEFT draws one for each: the same expectation, other noise). Masks are drawn document by document from
(document's seed, layer, place), so no split of a batch changes them; the backward pass draws them again.

Shapes: T tokens, E hidden_size, F intermediate_size, H query and K key heads, D head_dim; A (r, I), B (O, r).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, check_frozen
from ptst.kernels.lora import Group, Projections, check_layers
from ptst.kernels.rms_norm import check_norm, rms_norm_recompute
from ptst.kernels.swiglu import swiglu, swiglu_gradients


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one batch at one layer: rate, one seed per document, the documents' boundaries."""

    rate: float
    seeds: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    layer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"LoRA dropout is {self.rate}; it must be at least 0 and below 1")
        if len(self.seeds) != len(self.cu_seqlens) - 1:
            raise ValueError(f"{len(self.seeds)} dropout seeds for {len(self.cu_seqlens) - 1} documents")
        if self.cu_seqlens[0] or any(a > b for a, b in pairwise(self.cu_seqlens)):
            raise ValueError(f"document boundaries {self.cu_seqlens} of dropout must begin at 0 and never fall")

    def check(self, x_TI: Tensor) -> None:
        """Raise ValueError unless each token of x lies in a document: the others would have no mask."""
        if self.cu_seqlens[-1] != len(x_TI):
            raise ValueError(
                f"documents of dropout end at {self.cu_seqlens[-1]}, x {tuple(x_TI.shape)} has other tokens"
            )

    def mask(self, place: str, like_TI: Tensor) -> Tensor:
        """(T, I) of zeros and 1 / (1 - rate), in the dtype and on the device of `like`."""
        mask_TI = torch.empty(like_TI.shape, dtype=like_TI.dtype, device=like_TI.device)
        generator = torch.Generator(like_TI.device)
        for seed, (a, b) in zip(self.seeds, pairwise(self.cu_seqlens), strict=True):
            # torch's CPU generator uses 32 bits of its seed.
            digest = hashlib.blake2b(f"{seed}:{self.layer}:{place}".encode(), digest_size=4).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            mask_TI[a:b].bernoulli_(1 - self.rate, generator=generator)
        return mask_TI.mul_(1 / (1 - self.rate))


def _mask(dropout: Dropout | None, place: str, like_TI: Tensor, layers: Projections) -> Tensor | None:
    """The mask, or None if there is no dropout or no A that reads through it."""
    return None if dropout is None or not any(layers.ranks) else dropout.mask(place, like_TI)


_merged = partial(Projections.from_flat, merge=True)


def _normed(x_TE: Tensor, norm_E: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """(norm(x), its statistic); x itself without a norm."""
    if norm_E is None:
        return x_TE, None
    n_TE, _, r_T = torch.ops.ptst.rms_norm(x_TE, None, norm_E, eps)
    return n_TE, r_T


def _normed_again(x_TE: Tensor, norm_E: Tensor | None, eps: float, r_T: Tensor | None) -> Tensor:
    return x_TE if norm_E is None or r_T is None else rms_norm_recompute(x_TE, norm_E, eps, r_T)


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, scale, dropout, weights, biases, *adapters):
        ctx.scale, ctx.dropout, ctx.eps = scale, dropout, eps
        layers = _merged(weights, adapters, scale)._replace(biases=biases)
        n_TE, r_T = _normed(x_TE, norm_E, eps)
        ys, z_TR = layers.forward(n_TE, mask_TI=_mask(dropout, "qkv", n_TE, layers))
        ctx.save_for_backward(x_TE, r_T, z_TR, norm_E, *weights, *adapters)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x_TE, r_T, z_TR, norm_E, *rest = ctx.saved_tensors
        layers = _merged(rest[:3], rest[3:], ctx.scale)
        need_dx = ctx.needs_input_grad[0]
        n_TE, mask_TE = _normed_again(x_TE, norm_E, ctx.eps, r_T), _mask(ctx.dropout, "qkv", x_TE, layers)
        dx_TE, grads = layers.backward([d.contiguous() for d in dys], n_TE, z_TR, need_dx, mask_TE)
        if need_dx and norm_E is not None:
            dx_TE = torch.ops.ptst.rms_norm_backward(dx_TE, None, x_TE, norm_E, r_T, False)[0]
        return dx_TE, *[None] * 6, *grads


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TE, norm_E, eps, scale, dropout, weights, *adapters):
        ctx.scale, ctx.dropout, ctx.eps = scale, dropout, eps
        gate_up = _merged(weights[:2], adapters[:4], scale)
        down = _merged(weights[2:], adapters[4:], scale)
        n_TE, r_T = _normed(x_TE, norm_E, eps)
        mask_TE = _mask(dropout, "gate_up", n_TE, gate_up)
        (g_TF, u_TF), z_TR = gate_up.forward(n_TE, mask_TI=mask_TE)
        del n_TE, mask_TE
        h_TF = swiglu(g_TF, u_TF)
        residual = None if norm_E is None else x_TE
        (out_TE,), zd_Tr = down.forward(h_TF, residual, _mask(dropout, "down", h_TF, down))
        ctx.save_for_backward(x_TE, r_T, z_TR, zd_Tr, g_TF, u_TF, norm_E, *weights, *adapters)
        return out_TE

    @staticmethod
    def backward(ctx, dout_TE):
        x_TE, r_T, z_TR, zd_Tr, g_TF, u_TF, norm_E, *rest = ctx.saved_tensors
        gate_up = _merged(rest[:2], rest[3:7], ctx.scale)
        down = _merged(rest[2:3], rest[7:], ctx.scale)
        dout_TE = dout_TE.contiguous()
        mask_TF = _mask(ctx.dropout, "down", g_TF, down)
        dh_TF, e_Tr, dbs = down.input_gradient([dout_TE], zd_Tr, True, mask_TF)
        assert dh_TF is not None
        adapter_gradients = partial(down.adapter_gradients, e_Tr, dbs, mask_TI=mask_TF)
        dys, down_grads = swiglu_gradients(dh_TF, g_TF, u_TF, adapter_gradients if any(down.ranks) else None)
        del dh_TF, mask_TF, adapter_gradients
        need_dx = ctx.needs_input_grad[0]
        n_TE = _normed_again(x_TE, norm_E, ctx.eps, r_T)
        dx_TE, grads = gate_up.backward(dys, n_TE, z_TR, need_dx, _mask(ctx.dropout, "gate_up", x_TE, gate_up))
        if need_dx and norm_E is not None:
            dx_TE = torch.ops.ptst.rms_norm_backward(dx_TE, dout_TE, x_TE, norm_E, r_T, False)[0]
        return dx_TE, *[None] * 5, *grads, *(down_grads or (None, None))


def _check(
    x_TE: Tensor, norm_E: Tensor | None, layers: Projections, shapes: Sequence[Sequence[int]], dropout: Dropout | None
) -> None:
    if norm_E is not None:
        check_norm(x_TE, norm_E)
        check_frozen(norm=norm_E)
    check_layers(x_TE, layers, shapes)
    if dropout is not None:
        dropout.check(x_TE)


def _check_unbiased(layers: Projections) -> None:
    for number, b_O in enumerate(layers.biases, 1):
        if b_O is not None:
            raise ValueError(f"bias {number} {tuple(b_O.shape)} would not be added: these projections take none")


def lora_qkv(
    x_TE: Tensor, norm_E: Tensor | None, eps: float, qkv: Projections, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The projections of q, k and v, (T, O) each, of norm(x), or of x without a norm; differentiable in x and the
    adapters. Raises ValueError if shapes, devices or dtypes do not fit, or if a weight, bias or norm is not
    frozen."""
    _check(x_TE, norm_E, qkv, [x_TE.shape[-1:]] * 3, dropout)
    return _QKV.apply(x_TE, norm_E, eps, qkv.scale, dropout, tuple(qkv.weights), tuple(qkv.biases), *qkv.flat)


def lora_feed_forward(
    x_TE: Tensor, norm_E: Tensor | None, eps: float, gate_up_down: Projections, dropout: Dropout | None = None
) -> Tensor:
    """x + down(silu(gate(norm x)) * up(norm x)), (T, E), or down(silu(gate(x)) * up(x)) without a norm; differentiable
    in x and the adapters. Raises ValueError if shapes, devices or dtypes do not fit, if a weight or norm is not frozen,
    or for a bias."""
    layers = gate_up_down
    E, F = x_TE.shape[-1:], (layers.weights[0] if layers.weights else x_TE).shape[:1]
    _check(x_TE, norm_E, layers, [(*F, *E), (*F, *E), (*E, *F)], dropout)
    _check_unbiased(layers)
    return _FeedForward.apply(x_TE, norm_E, eps, layers.scale, dropout, tuple(layers.weights), *layers.flat)


def lora_add(residual_TO: Tensor | None, x_TI: Tensor, layer: Projections, dropout: Dropout | None = None) -> Tensor:
    """residual + x W^T + scale (x A^T) B^T of a single projection, (T, O); differentiable in residual, x, A and B.
    Raises ValueError if shapes, devices or dtypes do not fit, if the weight is not frozen, or for a bias."""
    _check(x_TI, None, layer, [x_TI.shape[-1:]], dropout)
    _check_unbiased(layer)
    if residual_TO is not None:
        shape = (len(x_TI), layer.weights[0].shape[0])
        if residual_TO.shape != shape:  # addmm would repeat a smaller one
            raise ValueError(f"residual {tuple(residual_TO.shape)} must be {shape}, x is {tuple(x_TI.shape)}")
        check_alike(x=x_TI, residual=residual_TO)
    options = layer.scale, True, partial(_mask, dropout, "o")
    return Group.apply(x_TI, residual_TO, *options, tuple(layer.weights), (), *layer.flat)[0]
