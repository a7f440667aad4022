r"""Paged attention for decoding: one new token per request over the KV cache.

The cost is reading the cache once. A program takes one request and one key head, with all query heads of its group, so
that keys are read once per group. If few requests would leave memory bandwidth unused, their keys are split between
several programs (Dao et al. 2023, "Flash-Decoding"). Split s stores its normalized output o_s and its log-sum-exp L_s;
the last of a request and key head that has stored combines them:

    L = log sum_s exp(L_s)        o = sum_s exp(L_s - L) o_s.

The cache consists of blocks of P tokens; entry r of the block table names the blocks of request r. Without a table
request r owns block r.

Shapes: R requests, H query heads, K key/value heads, D head_dim, B blocks of P tokens, N blocks per request
at most, L keys of a request.
"""

import math

import torch
from torch import Tensor

from ptst.kernels.dispatch import check_alike, check_frozen, check_integers, jit, tl, use_triton, whole_block
from ptst.kernels.flash_attention import LOG2E
from ptst.kernels.operators import operator

# (keys per step, warps, stages) by bytes per element. No register spills; not yet timed.
BLOCKS = {2: (64, 4, 3), 4: (16, 4, 1)}
TABLE_STAGES = 5  # in half precision: with a table's entry to be loaded first, these have two tiles in flight
PER_PROCESSOR = 2  # programs that one processor holds (kernels/README.md)
SPLIT = 256  # keys per split at least: with fewer, combining the splits costs more than they save


