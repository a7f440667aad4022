"""Forward pass of flash attention in Triton: the kernel that flash_attention.py launches; the maths stands there.

The keys of a block of queries fall into three runs: blocks at the window's edge, blocks that every query of the block
sees in full, and blocks at the diagonal. Only the first and the last mask scores; the middle, where the time goes, does
nothing but two products and the softmax, and is the one that is pipelined. The scale is folded into the exponent:
exp2(s c - m c) is one multiply-add per score.

With TMA (sm_90 and later) the middle loads keys and values through descriptors over (tokens, key heads, head_dim):
the copy is one instruction, head_dim may be any multiple of 8, and it needs no mask, since the middle holds whole
blocks of one document. The edges keep pointers and masks, so that no key of another document is ever multiplied, not
even by zero (0 x inf).
"""

from ptst.kernels.dispatch import jit, tl


@jit
def seen(i, j, offset, window, WINDOW: tl.constexpr):
    """Whether query i, aligned with key i + offset, sees key j.

    Causality keeps queries within their document's keys. Queries past the document's end are read as zeros, have a
    gradient of zero and are not written, so they need no mask."""
    mask = j <= i + offset
    if WINDOW:
        mask = mask & (i + offset - j < window)
    return mask


@jit
def load_tile(
    x, x_tma, at, head, x_row, D, ROWS: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows at to at + ROWS of a head, all of them inside of the tensor: by descriptor, or from x, where the head lies.
    WHOLE: head_dim is BD."""
    if TMA:
        tile = x_tma.load([at, head, 0]).reshape(ROWS, BD)
    else:
        d = tl.arange(0, BD)
        pointers = x + (at + tl.arange(0, ROWS)).to(tl.int64)[:, None] * x_row + d[None, :]
        if WHOLE:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tile


@jit
def softmax_step(s, out, running_max, total, scale2, EMPTY: tl.constexpr):
    """A block of scores taken in: its weights, and the old output, maximum and sum, in terms of the new maximum.
    EMPTY: a query may have seen no key yet."""
    new_max = tl.maximum(running_max, tl.max(s, axis=1) * scale2)
    base = new_max
    if EMPTY:
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * scale2 - base[:, None])
    rescale = tl.exp2(running_max - base)
    return p, out * rescale[:, None], new_max, total * rescale + tl.sum(p, axis=1)


@jit
def _edge(
    qs, k, v, out, running_max, total, low, high, k_row, v_row, i, offset, end_j, window, scale2,
    D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Keys low to high, each score masked."""
    d = tl.arange(0, BD)
    for at in tl.range(low, high, BN, num_stages=EDGE_STAGES):
        j = at + tl.arange(0, BN)
        key = j.to(tl.int64)
        inside = (j < end_j)[:, None] & (d < D)[None, :]
        ks = tl.load(k + key[:, None] * k_row + d[None, :], mask=inside, other=0.0)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        s = tl.where(seen(i[:, None], j[None, :], offset, window, WINDOW), s, float("-inf"))
        p, out, running_max, total = softmax_step(s, out, running_max, total, scale2, True)
        vs = tl.load(v + key[:, None] * v_row + d[None, :], mask=inside, other=0.0)
        out = tl.dot(p.to(vs.dtype), vs, out, input_precision="ieee" if IEEE else "tf32")
    return out, running_max, total


@jit
def forward(
    q, k, v, o, lse, blocks, k_tma, v_tma, q_row, q_head, k_row, k_head, v_row, v_head, T, H, GROUP, window, scale2,
    D, WINDOW: tl.constexpr, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr, EDGE: tl.constexpr, EDGE_STAGES: tl.constexpr,
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
    k += head * k_head
    v += head * v_head
    running_max = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    low = begin
    high = tl.minimum(end_j, tl.minimum(start + BM, end_i) + offset)
    if WINDOW:
        low = tl.maximum(begin, start + offset - window + 1)
        # The last query of the block sees every key from start + BM + offset - window on.
        hidden = tl.maximum(start + BM + offset - window - low, 0)
        first = tl.minimum(low + (hidden + EDGE - 1) // EDGE * EDGE, high)
        out, running_max, total = _edge(
            qs, k, v, out, running_max, total, low, first, k_row, v_row, i, offset, end_j, window, scale2,
            D, WINDOW, IEEE, EDGE, BD, EDGE_STAGES,
        )  # fmt: skip
        low = first
    # The first query of the block sees keys up to start + offset.
    last = low + tl.maximum(start + offset + 1 - low, 0) // BN * BN
    for at in tl.range(low, last, BN, num_stages=STAGES):
        ks = load_tile(k, k_tma, at, head, k_row, D, BN, BD, TMA, WHOLE)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        p, out, running_max, total = softmax_step(s, out, running_max, total, scale2, False)
        vs = load_tile(v, v_tma, at, head, v_row, D, BN, BD, TMA, WHOLE)
        out = tl.dot(p.to(vs.dtype), vs, out, input_precision="ieee" if IEEE else "tf32")
    out, running_max, total = _edge(
        qs, k, v, out, running_max, total, last, high, k_row, v_row, i, offset, end_j, window, scale2,
        D, WINDOW, IEEE, EDGE, BD, EDGE_STAGES,
    )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = out / total[:, None]
    tl.store(o + (row[:, None] * H + h) * D + d[None, :], out.to(o.dtype.element_ty), mask=q_mask)
    tl.store(lse + h * T + i, tl.where(nothing, 0.0, running_max + tl.log2(total)), mask=i < end_i)
