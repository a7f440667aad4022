"""Rotary embedding and the store into the paged KV cache in one kernel: the step between the projections and attention.

Queries and keys are normalized by head where the model does that (Qwen3; as in rms_norm.py, rounded to their dtype
before they are rotated) and rotated as in rope.py; the rotated keys and the values go to their places in the cache,
which consists of blocks of P tokens, heads first. Slot s is token s % P of block s // P. Block 0 belongs to no
sequence: padding points at it, and nothing is written there.

Shapes: T tokens, Q query heads, K key/value heads, D head_dim, B blocks of P tokens.
"""

from typing import NamedTuple

from torch import Tensor

from ptst.kernels.dispatch import check_alike, check_frozen, check_integers, jit, tl, use_triton, whole_block
from ptst.kernels.rms_norm import rms_norm
from ptst.kernels.rope import apply_rope, is_table

HEADS = 8  # heads of a token per program


class HeadNorms(NamedTuple):
    """RMSNorm of each head of queries and of keys: weights (D,) in their dtype, and what is added to mean squares."""

    q_D: Tensor
    k_D: Tensor
    eps: float


@jit
def _weight(q_weight, k_weight, h, i, Q, D2):
    """Half of the weights of each head's norm."""
    of_q = tl.load(q_weight + i, mask=i < D2, other=0.0)[None, :]
    of_k = tl.load(k_weight + i, mask=i < D2, other=0.0)[None, :]
    return tl.where((h < Q)[:, None], of_q, of_k).to(tl.float32)


