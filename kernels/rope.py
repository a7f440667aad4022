r"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Llama's rotate-half layout.

A head of D elements is D/2 pairs (x_i, x_{i + D/2}); pair i at position p is rotated by the angle p * f_i,

    f_i = theta^(-2i/D),   y_i = x_i cos - x_{i+D/2} sin,   y_{i+D/2} = x_{i+D/2} cos + x_i sin.

Rotation is orthogonal, so the backward pass is the rotation by the negative angle.

Long contexts stretch low frequencies: f_i becomes share_i f_i + (1 - share_i) f_i / factor. The share that is kept is
zero ("linear"), or rises with the frequency from 0 to 1: linearly in the turns per original context ("llama3"), or in i
("yarn", which also multiplies cos and sin by a constant).

Shapes: T tokens, H heads, D head_dim (Q query heads, K key heads).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, check_frozen, jit, tl, use_triton, whole_block
from ptst.kernels.operators import operator


def frequencies(head_dim: int, theta: float, scaling: Any = None) -> Tensor:
    """Angle per position of each pair, float32 (D/2,). `scaling`: None, or one of ptst/model/rope_config.py."""
    f_D2 = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return f_D2
    kept = torch.zeros(())
    if scaling.kind == "llama3":
        # Wavelengths above the original context / low_freq_factor are stretched by `factor`, those below
        # context / high_freq_factor are kept.
        cycles = scaling.original_max_positions * f_D2 / (2 * math.pi)
        kept = ((cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    elif scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
    return (1 - kept) * f_D2 / scaling.factor + kept * f_D2


def _yarn_ramp(head_dim: int, theta: float, scaling: Any) -> Tensor:
    """0 for the pairs that turn more than `beta_fast` times within the original context, 1 for those that turn less
    than `beta_slow` times."""
    low, high = (
        head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # as transformers does
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def tables(position_ids_T: Tensor, frequencies_D2: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """`factor` times cos and sin, float32, (T, 1, D/2) each: computed once per forward pass for all layers."""
    angles_TD2 = position_ids_T[:, None].float() * frequencies_D2
    cos_T1D2, sin_T1D2 = angles_TD2.cos()[:, None], angles_TD2.sin()[:, None]
    return (cos_T1D2, sin_T1D2) if factor == 1 else (cos_T1D2 * factor, sin_T1D2 * factor)


def reference(x_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor, inverse: bool = False) -> Tensor:
    """The plain-torch path, without a gradient: x (T, H, D) rotated, by the negative angles if `inverse`, in float32 or
    better and in as few passes as torch allows."""
    wide_THD = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    out_THD = torch.cat((cos_T1D2, cos_T1D2), -1) * wide_THD
    (a, b), (out_a, out_b) = wide_THD.chunk(2, dim=-1), out_THD.chunk(2, dim=-1)
    sign = -1 if inverse else 1
    out_a.addcmul_(b, sin_T1D2.to(wide_THD.dtype), value=-sign)
    out_b.addcmul_(a, sin_T1D2.to(wide_THD.dtype), value=sign)
    return out_THD.to(x_THD.dtype)


@jit
def _rotate(
    q, k, q_out, k_out, cos, sin, q_row, q_head, k_row, k_head, q_out_row, k_out_row, Q, K, D2,
    SIGN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its angles are read once and rotate all heads of q, then of k. The outputs may be q and k themselves,
    so nothing is written before all threads, of which several may hold an element, have read."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    pair = i < D2
    c = tl.load(cos + row * D2 + i, mask=pair, other=0.0)[None, :]
    s = tl.load(sin + row * D2 + i, mask=pair, other=0.0)[None, :] * SIGN
    for start in range(0, Q, HEADS):
        h = start + tl.arange(0, HEADS)
        inside = (h < Q)[:, None] & pair[None, :]
        at = row * q_row + h[:, None] * q_head + i[None, :]
        a = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(q + at + D2, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()
        to = row * q_out_row + h[:, None] * (2 * D2) + i[None, :]
        tl.store(q_out + to, (a * c - b * s).to(q_out.dtype.element_ty), mask=inside)
        tl.store(q_out + to + D2, (b * c + a * s).to(q_out.dtype.element_ty), mask=inside)
    for start in range(0, K, HEADS):
        h = start + tl.arange(0, HEADS)
        inside = (h < K)[:, None] & pair[None, :]
        at = row * k_row + h[:, None] * k_head + i[None, :]
        a = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(k + at + D2, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()
        to = row * k_out_row + h[:, None] * (2 * D2) + i[None, :]
        tl.store(k_out + to, (a * c - b * s).to(k_out.dtype.element_ty), mask=inside)
        tl.store(k_out + to + D2, (b * c + a * s).to(k_out.dtype.element_ty), mask=inside)


def launch(
    qk: tuple[Tensor, Tensor], outs: tuple[Tensor, Tensor], tables_T1D2: tuple[Tensor, Tensor], inverse: bool = False
) -> None:
    """q (T, Q, D) and k (T, K, D) rotated, by the negative angles if `inverse`, into `outs`, which may be q and k.
    Heads of `outs` and rows of the tables (cos, sin) are dense."""
    (q_TQD, k_TKD), (q_out, k_out) = qk, outs
    (T, Q, D), K = q_TQD.shape, k_TKD.shape[1]
    if T:
        strides = (*q_TQD.stride()[:2], *k_TKD.stride()[:2], q_out.stride(0), k_out.stride(0))
        _rotate[(T,)](
            *(q_TQD, k_TKD, q_out, k_out, *tables_T1D2, *strides, Q, K, D // 2),
            SIGN=-1.0 if inverse else 1.0, HEADS=block(Q, 32), BLOCK=whole_block("head_dim / 2", D // 2, 1024),
            num_warps=4,
        )  # fmt: skip


@operator("rope")
def _op(q_TQD: Tensor, k_TKD: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated, by the negative angles if `inverse`."""
    if not use_triton(q_TQD, k_TKD):
        return reference(q_TQD, cos, sin, inverse), reference(k_TKD, cos, sin, inverse)
    outs = q_TQD.new_empty(q_TQD.shape), k_TKD.new_empty(k_TKD.shape)
    launch((q_TQD, k_TKD), outs, (cos, sin), inverse)
    return outs


@_op.register_fake
def _(q_TQD, k_TKD, cos, sin, inverse):
    return q_TQD.new_empty(q_TQD.shape), k_TKD.new_empty(k_TKD.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _differentiate(ctx, dq_TQD, dk_TKD):
    dq, dk = torch.ops.ptst.rope(dq_TQD.contiguous(), dk_TKD.contiguous(), *ctx.saved_tensors, not ctx.inverse)
    return dq, dk, None, None, None


_op.register_autograd(_differentiate, setup_context=_setup)


def is_table(table: Tensor, T: int, D: int) -> bool:
    """Whether it holds a cosine or sine for each token and pair of channels: (T, D/2), perhaps with a 1 between."""
    ends = (table.shape[0], table.shape[-1]) if table.dim() else ()
    return ends == (T, D // 2) and table.numel() == T * D // 2


def apply_rope(q_TQD: Tensor, k_TKD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries (T, Q, D) and keys (T, K, D), in their own dtype; one launch on a GPU. Raises
    ValueError if shapes, devices or dtypes do not fit."""
    T, _, D = q_TQD.shape if q_TQD.dim() == 3 else (-1, 0, 0)
    fits = k_TKD.dim() == 3 and (k_TKD.shape[0], k_TKD.shape[2]) == (T, D)
    if not fits or D % 2 or not all(is_table(table, T, D) for table in (cos_T1D2, sin_T1D2)):
        q, k, cos, sin = (tuple(x.shape) for x in (q_TQD, k_TKD, cos_T1D2, sin_T1D2))
        raise ValueError(f"q {q}, k {k} and the tables {cos}, {sin} do not fit")
    check_alike(q=q_TQD, k=k_TKD)
    check_frozen(cos=cos_T1D2, sin=sin_T1D2)
    for name, x in (("cos", cos_T1D2), ("sin", sin_T1D2)):
        if x.device != q_TQD.device:
            raise ValueError(f"{name} {tuple(x.shape)} is on {x.device}, q {tuple(q_TQD.shape)} on {q_TQD.device}")
    return _op(q_TQD, k_TKD, cos_T1D2.contiguous(), sin_T1D2.contiguous(), False)
