r"""Paged attention of several new tokens per request: chunks of prompts and scored continuations over the KV cache.

Keys and values are read where they lie, through the block table: nothing is gathered. The loops are flash_forward.py's,
with a tile made of whole pages: the number of a page is looked up once per page and not once per key, and the middle
run masks nothing. The rows of a program's tile are queries x query heads of a group, so that a page is read once for
all heads of its group: row m of a request and key head is query m // G and head m % G, and a block of rows may begin
in the middle of a query.

The newest keys are in the cache already: query i of a request that stores `length` tokens, n of them new, stands at
length - n + i and sees the keys up to there. A table of blocks of rows is made once per batch on the host, int32:
(request, first row, first token in q, n, length).

Shapes: T new tokens, R requests, H query heads, K key/value heads, G = H / K, D head_dim, B pages of P tokens, N pages
per request at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ptst.kernels import flash_attention
from ptst.kernels.attention import packed_attention
from ptst.kernels.dispatch import (
    check_alike,
    check_frozen,
    check_integers,
    jit,
    launchable,
    tl,
    use_triton,
    whole_block,
)
from ptst.kernels.flash_attention import LOG2E, WIDEST
from ptst.kernels.flash_blocks import Blocks, blocks_of
from ptst.kernels.flash_forward import softmax_step
from ptst.kernels.operators import operator
from ptst.kernels.transfer import to_device

FORCED: tuple[int, int] | None = None  # (rows, keys) of a tile, set by tests: short chunks have several


@jit
def _pages(table, at, first, high, P: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Pages of the keys at to at + ROWS: whole ones, or the part of one that `at` begins. A negative number becomes a
    large one; for pages without a key from `first` to `high`, page 0 stands in."""
    PAGES: tl.constexpr = ROWS // P if ROWS > P else 1
    place = at // P + tl.arange(0, PAGES)
    if MASKED:
        page = tl.load(table + place, mask=(place >= first // P) & (place < tl.cdiv(high, P)), other=0)
    else:
        page = tl.load(table + place)
    return page.to(tl.uint32)


@jit
def _places(page, at, B, page_stride, token_stride, P: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Where the keys of these pages lie, int64 (ROWS,), always inside the cache. Worked out by page and by token of a
    page: a product and a sum per page, a sum per token."""
    SIZE: tl.constexpr = P if ROWS > P else ROWS
    page = tl.minimum(page, (B - 1).to(tl.uint32)).to(tl.int64)
    token = tl.arange(0, SIZE)
    if ROWS < P:
        token += at % P
    places = tl.reshape((page * page_stride)[:, None] + (token * token_stride)[None, :], [ROWS])
    return tl.multiple_of(places, VECTOR)


@jit
def _edge(
    qs, k, v, table, out, running_max, total, worst, low, first, high, position, B, page_stride, token_stride, window,
    scale2, D, WINDOW: tl.constexpr, P: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Keys first to high, each score masked, in tiles from `low` on, where a page or a part of one begins."""
    d = tl.arange(0, BD)
    for at in tl.range(low, high, BN, num_stages=EDGE_STAGES):
        j = at + tl.arange(0, BN)
        inside = ((j >= first) & (j < high))[:, None] & (d < D)[None, :]
        page = _pages(table, at, first, high, P, BN, True)
        worst = tl.maximum(worst, tl.max(page.to(tl.int64), axis=0))
        places = _places(page, at, B, page_stride, token_stride, P, BN, VECTOR)
        ks = tl.load(k + places[:, None] + d[None, :], mask=inside, other=0.0)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        seen = j[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (position[:, None] - j[None, :] < window)
        s = tl.where(seen, s, float("-inf"))
        p, out, running_max, total = softmax_step(s, out, running_max, total, scale2, True)
        vs = tl.load(v + places[:, None] + d[None, :], mask=inside, other=0.0)
        out = tl.dot(p.to(vs.dtype), vs, out, input_precision="ieee" if IEEE else "tf32")
    return out, running_max, total, worst


@jit
def _load(x, places, D, BD: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of whole rows. WHOLE: head_dim is BD."""
    d = tl.arange(0, BD)
    if WHOLE:
        tile = tl.load(x + places[:, None] + d[None, :])
    else:
        tile = tl.load(x + places[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    return tile


@jit
def _rows(entry, T, GROUP, BM: tl.constexpr):
    """Of a block's rows: token in q, head within the group, whether there are such, and position in the request. Asked
    for wherever they are needed: divisions are cheaper than registers that are held through the main loop."""
    row, first = tl.load(entry + 1, volatile=True), tl.load(entry + 2, volatile=True)
    n, length = tl.load(entry + 3, volatile=True), tl.load(entry + 4, volatile=True)
    m = row + tl.arange(0, BM)
    token = first + m // GROUP
    alive = (m >= 0) & (m < n * GROUP) & (token >= 0) & (token < T)
    return token.to(tl.int64), m % GROUP, alive, length - n + m // GROUP


@jit(do_not_specialize=["T", "R", "N", "B", "table_row"])  # all but B change from step to step
def _prefill(
    q, k, v, o, table, blocks, q_row, q_head, page_stride, head_stride, token_stride, table_row, T, R, N, B, H, GROUP,
    window, scale2, D, WINDOW: tl.constexpr, P: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr, STAGES: tl.constexpr,
    EDGE_STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    ALIGNED: tl.constexpr = EDGE if EDGE > P else P  # the middle begins at a multiple of it
    PAGES: tl.constexpr = BN // P if BN > P else 1
    entry = blocks + tl.program_id(1) * 5
    r, row, n, length = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3), tl.load(entry + 4)
    head = tl.program_id(0)
    d = tl.arange(0, BD)
    token, h, alive, position = _rows(entry, T, GROUP, BM)
    at_q = token * q_row + (head * GROUP + h) * q_head
    qs = tl.load(q + at_q[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0)
    k += head.to(tl.int64) * head_stride
    v += head.to(tl.int64) * head_stride
    table += r.to(tl.int64) * table_row
    running_max = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    worst = tl.zeros([], tl.int64)  # the largest number of a page
    earliest = length - n + row // GROUP  # positions of the block's queries
    latest = length - n + (tl.minimum(row + BM, n * GROUP) - 1) // GROUP
    # A block without a place in the block table reads no keys, and its output is NaN.
    placed = (r >= 0) & (r < R) & (earliest >= 0) & (latest < N * P)
    low, high = 0, tl.where(placed, latest + 1, 0)
    if WINDOW:
        first = tl.minimum(tl.maximum(earliest - window + 1, 0), high)
        low = first // ALIGNED * ALIGNED
        hidden = tl.maximum(latest - window + 1 - low, 0)  # of the last query
        middle = tl.minimum(low + tl.cdiv(hidden, ALIGNED) * ALIGNED, high)
        out, running_max, total, worst = _edge(
            qs, k, v, table, out, running_max, total, worst, low, first, middle, position, B, page_stride, token_stride,
            window, scale2, D, WINDOW, P, IEEE, VECTOR, EDGE, BD, EDGE_STAGES,
        )  # fmt: skip
        low = middle
    last = low + tl.maximum(tl.minimum(earliest + 1, high) - low, 0) // BN * BN
    largest = tl.zeros([PAGES], tl.uint32)
    for at in tl.range(low, last, BN, num_stages=STAGES):
        page = _pages(table, at, low, last, P, BN, False)
        largest = tl.maximum(largest, page)
        places = _places(page, at, B, page_stride, token_stride, P, BN, VECTOR)
        ks = _load(k, places, D, BD, WHOLE)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee" if IEEE else "tf32")
        p, out, running_max, total = softmax_step(s, out, running_max, total, scale2, False)
        vs = _load(v, places, D, BD, WHOLE)
        out = tl.dot(p.to(vs.dtype), vs, out, input_precision="ieee" if IEEE else "tf32")
    worst = tl.maximum(worst, tl.max(largest.to(tl.int64), axis=0))
    token, h, alive, position = _rows(entry, T, GROUP, BM)
    out, running_max, total, worst = _edge(
        qs, k, v, table, out, running_max, total, worst, last, last, high, position, B, page_stride, token_stride,
        window, scale2, D, WINDOW, P, IEEE, VECTOR, EDGE, BD, EDGE_STAGES,
    )  # fmt: skip
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]  # rows past the last one may have seen nothing
    out = tl.where(placed & (worst < B), out, float("nan"))
    token, h, alive, position = _rows(entry, T, GROUP, BM)
    at_o = (token * H + head * GROUP + h) * D
    tl.store(o + at_o[:, None] + d[None, :], out.to(o.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :])


@dataclass(frozen=True, eq=False)
class Chunks:
    """Where the new tokens of each request lie in one packed row, the same for every layer of a step.

    `spans`: (new tokens, stored tokens, these included) of each request, in the order of the row; `num_tokens`,
    `longest`: the sum of the first, the largest of the second; `group`: query heads per key head; `blocks_B5`: the
    table of blocks of `rows` rows (queries x group)."""

    spans: tuple[tuple[int, int], ...]
    num_tokens: int
    longest: int
    group: int
    blocks_B5: Tensor
    rows: int


def chunks_of(
    spans: Sequence[tuple[int, int]], group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Chunks:
    """The chunks of requests with (new tokens, stored tokens, these included), for one model. On a GPU the host does
    not wait for the copy. Raises ValueError for a request that stores fewer tokens than are new."""
    for r, (n, length) in enumerate(spans):
        if not 0 <= n <= length:
            raise ValueError(f"request {r} has {n} new tokens and stores {length}, these included")
    rows = blocks(device, head_dim, dtype, group).queries
    longest, tokens = max((length for _, length in spans), default=0), sum(n for n, _ in spans)
    return Chunks(tuple(spans), tokens, longest, group, table_of(spans, group, rows, device), rows)


def table_of(spans: Sequence[tuple[int, int]], group: int, rows: int, device: torch.device) -> Tensor:
    """The blocks of `rows` rows, int32 (B, 5): request, first row, first token in q, new and stored tokens of the
    request."""
    ends = [0, *accumulate(n for n, _ in spans)]
    found = [(r, row, ends[r], n, m) for r, (n, m) in enumerate(spans) for row in range(0, n * group, rows)]
    # Most keys first: what is launched last should end soon.
    found.sort(key=lambda b: b[4] - b[3] + min(b[1] + rows, b[3] * group) // group, reverse=True)
    return to_device(torch.tensor(found, dtype=torch.int32).reshape(-1, 5), device)


def blocks(device: torch.device, head_dim: int, dtype: torch.dtype, group: int) -> Blocks:
    """The block shapes; `queries` are rows, queries x heads of a group."""
    if FORCED is not None:
        return Blocks(*FORCED, edge=16, warps=4, stages=1)
    return blocks_of(flash_attention.ARCH, device, head_dim, dtype, group, "prefill")


@operator("attention_prefill")
def _op(
    q_THD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, table_RN: Tensor, blocks_B5: Tensor, rows: int, window: int
) -> Tensor:
    group = q_THD.shape[1] // k_BPKD.shape[2]
    shape = replace(blocks(q_THD.device, q_THD.shape[2], q_THD.dtype, group), queries=rows)
    return launch(q_THD, k_BPKD, v_BPKD, table_RN, blocks_B5, shape, window)


def launch(
    q_THD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, table_RN: Tensor, blocks_B5: Tensor, shape: Blocks, window: int
) -> Tensor:
    """`prefill_attention` with these block shapes, from a table of blocks of `shape.queries` rows."""
    (T, H, D), (B, P, K, _), (R, N) = q_THD.shape, k_BPKD.shape, table_RN.shape
    out_THD, wide = q_THD.new_empty((T, H, D)), max(16, whole_block("head_dim", D, WIDEST))
    page_stride, token_stride, head_stride = k_BPKD.stride()[:3]
    for part_B5 in launchable(blocks_B5) if len(blocks_B5) else ():
        _prefill[(K, len(part_B5))](
            *(q_THD, k_BPKD, v_BPKD, out_THD, table_RN, part_B5, *q_THD.stride()[:2]),
            *(page_stride, head_stride, token_stride, table_RN.stride(0)),
            *(T, R, N, B, H, H // K, window, D**-0.5 * LOG2E, D),
            WINDOW=window > 0, P=P, IEEE=q_THD.dtype == torch.float32, VECTOR=math.gcd(16, page_stride, token_stride),
            BM=shape.queries, BN=shape.keys, BD=wide, EDGE=shape.edge, WHOLE=wide == D, STAGES=shape.stages,
            EDGE_STAGES=shape.edge_stages, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out_THD


@_op.register_fake
def _(q_THD, k_BPKD, v_BPKD, table_RN, blocks_B5, rows, window):
    return q_THD.new_empty(q_THD.shape)


def prefill_attention(
    q_THD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, chunks: Chunks, *, table_RN: Tensor, window: int | None = None
) -> Tensor:
    """Attention (T, H, D) of each request's new tokens with its stored ones up to itself, at most `window` of them.

    Keys and values (B, P, K, D), P a power of two, may be views whose last axis is contiguous, with the same strides.
    `table_RN` (R, N), int32: the block table. No gradient. Raises ValueError if shapes, strides, devices or dtypes
    do not fit; on a GPU a page outside the cache makes what reads it NaN."""
    _check(q_THD, k_BPKD, v_BPKD, chunks, table_RN, window)
    if use_triton(q_THD, k_BPKD, v_BPKD):
        return _op(q_THD, k_BPKD, v_BPKD, table_RN, chunks.blocks_B5, chunks.rows, window or 0)
    P, lengths = k_BPKD.shape[1], [length for _, length in chunks.spans]
    cu_q, cu_k = [0, *accumulate(n for n, _ in chunks.spans)], [0, *accumulate(lengths)]
    k_LKD, v_LKD = (
        torch.cat([x[table_RN[r, : -(-n // P)]].flatten(0, 1)[:n] for r, n in enumerate(lengths)] or [x[:0, 0]])
        for x in (k_BPKD, v_BPKD)
    )
    return packed_attention(q_THD, k_LKD, v_LKD, cu_q, cu_seqlens_k=cu_k, window=window)


def _check(q_THD: Tensor, k_BPKD: Tensor, v_BPKD: Tensor, chunks: Chunks, table_RN: Tensor, window: int | None) -> None:
    q, k, v, table = (tuple(x.shape) for x in (q_THD, k_BPKD, v_BPKD, table_RN))
    if (len(q), len(k), len(v), len(table)) != (3, 4, 4, 2):
        raise ValueError(
            f"queries {q} must be (T, H, D), keys {k} and values {v} (B, P, K, D), block table {table} (R, N)"
        )
    (T, H, D), (B, P, K, _) = q, k
    if k != v or k[3] != D or K * chunks.group != H or (T and not B):
        raise ValueError(f"queries {q} in groups of {chunks.group} heads do not fit keys {k} and values {v}")
    if not H or not D:
        raise ValueError(f"queries {q} have no heads or no head_dim")
    if P & (P - 1) or not P:
        raise ValueError(f"keys {k} lie in pages of {P} tokens; it must be a power of two")
    if k_BPKD.stride() != v_BPKD.stride():
        raise ValueError(f"keys {k} have strides {k_BPKD.stride()}, values {v} have {v_BPKD.stride()}: not the same")
    if chunks.num_tokens != T or len(chunks.spans) != table[0]:
        given = f"{len(chunks.spans)} requests with {chunks.num_tokens} new tokens"
        raise ValueError(f"{given} do not fit queries {q} and the block table {table}")
    if chunks.longest > table[1] * P:
        raise ValueError(f"a request of {chunks.longest} tokens does not fit the block table {table} of pages of {P}")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; a query sees at least itself, so it must be 1 or more")
    check_alike(q=q_THD, k=k_BPKD, v=v_BPKD)
    check_frozen(q=q_THD, k=k_BPKD, v=v_BPKD)
    check_integers(q_THD.device, table=table_RN, chunks=chunks.blocks_B5)
    if table_RN.dtype != torch.int32:
        raise ValueError(f"the block table {table} is {table_RN.dtype}; it must be torch.int32")