@jit
def _rotate_store(
    qkv, q_out, keys, values, slots, cos, sin, q_weight, k_weight, row_stride, head_stride, k_block, k_head, k_token,
    v_block, v_head, v_token, Q, K, D2, END, eps, NORM: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. Those past Q are keys, those past Q + K values, which are not rotated."""
    row = tl.program_id(0).to(tl.int64)
    h, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    pair = i < D2
    inside = (h < Q + 2 * K)[:, None] & pair[None, :]
    c = tl.load(cos + row * D2 + i, mask=pair, other=0.0)[None, :]
    s = tl.load(sin + row * D2 + i, mask=pair, other=0.0)[None, :]
    at = row * row_stride + h[:, None] * head_stride + i[None, :]
    a = tl.load(qkv + at, mask=inside, other=0.0)
    b = tl.load(qkv + at + D2, mask=inside, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        rstd = 1.0 / tl.sqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * D2) + eps)[:, None]
        x = (x * rstd * _weight(q_weight, k_weight, h, i, Q, D2)).to(a.dtype).to(tl.float32)
        y = (y * rstd * _weight(q_weight + D2, k_weight + D2, h, i, Q, D2)).to(b.dtype).to(tl.float32)
    x, y = x * c - y * s, y * c + x * s
    is_q = inside & (h < Q)[:, None]
    to = (row * Q + h[:, None]) * (2 * D2) + i[None, :]
    tl.store(q_out + to, x.to(q_out.dtype.element_ty), mask=is_q)
    tl.store(q_out + to + D2, y.to(q_out.dtype.element_ty), mask=is_q)
    slot = tl.load(slots + row).to(tl.int64)
    stored = inside & (slot >= P) & (slot < END)
    is_k = stored & ((h >= Q) & (h < Q + K))[:, None]
    to = slot // P * k_block + slot % P * k_token + (h[:, None] - Q) * k_head + i[None, :]
    tl.store(keys + to, x.to(keys.dtype.element_ty), mask=is_k)
    tl.store(keys + to + D2, y.to(keys.dtype.element_ty), mask=is_k)
    is_v = stored & (h >= Q + K)[:, None]
    to = slot // P * v_block + slot % P * v_token + (h[:, None] - Q - K) * v_head + i[None, :]
    tl.store(values + to, a, mask=is_v)
    tl.store(values + to + D2, b, mask=is_v)


def rotate_and_store(
    qkv_THD: Tensor,
    cos_T1D2: Tensor,
    sin_T1D2: Tensor,
    slots_T: Tensor,
    keys_BKPD: Tensor,
    values_BKPD: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotated queries (T, Q, D) of a step's queries, keys and values (T, Q + 2 K, D), whose keys, rotated, and values
    are written to `slots_T` (T,), integers, of the cache; with `norms` queries and keys are normalized before. One
    launch on a GPU. Slots of block 0 are padding's and are not written. No gradient. Raises ValueError if shapes,
    strides, devices or dtypes do not fit."""
    shapes = f"qkv {tuple(qkv_THD.shape)}, keys {tuple(keys_BKPD.shape)} and values {tuple(values_BKPD.shape)}"
    if qkv_THD.dim() != 3 or keys_BKPD.dim() != 4 or keys_BKPD.shape != values_BKPD.shape:
        raise ValueError(f"{shapes} must be (T, Q + 2 K, D) and (B, K, P, D) twice")
    (T, N, D), (B, K, P, _) = qkv_THD.shape, keys_BKPD.shape
    if keys_BKPD.shape[3] != D or D % 2 or N <= 2 * K or not P:
        raise ValueError(f"{shapes} do not fit: an even head_dim, and query heads beside {K} of keys and of values")
    if slots_T.shape != (T,) or not all(is_table(x, T, D) for x in (cos_T1D2, sin_T1D2)):
        given = f"slots {tuple(slots_T.shape)}, cos {tuple(cos_T1D2.shape)} and sin {tuple(sin_T1D2.shape)}"
        raise ValueError(f"{given} do not fit qkv {tuple(qkv_THD.shape)}")
    check_alike(qkv=qkv_THD, keys=keys_BKPD, values=values_BKPD)
    check_frozen(qkv=qkv_THD, keys=keys_BKPD, values=values_BKPD, cos=cos_T1D2, sin=sin_T1D2)
    if norms is not None:
        for name, w_D in (("q's norm", norms.q_D), ("k's norm", norms.k_D)):
            if w_D.shape != (D,):
                raise ValueError(f"{name} {tuple(w_D.shape)} does not fit qkv {tuple(qkv_THD.shape)}: ({D},)")
        check_alike(**{"qkv": qkv_THD, "q's norm": norms.q_D, "k's norm": norms.k_D})
    check_integers(qkv_THD.device, slots=slots_T)
    for name, x in (("cos", cos_T1D2), ("sin", sin_T1D2)):
        if x.device != qkv_THD.device or not x.is_contiguous():
            raise ValueError(f"{name} {tuple(x.shape)} must be contiguous and on {qkv_THD.device}, not on {x.device}")
    Q = N - 2 * K
    if not use_triton(qkv_THD, keys_BKPD, values_BKPD):
        q_TQD, k_TKD, v_TKD = qkv_THD.split((Q, K, K), dim=1)
        if norms is not None:
            q_TQD, k_TKD = (
                rms_norm(x_THD.reshape(-1, D), w_D, norms.eps).view(x_THD.shape)
                for x_THD, w_D in ((q_TQD, norms.q_D), (k_TKD, norms.k_D))
            )
        q_TQD, k_TKD = apply_rope(q_TQD, k_TKD, cos_T1D2, sin_T1D2)
        kept_T = (slots_T >= P) & (slots_T < B * P)
        slots, (k_TKD, v_TKD) = slots_T[kept_T].long(), (x[kept_T] for x in (k_TKD, v_TKD))
        keys_BKPD[slots // P, :, slots % P] = k_TKD
        values_BKPD[slots // P, :, slots % P] = v_TKD
        return q_TQD
    out_TQD = qkv_THD.new_empty((T, Q, D))
    q_D, k_D, eps = norms or (qkv_THD, qkv_THD, 0.0)
    if T:
        _rotate_store[(T, -(-N // HEADS))](
            *(qkv_THD, out_TQD, keys_BKPD, values_BKPD, slots_T, cos_T1D2, sin_T1D2, q_D, k_D, *qkv_THD.stride()[:2]),
            *(*keys_BKPD.stride()[:3], *values_BKPD.stride()[:3], Q, K, D // 2, B * P, eps),
            NORM=norms is not None, P=P, HEADS=HEADS, BLOCK=whole_block("head_dim / 2", D // 2, 1024), num_warps=4,
        )  # fmt: skip
    return out_TQD
