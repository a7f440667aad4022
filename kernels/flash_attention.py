r"""Flash attention (Dao et al. 2022, arXiv 2205.14135; 2023, arXiv 2307.08691) over packed documents, in Triton.

For a query, with s_j = scale q . k_j over the keys that it sees; the maximum m and the sum l are updated key by key:

    p_j = exp(s_j - m) / l        o = sum_j p_j v_j        L = m + log l  (kept for backward: one float32 per query)

    delta = do . o        dp_j = do . v_j        ds_j = p_j (dp_j - delta)
    dq = scale sum_j ds_j k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i p_ij do_i

A program takes a block of queries of one document (forward, dq), or a block of its keys (dk, dv). Its loop covers only
the keys or queries that causality, the window and the document allow: there is no full mask, and only blocks at the
edges compute scores that are discarded. A program of dk and dv loops over all query heads of its key head, so that no
two programs add to the same address: the backward pass is deterministic, without atomics.

Query i of a document with q queries and k keys is aligned with key i + k - q (bottom-right). Tables of blocks are built
on the host, where the boundaries are known, int32: (first token of the block, end of the document in its own tensor,
first and end of the document in the other tensor); "own" is q for blocks of queries, k for blocks of keys.

Shapes: T tokens, H query heads, K key heads, D head_dim, B blocks; in the kernels row = token, i queries, j keys.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ptst.kernels.dispatch import block, jit, tl

LOG2E = 1.4426950408889634
# (query block, key block, warps, stages) of the forward pass, of dq, and of dk and dv, for head_dim up to 64 and above.
# Chosen so that no register spills (python benchmarks/compile_kernels.py); not yet timed.
BLOCKS = {
    80: {
        64: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
        128: ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 1)),
    },
    90: {
        64: ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 1)),
    },
}
# Twice the bytes, and no tensor cores.
FLOAT32 = {
    64: ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
    128: ((16, 32, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
}
FORCED: tuple[int, int] | None = None  # set by tests: small blocks, so that short documents have several
ARCH: int | None = None  # set by benchmarks/compile_kernels.py, which has no GPU to ask


def blocks(device: torch.device, head_dim: int, dtype: torch.dtype, kind: int) -> tuple[int, int, int, int]:
    """(query block, key block, warps, stages) of the forward pass (kind 0), of dq (1), of dk and dv (2)."""
    if FORCED is not None:
        return *FORCED, 4, 1
    size = 64 if head_dim <= 64 else 128
    if dtype == torch.float32:
        return FLOAT32[size][kind]
    arch = ARCH or (90 if torch.cuda.get_device_capability(device)[0] >= 9 else 80)
    return BLOCKS[arch][size][kind]


@lru_cache(64)
def table(cu_own: tuple[int, ...], cu_other: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Blocks of at most `size` tokens of each document: int32 (B, 4), most work first, as it is launched first."""
    spans = zip(cu_own, cu_own[1:], cu_other, cu_other[1:], strict=False)
    entries = [(start, b, c, d) for a, b, c, d in spans for start in range(a, b, size)]
    entries.sort(key=lambda r: r[2] - r[0] + r[1] - r[3])
    return torch.tensor(entries, dtype=torch.int32).reshape(-1, 4).to(device)


@jit
def _scores(q, kt, i, j, offset, window, scale2, IEEE: tl.constexpr, WINDOW: tl.constexpr):
    """Scores in units of log 2, -inf where query i must not see key j; query i is aligned with key i + offset.

    Causality keeps queries within their document's keys. Queries past the document's end are read as zeros, have a
    gradient of zero and are not written, so they need no mask."""
    s = tl.dot(q, kt, input_precision="ieee" if IEEE else "tf32") * scale2
    seen = j[None, :] <= i[:, None] + offset
    if WINDOW:
        seen = seen & (i[:, None] + offset - j[None, :] < window)
    return tl.where(seen, s, float("-inf"))


