r"""Paged attention for decoding: one new token per request over the KV cache.

The cost is reading the cache once. A program takes one request and one key head, with all query heads of its group, so
that keys are read once per group. If few requests would leave memory bandwidth unused, their keys are split between
several programs (Dao et al. 2023, "Flash-Decoding"). Split s returns its normalized output o_s and its log-sum-exp L_s;
combined:

    L = log sum_s exp(L_s)        o = sum_s exp(L_s - L) o_s.

The cache consists of blocks of P tokens; entry r of the block table names the blocks of request r. Without a table
request r owns block r.

Shapes: R requests, H query heads, K key/value heads, D head_dim, B blocks of P tokens, N blocks per request
at most, L keys of a request.
"""

import math

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, check_alike, check_integers, jit, tl, use_triton, whole_block
from ptst.kernels.flash_attention import LOG2E
from ptst.kernels.operators import operator

# (keys per step, warps, stages) by bytes per element. No register spills; not yet timed.
BLOCKS = {2: (64, 4, 3), 4: (16, 4, 1)}
SPLIT = 256  # keys per split at least: with fewer, combining the splits costs more than they save


@jit
def _decode(
    q, k, v, table, lengths, out, lse, q_row, q_head, k_block, k_token, k_head, v_block, v_token, v_head, table_row,
    B, P, N, H, GROUP, window, scale2, D, TABLE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    IEEE: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    h = head * GROUP + g
    qs = tl.load(q + r.to(tl.int64) * q_row + h[:, None] * q_head + d[None, :], mask=q_mask, other=0.0)
    length = tl.load(lengths + r)
    low = 0
    if WINDOW:
        low = tl.maximum(0, length - window)
    share = tl.cdiv(tl.cdiv(length - low, SPLITS), BN) * BN
    low += split * share
    high = tl.minimum(low + share, length)
    running_max = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    o = tl.zeros([BG, BD], tl.float32)
    for at in range(low, high, BN):
        j = at + tl.arange(0, BN)
        place, token = j // P, j % P
        inside = (j < high) & (place < N)
        own = tl.zeros([BN], tl.int32) + r
        if TABLE:
            own = tl.load(table + r.to(tl.int64) * table_row + place, mask=inside, other=-1)
        known = inside & (own >= 0) & (own < B)
        k_mask = known[:, None] & (d < D)[None, :]
        start = own.to(tl.int64) * k_block + token * k_token + head * k_head
        ks = tl.load(k + start[:, None] + d[None, :], mask=k_mask, other=0.0)
        start = own.to(tl.int64) * v_block + token * v_token + head * v_head
        vs = tl.load(v + start[:, None] + d[None, :], mask=k_mask, other=0.0)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32") * scale2
        # A length or a block outside the cache reads nothing and makes the request's output NaN.
        s = tl.where(known[None, :], s, tl.where((j < high)[None, :], float("nan"), float("-inf")))
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        total = total * rescale + tl.sum(p, axis=1)
        o = o * rescale[:, None]
        o += tl.dot(p.to(vs.dtype), vs, input_precision="ieee" if IEEE else "tf32")
        running_max = new_max
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    o = o / total[:, None]
    at = (r.to(tl.int64) * H + h) * SPLITS + split
    tl.store(out + at[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=q_mask)
    if SPLITS > 1:
        tl.store(lse + at, tl.where(nothing, float("-inf"), running_max + tl.log2(total)), mask=g < GROUP)


@jit
def _combine(parts, lse, out, D, SPLITS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    l = tl.load(lse + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    running_max = tl.max(l, axis=0)
    weight = tl.exp2(l - tl.where(running_max == float("-inf"), 0.0, running_max))
    total = tl.sum(weight, axis=0)
    q_mask = (s < SPLITS)[:, None] & (d < D)[None, :]
    o = tl.load(parts + (row * SPLITS + s)[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    o = tl.sum(o * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + d, o.to(out.dtype.element_ty), mask=d < D)


@operator("attention_decode")
def _op(
    q_RHD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, table_RN: Tensor | None, lengths_R: Tensor, window: int, splits: int
) -> Tensor:
    R, H, D = q_RHD.shape
    B, P, K = k_BPKD.shape[:3]
    out_RHD = q_RHD.new_empty((R, H, D))
    if not R:
        return out_RHD
    parts, lse = out_RHD, out_RHD
    if splits > 1:
        parts, lse = (q_RHD.new_empty(s, dtype=torch.float32) for s in ((R, H, splits, D), (R, H, splits)))
    wide, group = max(16, whole_block("head_dim", D, 256)), max(16, whole_block("query heads per key", H // K, 256))
    keys, warps, stages = BLOCKS[q_RHD.element_size()]
    _decode[(R, K, splits)](
        *(q_RHD, k_BPKD, v_BPKD, lengths_R if table_RN is None else table_RN, lengths_R, parts, lse),
        *(*q_RHD.stride()[:2], *k_BPKD.stride()[:3], *v_BPKD.stride()[:3]),
        *(0 if table_RN is None else table_RN.stride(0), B, P, 1 if table_RN is None else table_RN.shape[1]),
        *(H, H // K, window, D**-0.5 * LOG2E, D),
        TABLE=table_RN is not None, WINDOW=window > 0, SPLITS=splits, IEEE=q_RHD.dtype == torch.float32,
        BG=group, BN=keys, BD=wide, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(R * H,)](parts, lse, out_RHD, D, SPLITS=splits, BS=block(splits, 1 << 20), BD=wide, num_warps=4)
    return out_RHD


@_op.register_fake
def _(q_RHD, k_BPKD, v_BPKD, table_RN, lengths_R, window, splits):
    return q_RHD.new_empty(q_RHD.shape)


def splits_for(requests: int, heads: int, longest: int, processors: int) -> int:
    """Number of programs that share a request's keys: two per processor in all, each with at least SPLIT keys."""
    return max(1, min(-(-2 * processors // (requests * heads)), -(-longest // SPLIT)))


def decode_attention(
    q_RHD: Tensor,
    k_BPKD: Tensor,
    v_BPKD: Tensor,
    lengths_R: Tensor,
    *,
    longest: int | None = None,
    table_RN: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention (R, H, D) of each request's newest token with its `lengths_R[r]` (>= 1) cached ones, itself included.

    Keys and values (B, P, K, D) may be views whose last axis is contiguous. `table_RN` (R, N), integers: the block
    table; without it request r owns block r. `longest`, at least the largest length, limits what is read. No gradient.
    Raises ValueError if shapes, devices or dtypes do not fit; on a GPU a length or block outside the cache makes that
    request's output NaN."""
    if q_RHD.dim() != 3 or k_BPKD.dim() != 4 or (table_RN is not None and table_RN.dim() != 2):
        q, k, v = (tuple(x.shape) for x in (q_RHD, k_BPKD, v_BPKD))
        table = "" if table_RN is None else f", the block table {tuple(table_RN.shape)} (R, N)"
        raise ValueError(f"queries {q} must be (R, H, D), keys {k} and values {v} (B, P, K, D){table}")
    R, H, D = q_RHD.shape
    B, P, K = k_BPKD.shape[:3]
    if k_BPKD.shape != v_BPKD.shape or k_BPKD.shape[3] != D or K == 0 or H % K:
        q, k, v = (tuple(x.shape) for x in (q_RHD, k_BPKD, v_BPKD))
        raise ValueError(f"queries {q} do not fit keys {k} and values {v}")
    rows = B if table_RN is None else table_RN.shape[0]
    if lengths_R.shape != (R,) or (rows < R if table_RN is None else rows != R):
        raise ValueError(f"{R} requests need a length and blocks each: {tuple(lengths_R.shape)} lengths, {rows} rows")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; a query sees at least itself, so it must be 1 or more")
    check_alike(q=q_RHD, k=k_BPKD, v=v_BPKD)
    check_integers(q_RHD.device, lengths=lengths_R, **({} if table_RN is None else {"table": table_RN}))
    room = P if table_RN is None else P * table_RN.shape[1]
    longest = room if longest is None else min(longest, room)
    if use_triton(q_RHD, k_BPKD, v_BPKD):
        processors = torch.cuda.get_device_properties(q_RHD.device).multi_processor_count if q_RHD.is_cuda else 1
        splits = splits_for(R, K, longest if window is None else min(longest, window), processors)
        return _op(q_RHD, k_BPKD, v_BPKD, table_RN, lengths_R, window or 0, splits)
    if table_RN is None:
        k_RLKD, v_RLKD = k_BPKD[:R, :longest], v_BPKD[:R, :longest]
    else:
        blocks = -(-longest // P)
        k_RLKD, v_RLKD = (x[table_RN[:, :blocks]].flatten(1, 2)[:, :longest] for x in (k_BPKD, v_BPKD))
    age_RL = lengths_R[:, None] - 1 - torch.arange(k_RLKD.shape[1], device=q_RHD.device)
    seen_RL = age_RL >= 0
    if window is not None:
        seen_RL &= age_RL < window
    bias_RL = torch.zeros(seen_RL.shape, dtype=q_RHD.dtype, device=q_RHD.device).masked_fill_(~seen_RL, -math.inf)
    # The H / K query heads of a group form a matrix of queries over one set of keys.
    q_RKGD = q_RHD.unflatten(1, (K, H // K)) * (1 / math.sqrt(D))
    weights_RKGL = (q_RKGD @ k_RLKD.permute(0, 2, 3, 1)).add_(bias_RL[:, None, None]).softmax(-1)
    return (weights_RKGL @ v_RLKD.transpose(1, 2)).flatten(1, 2)