@jit(do_not_specialize=["room", "table_row", "splits"])  # they change from step to step
def _decode(
    q, k, v, table, lengths, out, parts, lse, counters, q_row, q_head, k_block, k_token, k_head, v_block, v_token,
    v_head, table_row, B, room, splits, H, GROUP, window, scale2, D, TABLE: tl.constexpr, WINDOW: tl.constexpr,
    P: tl.constexpr, IEEE: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
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
    share = tl.cdiv(tl.cdiv(length - low, splits), BN) * BN
    low += split * share
    high = tl.minimum(low + share, length)
    running_max = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    o = tl.zeros([BG, BD], tl.float32)
    for at in range(low, high, BN):
        j = at + tl.arange(0, BN)
        inside = (j < high) & (j < room)
        own, token = tl.zeros([BN], tl.int32) + r, j
        if TABLE:
            own = tl.load(table + r.to(tl.int64) * table_row + j // P, mask=inside, other=-1)
            token = j % P
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
    row = r.to(tl.int64) * H + h
    if splits == 1:
        tl.store(out + row[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=q_mask)
    else:
        first = row * splits
        tl.store(parts + (first + split)[:, None] * D + d[None, :], o, mask=q_mask)
        found = tl.where(nothing, float("-inf"), running_max + tl.log2(total))
        tl.store(lse + first + split, found, mask=g < GROUP)
        tl.debug_barrier()  # every thread's part is stored before one thread counts it
        counter = counters + r * tl.num_programs(1) + head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
            whole = _combined(parts, lse, first, splits, D, q_mask, g < GROUP, BG, BD)
            tl.store(out + row[:, None] * D + d[None, :], whole.to(out.dtype.element_ty), mask=q_mask)
            tl.store(counter, 0)


@jit
def _combined(parts, lse, first, splits, D, q_mask, g_mask, BG: tl.constexpr, BD: tl.constexpr):
    """All splits' outputs together, always in the same order. Read past the processor's own cache, which others' stores
    do not reach."""
    d = tl.arange(0, BD)
    largest = tl.full([BG], float("-inf"), tl.float32)
    for s in range(splits):
        largest = tl.maximum(largest, tl.load(lse + first + s, mask=g_mask, other=0.0, cache_modifier=".cg"))
    total = tl.zeros([BG], tl.float32)
    o = tl.zeros([BG, BD], tl.float32)
    for s in range(splits):
        weight = tl.exp2(tl.load(lse + first + s, mask=g_mask, other=0.0, cache_modifier=".cg") - largest)
        total += weight
        part = tl.load(parts + (first + s)[:, None] * D + d[None, :], mask=q_mask, other=0.0, cache_modifier=".cg")
        o += part * weight[:, None]
    return o / total[:, None]


@operator("attention_decode")
def _op(
    q_RHD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, table_RN: Tensor | None, lengths_R: Tensor, window: int, splits: int,
    counters: Tensor,
) -> Tensor:  # fmt: skip
    R, H, D = q_RHD.shape
    B, P, K = k_BPKD.shape[:3]
    out_RHD = q_RHD.new_empty((R, H, D))
    if not R:
        return out_RHD
    several = splits if splits > 1 else 0
    parts, lse = (q_RHD.new_empty(s, dtype=torch.float32) for s in ((R, H, several, D), (R, H, several)))
    wide, group = max(16, whole_block("head_dim", D, 256)), max(16, whole_block("query heads per key", H // K, 256))
    keys, warps, stages = BLOCKS[q_RHD.element_size()]
    if table_RN is not None and stages > 1 and wide <= 128:  # of wider heads, two tiles are too much for small chips
        stages = TABLE_STAGES
    _decode[(R, K, splits)](
        *(q_RHD, k_BPKD, v_BPKD, lengths_R if table_RN is None else table_RN, lengths_R, out_RHD, parts, lse, counters),
        *(*q_RHD.stride()[:2], *k_BPKD.stride()[:3], *v_BPKD.stride()[:3]),
        *(0 if table_RN is None else table_RN.stride(0), B, P * (1 if table_RN is None else table_RN.shape[1])),
        *(splits, H, H // K, window, D**-0.5 * LOG2E, D),
        TABLE=table_RN is not None, WINDOW=window > 0, P=1 if table_RN is None else P,
        IEEE=q_RHD.dtype == torch.float32, BG=group, BN=keys, BD=wide, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_RHD


@_op.register_fake
def _(q_RHD, k_BPKD, v_BPKD, table_RN, lengths_R, window, splits, counters):
    return q_RHD.new_empty(q_RHD.shape)


def splits_for(requests: int, heads: int, longest: int, processors: int) -> int:
    """Number of programs that share a request's keys: as many as processors hold at once, each with at least SPLIT
    keys."""
    return max(1, min(PER_PROCESSOR * processors // max(1, requests * heads), -(-longest // SPLIT)))


def counters_for(requests: int, heads: int, device: torch.device) -> Tensor:
    """Zeros that the programs of one launch count in; they are zeros again after it, for the next one."""
    return torch.zeros(requests * heads, dtype=torch.int32, device=device)


def decode_attention(
    q_RHD: Tensor,
    k_BPKD: Tensor,
    v_BPKD: Tensor,
    lengths_R: Tensor,
    *,
    longest: int | None = None,
    table_RN: Tensor | None = None,
    window: int | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Attention (R, H, D) of each request's newest token with its `lengths_R[r]` (>= 1) cached ones, itself included.

    Keys and values (B, P, K, D) may be views whose last axis is contiguous. `table_RN` (R, N), integers: the block
    table; without it request r owns block r. `longest`, at least the largest length, limits what is read. No gradient.
    `counters`: those of `counters_for`, which calls one after the other may share; without them a call makes its own.
    Raises ValueError if shapes, devices or dtypes do not fit; a length beyond `longest` or the cache, and on a GPU
    a block outside of it, makes that request's output NaN."""
    if q_RHD.dim() != 3 or k_BPKD.dim() != 4 or (table_RN is not None and table_RN.dim() != 2):
        q, k, v = (tuple(x.shape) for x in (q_RHD, k_BPKD, v_BPKD))
        table = "" if table_RN is None else f", the block table {tuple(table_RN.shape)} (R, N)"
        raise ValueError(f"queries {q} must be (R, H, D), keys {k} and values {v} (B, P, K, D){table}")
    R, H, D = q_RHD.shape
    B, P, K = k_BPKD.shape[:3]
    if k_BPKD.shape != v_BPKD.shape or k_BPKD.shape[3] != D or not all((K, H, D, P)) or H % K or (R and not B):
        q, k, v = (tuple(x.shape) for x in (q_RHD, k_BPKD, v_BPKD))
        raise ValueError(f"queries {q} do not fit keys {k} and values {v}")
    rows = B if table_RN is None else table_RN.shape[0]
    if lengths_R.shape != (R,) or (rows < R if table_RN is None else rows != R):
        raise ValueError(f"{R} requests need a length and blocks each: {tuple(lengths_R.shape)} lengths, {rows} rows")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; a query sees at least itself, so it must be 1 or more")
    check_alike(q=q_RHD, k=k_BPKD, v=v_BPKD)
    check_frozen(q=q_RHD, k=k_BPKD, v=v_BPKD)
    check_integers(q_RHD.device, lengths=lengths_R, **({} if table_RN is None else {"table": table_RN}))
    if counters is not None:
        check_integers(q_RHD.device, counters=counters)
        if counters.dtype != torch.int32 or counters.numel() < R * K:
            raise ValueError(f"counters {counters.dtype} {tuple(counters.shape)} must be int32, {R * K} or more")
    room = P if table_RN is None else P * table_RN.shape[1]
    longest = room if longest is None else min(longest, room)
    if use_triton(q_RHD, k_BPKD, v_BPKD):
        processors = torch.cuda.get_device_properties(q_RHD.device).multi_processor_count if q_RHD.is_cuda else 1
        splits = splits_for(R, K, longest if window is None else min(longest, window), processors)
        counters = counters_for(R, K, q_RHD.device) if counters is None else counters
        return _op(q_RHD, k_BPKD, v_BPKD, table_RN, lengths_R, window or 0, splits, counters)
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
    out_RHD = (weights_RKGL @ v_RLKD.transpose(1, 2)).flatten(1, 2)
    return out_RHD.masked_fill_(((lengths_R < 1) | (lengths_R > longest))[:, None, None], math.nan)