@jit
def _forward(
    q, k, v, o, lse, blocks, q_row, q_head, k_row, k_head, v_row, v_head, T, H, GROUP, window, scale2,
    D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    entry = blocks + tl.program_id(0) * 4
    start, end_i = tl.load(entry), tl.load(entry + 1)
    begin, end_j = tl.load(entry + 2), tl.load(entry + 3)
    h = tl.program_id(1)
    offset = end_j - end_i
    i, d = start + tl.arange(0, BM), tl.arange(0, BD)
    q_mask = (i < end_i)[:, None] & (d < D)[None, :]
    row = i.to(tl.int64)
    qs = tl.load(q + row[:, None] * q_row + h * q_head + d[None, :], mask=q_mask, other=0.0)
    low = begin
    if WINDOW:
        low = tl.maximum(begin, start + offset - window + 1)
    high = tl.minimum(end_j, tl.minimum(start + BM, end_i) + offset)
    running_max = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    for at in range(low, high, BN):
        j = at + tl.arange(0, BN)
        key = j.to(tl.int64)
        k_mask = (j < end_j)[:, None] & (d < D)[None, :]
        ks = tl.load(k + key[:, None] * k_row + (h // GROUP) * k_head + d[None, :], mask=k_mask, other=0.0)
        vs = tl.load(v + key[:, None] * v_row + (h // GROUP) * v_head + d[None, :], mask=k_mask, other=0.0)
        s = _scores(qs, tl.trans(ks), i, j, offset, window, scale2, IEEE, WINDOW)
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # queries that have seen no key yet
        p = tl.exp2(s - finite_max[:, None])
        rescale = tl.exp2(running_max - finite_max)
        total = total * rescale + tl.sum(p, axis=1)
        out = out * rescale[:, None]
        out += tl.dot(p.to(vs.dtype), vs, input_precision="ieee" if IEEE else "tf32")
        running_max = new_max
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = out / total[:, None]
    tl.store(o + (row[:, None] * H + h) * D + d[None, :], out.to(o.dtype.element_ty), mask=q_mask)
    tl.store(lse + h * T + i, tl.where(nothing, 0.0, running_max + tl.log2(total)), mask=i < end_i)


@jit
def _delta(o, do, delta, T, H, D, BM: tl.constexpr, BD: tl.constexpr):
    i, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    h = tl.program_id(1)
    at = (i.to(tl.int64)[:, None] * H + h) * D + d[None, :]
    q_mask = (i < T)[:, None] & (d < D)[None, :]
    out = tl.load(o + at, mask=q_mask, other=0.0).to(tl.float32)
    grad = tl.load(do + at, mask=q_mask, other=0.0).to(tl.float32)
    tl.store(delta + h * T + i, tl.sum(out * grad, axis=1), mask=i < T)


@jit
def _dq(
    q, k, v, do, lse, delta, dq, blocks, q_row, q_head, k_row, k_head, v_row, v_head, T, H, GROUP, window, scale,
    scale2, D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    entry = blocks + tl.program_id(0) * 4
    start, end_i = tl.load(entry), tl.load(entry + 1)
    begin, end_j = tl.load(entry + 2), tl.load(entry + 3)
    h = tl.program_id(1)
    offset = end_j - end_i
    i, d = start + tl.arange(0, BM), tl.arange(0, BD)
    q_mask = (i < end_i)[:, None] & (d < D)[None, :]
    row = i.to(tl.int64)
    flat = (row[:, None] * H + h) * D + d[None, :]
    qs = tl.load(q + row[:, None] * q_row + h * q_head + d[None, :], mask=q_mask, other=0.0)
    dos = tl.load(do + flat, mask=q_mask, other=0.0)
    lse_i = tl.load(lse + h * T + i, mask=i < end_i, other=0.0)
    delta_i = tl.load(delta + h * T + i, mask=i < end_i, other=0.0)
    low = begin
    if WINDOW:
        low = tl.maximum(begin, start + offset - window + 1)
    high = tl.minimum(end_j, tl.minimum(start + BM, end_i) + offset)
    out = tl.zeros([BM, BD], tl.float32)
    for at in range(low, high, BN):
        j = at + tl.arange(0, BN)
        key = j.to(tl.int64)
        k_mask = (j < end_j)[:, None] & (d < D)[None, :]
        ks = tl.load(k + key[:, None] * k_row + (h // GROUP) * k_head + d[None, :], mask=k_mask, other=0.0)
        vs = tl.load(v + key[:, None] * v_row + (h // GROUP) * v_head + d[None, :], mask=k_mask, other=0.0)
        s = _scores(qs, tl.trans(ks), i, j, offset, window, scale2, IEEE, WINDOW)
        p = tl.exp2(s - lse_i[:, None])
        dp = tl.dot(dos, tl.trans(vs), input_precision="ieee" if IEEE else "tf32")
        ds = p * (dp - delta_i[:, None])
        out += tl.dot(ds.to(ks.dtype), ks, input_precision="ieee" if IEEE else "tf32")
    tl.store(dq + flat, (out * scale).to(dq.dtype.element_ty), mask=q_mask)


@jit
def _dkdv(
    q, k, v, do, lse, delta, dk, dv, blocks, q_row, q_head, k_row, k_head, v_row, v_head, T, H, GROUP, window, scale,
    scale2, D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    entry = blocks + tl.program_id(0) * 4
    start, end_j = tl.load(entry), tl.load(entry + 1)
    begin, end_i = tl.load(entry + 2), tl.load(entry + 3)
    head = tl.program_id(1)
    offset = end_j - end_i
    j, d = start + tl.arange(0, BN), tl.arange(0, BD)
    k_mask = (j < end_j)[:, None] & (d < D)[None, :]
    key = j.to(tl.int64)
    ks = tl.load(k + key[:, None] * k_row + head * k_head + d[None, :], mask=k_mask, other=0.0)
    vs = tl.load(v + key[:, None] * v_row + head * v_head + d[None, :], mask=k_mask, other=0.0)
    low = tl.maximum(begin, start - offset)
    high = end_i
    if WINDOW:
        high = tl.minimum(end_i, tl.minimum(start + BN, end_j) - 1 - offset + window)
    dks = tl.zeros([BN, BD], tl.float32)
    dvs = tl.zeros([BN, BD], tl.float32)
    for h in range(head * GROUP, (head + 1) * GROUP):
        for at in range(low, high, BM):
            i = at + tl.arange(0, BM)
            row = i.to(tl.int64)
            q_mask = (i < end_i)[:, None] & (d < D)[None, :]
            qs = tl.load(q + row[:, None] * q_row + h * q_head + d[None, :], mask=q_mask, other=0.0)
            dos = tl.load(do + (row[:, None] * H + h) * D + d[None, :], mask=q_mask, other=0.0)
            lse_i = tl.load(lse + h * T + i, mask=i < end_i, other=0.0)
            delta_i = tl.load(delta + h * T + i, mask=i < end_i, other=0.0)
            s = _scores(qs, tl.trans(ks), i, j, offset, window, scale2, IEEE, WINDOW)
            p = tl.exp2(s - lse_i[:, None])
            dvs += tl.dot(tl.trans(p.to(dos.dtype)), dos, input_precision="ieee" if IEEE else "tf32")
            dp = tl.dot(dos, tl.trans(vs), input_precision="ieee" if IEEE else "tf32")
            ds = p * (dp - delta_i[:, None])
            dks += tl.dot(tl.trans(ds.to(qs.dtype)), qs, input_precision="ieee" if IEEE else "tf32")
    K = H // GROUP
    to = (key[:, None] * K + head) * D + d[None, :]
    tl.store(dk + to, (dks * scale).to(dk.dtype.element_ty), mask=k_mask)
    tl.store(dv + to, dvs.to(dv.dtype.element_ty), mask=k_mask)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for t in tensors for s in t.stride()[:2])


@torch.library.custom_op("ptst::attention", mutates_args=())
def op(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], window: int
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp in base 2, float32 (H, T)). `window` 0: none."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    out_THD, lse_HT = q_THD.new_zeros((T, H, D)), q_THD.new_zeros((H, T), dtype=torch.float32)
    bm, bn, warps, stages = blocks(q_THD.device, D, q_THD.dtype, 0)
    queries_B4 = table(tuple(cu_q), tuple(cu_k), bm, q_THD.device)
    if len(queries_B4):
        _forward[(len(queries_B4), H)](
            *(q_THD, k_TKD, v_TKD, out_THD, lse_HT, queries_B4, *_strides(q_THD, k_TKD, v_TKD)),
            *(T, H, H // K, window, D**-0.5 * LOG2E, D),
            WINDOW=window > 0, IEEE=q_THD.dtype == torch.float32, BM=bm, BN=bn, BD=max(16, block(D, 256)),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_THD, lse_HT


@op.register_fake
def _(q_THD, k_TKD, v_TKD, cu_q, cu_k, window):
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((q_THD.shape[1], len(q_THD)), dtype=torch.float32)


@torch.library.custom_op("ptst::attention_backward", mutates_args=())
def backward_op(
    do_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    device, wide = q_THD.device, max(16, block(D, 256))
    dq_THD, dk_TKD, dv_TKD = (x.new_zeros(x.shape) for x in (q_THD, k_TKD, v_TKD))
    delta_HT = q_THD.new_empty((H, T), dtype=torch.float32)
    if T == 0:
        return dq_THD, dk_TKD, dv_TKD
    _delta[(-(-T // 32), H)](out_THD, do_THD, delta_HT, T, H, D, BM=32, BD=wide, num_warps=4)
    common = (*_strides(q_THD, k_TKD, v_TKD), T, H, H // K, window, D**-0.5, D**-0.5 * LOG2E, D)
    given = (q_THD, k_TKD, v_TKD, do_THD, lse_HT, delta_HT)
    named = {"WINDOW": window > 0, "IEEE": q_THD.dtype == torch.float32, "BD": wide}
    bm, bn, warps, stages = blocks(device, D, q_THD.dtype, 1)
    queries_B4 = table(tuple(cu_q), tuple(cu_k), bm, device)
    _dq[(len(queries_B4), H)](
        *given, dq_THD, queries_B4, *common, **named, BM=bm, BN=bn, num_warps=warps, num_stages=stages
    )
    bm, bn, warps, stages = blocks(device, D, q_THD.dtype, 2)
    keys_B4 = table(tuple(cu_k), tuple(cu_q), bn, device)
    _dkdv[(len(keys_B4), K)](
        *given, dk_TKD, dv_TKD, keys_B4, *common, **named, BM=bm, BN=bn, num_warps=warps, num_stages=stages
    )
    return dq_THD, dk_TKD, dv_TKD


@backward_op.register_fake
def _(do_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, cu_q, cu_k, window):
    return tuple(x.new_empty(x.shape) for x in (q_THD, k_TKD, v_TKD))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.bounds = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do_THD, _dlse):
    dq, dk, dv = torch.ops.ptst.attention_backward(do_THD.contiguous(), *ctx.saved_tensors, *ctx.bounds)
    return dq, dk, dv, None, None, None


op.register_autograd(_differentiate, setup_context=_setup)
