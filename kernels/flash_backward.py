"""Backward pass of flash attention in Triton: the kernels that flash_attention.py launches; the maths stands there.

As in the forward pass (flash_forward.py), the middle of every loop is unmasked, pipelined, and loads by TMA where the
GPU has it; the edges mask. dk and dv keep scores as keys x queries: the weights are then already laid out as the left
factors of both gradients, and nothing is transposed through shared memory.
"""

from ptst.kernels.dispatch import jit, tl
from ptst.kernels.flash_forward import load_tile, seen


@jit
def delta(o, do, delta, T, H, D, BM: tl.constexpr, BD: tl.constexpr):
    i, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    h = tl.program_id(1)
    at = (i.to(tl.int64)[:, None] * H + h) * D + d[None, :]
    q_mask = (i < T)[:, None] & (d < D)[None, :]
    out = tl.load(o + at, mask=q_mask, other=0.0).to(tl.float32)
    grad = tl.load(do + at, mask=q_mask, other=0.0).to(tl.float32)
    tl.store(delta + h * T + i, tl.sum(out * grad, axis=1), mask=i < T)


@jit
def _dq_edge(
    qs, dos, k, v, out, lse_i, delta_i, low, high, k_row, v_row, i, offset, end_j, window, scale2,
    D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dq from keys low to high, each score masked."""
    d = tl.arange(0, BD)
    for at in tl.range(low, high, BN, num_stages=EDGE_STAGES):
        j = at + tl.arange(0, BN)
        key = j.to(tl.int64)
        inside = (j < end_j)[:, None] & (d < D)[None, :]
        ks = tl.load(k + key[:, None] * k_row + d[None, :], mask=inside, other=0.0)
        vs = tl.load(v + key[:, None] * v_row + d[None, :], mask=inside, other=0.0)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        s = tl.where(seen(i[:, None], j[None, :], offset, window, WINDOW), s, float("-inf"))
        p = tl.exp2(s * scale2 - lse_i[:, None])
        dp = tl.dot(dos, tl.trans(vs), input_precision="ieee" if IEEE else "tf32")
        ds = p * (dp - delta_i[:, None])
        out = tl.dot(ds.to(ks.dtype), ks, out, input_precision="ieee" if IEEE else "tf32")
    return out


@jit
def dq(
    q, k, v, do, lse, delta, dq, blocks, k_tma, v_tma, q_row, q_head, k_row, k_head, v_row, v_head, out_row, T, H,
    GROUP, window, scale, scale2, D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr, EDGE: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    entry = blocks + tl.program_id(1) * 4
    start, end_i = tl.load(entry), tl.load(entry + 1)
    begin, end_j = tl.load(entry + 2), tl.load(entry + 3)
    h = tl.program_id(0)
    head = h // GROUP
    offset = end_j - end_i
    i, d = start + tl.arange(0, BM), tl.arange(0, BD)
    q_mask = (i < end_i)[:, None] & (d < D)[None, :]
    row = i.to(tl.int64)
    qs = tl.load(q + row[:, None] * q_row + h * q_head + d[None, :], mask=q_mask, other=0.0)
    dos = tl.load(do + (row[:, None] * H + h) * D + d[None, :], mask=q_mask, other=0.0)
    lse_i = tl.load(lse + h * T + i, mask=i < end_i, other=0.0)
    delta_i = tl.load(delta + h * T + i, mask=i < end_i, other=0.0)
    k += head * k_head
    v += head * v_head
    out = tl.zeros([BM, BD], tl.float32)
    low = begin
    high = tl.minimum(end_j, tl.minimum(start + BM, end_i) + offset)
    if WINDOW:
        low = tl.maximum(begin, start + offset - window + 1)
        hidden = tl.maximum(start + BM + offset - window - low, 0)
        first = tl.minimum(low + (hidden + EDGE - 1) // EDGE * EDGE, high)
        out = _dq_edge(
            qs, dos, k, v, out, lse_i, delta_i, low, first, k_row, v_row, i, offset, end_j, window, scale2,
            D, WINDOW, IEEE, EDGE, BD, EDGE_STAGES,
        )  # fmt: skip
        low = first
    last = low + tl.maximum(start + offset + 1 - low, 0) // BN * BN
    for at in tl.range(low, last, BN, num_stages=STAGES):
        ks = load_tile(k, k_tma, at, head, k_row, D, BN, BD, TMA, WHOLE)
        vs = load_tile(v, v_tma, at, head, v_row, D, BN, BD, TMA, WHOLE)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        dp = tl.dot(dos, tl.trans(vs), input_precision="ieee" if IEEE else "tf32")
        p = tl.exp2(s * scale2 - lse_i[:, None])
        ds = p * (dp - delta_i[:, None])
        out = tl.dot(ds.to(ks.dtype), ks, out, input_precision="ieee" if IEEE else "tf32")
    out = _dq_edge(
        qs, dos, k, v, out, lse_i, delta_i, last, high, k_row, v_row, i, offset, end_j, window, scale2,
        D, WINDOW, IEEE, EDGE, BD, EDGE_STAGES,
    )  # fmt: skip
    # Read again, as in dkdv: registers would hold the rows' addresses through the loops.
    start, end_i = tl.load(entry, volatile=True), tl.load(entry + 1, volatile=True)
    i = start + tl.arange(0, BM)
    to = i.to(tl.int64)[:, None] * out_row + h * D + d[None, :]
    tl.store(dq + to, (out * scale).to(dq.dtype.element_ty), mask=(i < end_i)[:, None] & (d < D)[None, :])


@jit
def dkdv(
    q, k, v, do, lse, delta, dk, dv, blocks, q_tma, do_tma, q_row, q_head, k_row, k_head, v_row, v_head, out_row, T, H,
    GROUP, window, scale, scale2, D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr, EDGE: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    entry = blocks + tl.program_id(1) * 4
    start, end_j = tl.load(entry), tl.load(entry + 1)
    begin, end_i = tl.load(entry + 2), tl.load(entry + 3)
    head = tl.program_id(0)
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
    # Queries from start + BN - 1 - offset on see the last key of the block; before start - offset + window, the first.
    first = tl.minimum(low + (tl.maximum(start + BN - 1 - offset - low, 0) + EDGE - 1) // EDGE * EDGE, high)
    free = high
    if WINDOW:
        free = tl.minimum(high, start - offset + window)
    last = first + tl.maximum(free - first, 0) // BM * BM
    dks = tl.zeros([BN, BD], tl.float32)
    dvs = tl.zeros([BN, BD], tl.float32)
    # All heads of the group in one loop, so that its copies run on from one head to the next.
    at = first
    h = head * GROUP
    for _ in tl.range(0, (last - first) // BM * GROUP, num_stages=STAGES):
        i = at + tl.arange(0, BM)
        qs = load_tile(q + h * q_head, q_tma, at, h, q_row, D, BM, BD, TMA, WHOLE)
        lse_i = tl.load(lse + h * T + i)
        s = tl.dot(ks, tl.trans(qs), input_precision="ieee" if IEEE else "tf32")
        p = tl.exp2(s * scale2 - lse_i[None, :])
        dos = load_tile(do + h * D, do_tma, at, h, H * D, D, BM, BD, TMA, WHOLE)
        dvs = tl.dot(p.to(dos.dtype), dos, dvs, input_precision="ieee" if IEEE else "tf32")
        dp = tl.dot(vs, tl.trans(dos), input_precision="ieee" if IEEE else "tf32")
        delta_i = tl.load(delta + h * T + i)
        ds = p * (dp - delta_i[None, :])
        dks = tl.dot(ds.to(qs.dtype), qs, dks, input_precision="ieee" if IEEE else "tf32")
        at += BM
        next_head = at >= last
        h += next_head.to(tl.int32)
        at = tl.where(next_head, first, at)
    # Read again: else each thread would hold its keys' numbers through the main loop, in registers that it needs.
    start, end_j = tl.load(entry, volatile=True), tl.load(entry + 1, volatile=True)
    begin, end_i = tl.load(entry + 2, volatile=True), tl.load(entry + 3, volatile=True)
    j = start + tl.arange(0, BN)
    at = tl.where(low < first, low, last)
    h = head * GROUP
    edges = (first - low + EDGE - 1) // EDGE + (high - last + EDGE - 1) // EDGE
    for _ in tl.range(0, edges * GROUP, num_stages=EDGE_STAGES):
        i = at + tl.arange(0, EDGE)
        row = i.to(tl.int64)
        inside = (i < end_i)[:, None] & (d < D)[None, :]
        qs = tl.load(q + h * q_head + row[:, None] * q_row + d[None, :], mask=inside, other=0.0)
        dos = tl.load(do + (row[:, None] * H + h) * D + d[None, :], mask=inside, other=0.0)
        lse_i = tl.load(lse + h * T + i, mask=i < end_i, other=0.0)
        delta_i = tl.load(delta + h * T + i, mask=i < end_i, other=0.0)
        s = tl.dot(ks, tl.trans(qs), input_precision="ieee" if IEEE else "tf32")
        s = tl.where(seen(i[None, :], j[:, None], offset, window, WINDOW), s, float("-inf"))
        p = tl.exp2(s * scale2 - lse_i[None, :])
        dp = tl.dot(vs, tl.trans(dos), input_precision="ieee" if IEEE else "tf32")
        dvs = tl.dot(p.to(dos.dtype), dos, dvs, input_precision="ieee" if IEEE else "tf32")
        ds = p * (dp - delta_i[None, :])
        dks = tl.dot(ds.to(qs.dtype), qs, dks, input_precision="ieee" if IEEE else "tf32")
        at += EDGE
        at = tl.where((at >= first) & (at < last), last, at)
        next_head = at >= high
        h += next_head.to(tl.int32)
        at = tl.where(next_head, tl.where(low < first, low, last), at)
    j = tl.load(entry, volatile=True) + tl.arange(0, BN)
    k_mask = (j < end_j)[:, None] & (d < D)[None, :]
    to = j.to(tl.int64)[:, None] * out_row + head * D + d[None, :]
    tl.store(dk + to, (dks * scale).to(dk.dtype.element_ty), mask=k_mask)
    tl.store(dv + to, dvs.to(dv.dtype.element_ty), mask=k_mask)
