"""Chunks of several new tokens per request over the paged cache: in Triton's interpreter on a CPU, compiled on a GPU.

|ours - f64| <= 2 |eager - f64| in norms, + 1e-6 |f64|, eager being plain torch in the same dtype. Tiles are forced to
be small, of equal and of unequal sizes, so that short chunks have several.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptst.kernels import attention_prefill
from ptst.kernels.attention_prefill import chunks_of, prefill_attention
from ptst.kernels.dispatch import triton
from tests.kernels import interpreter
from tests.kernels.test_flash_attention import plain
from tests.kernels.test_triton import DEVICE, DTYPES

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is for Linux")
WAYS = ["reference", pytest.param("triton", marks=needs_triton)]
TILES = [(16, 16), (32, 16), (16, 32)] if DEVICE == "cpu" else [None]  # (rows, keys); a GPU keeps its own


@pytest.fixture(autouse=True)
def _honest():
    if DEVICE == "cpu" and triton is not None:
        interpreter.install()


class Cache:
    """Random queries, keys and values of requests, and pages in any order; what is not stored is NaN."""

    def __init__(self, spans, H: int, K: int, D: int, P: int, dtype: torch.dtype, heads_first: bool = True):
        self.spans, self.dtype, self.group, self.D = spans, dtype, H // K, D
        self.cu_q, self.cu_k = ([0, *torch.tensor([s[i] for s in spans]).cumsum(0).tolist()] for i in (0, 1))
        self.q, self.k, self.v = (
            torch.randn(cu[-1], n, D).to(DEVICE, dtype) for cu, n in ((self.cu_q, H), (self.cu_k, K), (self.cu_k, K))
        )
        counts = [-(-n // P) for _, n in spans]
        N, B = max(counts) + 1, sum(counts) + 3
        order = iter(torch.randperm(B).tolist())
        self.table = torch.full((len(spans), N), B + 7, dtype=torch.int32)
        shape = (B, K, P, D) if heads_first else (B, P, K, D)
        self.pages = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
        self.views = [x.transpose(1, 2) if heads_first else x for x in self.pages]
        for r, count in enumerate(counts):
            for place in range(count):
                page = next(order)
                self.table[r, place] = page
                tokens = slice(self.cu_k[r] + place * P, min(self.cu_k[r] + (place + 1) * P, self.cu_k[r + 1]))
                for view, x in zip(self.views, (self.k, self.v), strict=True):
                    view[page, : tokens.stop - tokens.start] = x[tokens]
        self.table = self.table.to(DEVICE)

    def chunks(self):
        return chunks_of(self.spans, self.group, self.D, self.dtype, torch.device(DEVICE))

    def ours(self, window: int | None) -> Tensor:
        return prefill_attention(self.q, *self.views, self.chunks(), table_RN=self.table, window=window)

    def wanted(self, window: int | None, dtype: torch.dtype) -> Tensor:
        return plain(self.cu_q, self.cu_k, window)(*(x.to(dtype) for x in (self.q, self.k, self.v)))

    def check(self, window: int | None) -> None:
        ours, eager, exact = self.ours(window), self.wanted(window, self.dtype), self.wanted(window, torch.float64)
        assert ours.dtype == self.dtype
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


# (new tokens, stored tokens, these included) of each request: chunks from one row to two blocks and one, whole prompts,
# chunks that begin inside a page, at its first and at its last token.
RAGGED = [(33, 33), (5, 40), (1, 49), (16, 32), (0, 9), (17, 32)]
FEW = [(1, 1), (5, 40), (9, 15), (4, 20)]
CASES = [
    (RAGGED, 2, 2, 20, 16, None),
    (RAGGED, 2, 1, 16, 8, 5),
    (FEW, 4, 1, 16, 4, None),
    (FEW, 7, 1, 8, 16, 1),
    ([(2, 75), (7, 71)], 7, 1, 16, 32, None),  # few rows, many keys; blocks that begin inside a query
    ([(2, 110), (9, 90)], 4, 2, 16, 32, 70),  # a window that begins inside a page, with whole tiles behind it
    ([(8, 62)], 2, 1, 16, 8, 40),  # the last query's window begins a tile later than the first one's
    ([(10, 75)], 2, 1, 16, 64, None),  # pages larger than a tile
    ([(10, 75)], 2, 1, 16, 64, 30),
    ([(5, 40), (3, 3)], 2, 1, 16, 8, 1000),
    ([(3, 20)], 1, 1, 16, 1, 9),  # a page for each token
]
RUNS = [
    (*case, dtype, tile)
    for number, case in enumerate(CASES)
    for place, dtype in enumerate(DTYPES)
    for index, tile in enumerate(TILES)
    if dtype == torch.float32 or index == (number + place) % len(TILES)
]


@needs_triton
@pytest.mark.parametrize(("spans", "H", "K", "D", "P", "window", "dtype", "tile"), RUNS)
def test_prefill_attention(spans, H, K, D, P, window, dtype, tile, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    monkeypatch.setattr(attention_prefill, "FORCED", tile)
    Cache(spans, H, K, D, P, dtype).check(window)


@needs_triton
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_that_ship(D, dtype, monkeypatch):
    """At the models' head sizes and pages of 32 tokens."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    Cache([(40, 170), (3, 70)], 2, 1, D, 32, dtype).check(None)
    Cache([(9, 140)], 2, 1, D, 32, dtype).check(50)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads_first", [True, False])
def test_other_strides(way, heads_first, monkeypatch):
    """Tokens first or heads first, queries between other columns, a table that is a slice of another."""
    monkeypatch.setenv("PTST_KERNELS", way)
    monkeypatch.setattr(attention_prefill, "FORCED", TILES[-1])
    cache = Cache([(5, 20), (18, 18)], 4, 2, 16, 8, torch.float32, heads_first)
    if way == "reference":
        cache.table.clamp_(max=cache.pages[0].shape[0] - 1)
    cache.q = torch.randn(23, 9, 16, device=DEVICE)[:, 2:6]
    cache.table = torch.cat((cache.table * 0 - 5, cache.table), 1)[:, cache.table.shape[1] :]
    cache.check(None)
    cache.check(7)


@needs_triton
def test_pages_that_requests_share(monkeypatch):
    """Two requests whose first pages are the same, as after a cached prefix."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    monkeypatch.setattr(attention_prefill, "FORCED", TILES[0])
    cache = Cache([(4, 20), (9, 25)], 2, 1, 16, 8, torch.float32)
    cache.table[1, :2] = cache.table[0, :2]
    for x in (cache.k, cache.v):
        x[20:36] = x[:16]
    cache.check(None)


@needs_triton
def test_twice_the_same_bits(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    cache = Cache([(40, 140), (3, 70)], 4, 2, 64, 32, torch.bfloat16)
    assert torch.equal(cache.ours(None), cache.ours(None))


@needs_triton
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("number", "place"), [(-1, 0), (1 << 30, 2), ("B", 4)])
def test_a_page_outside_the_cache_is_read_nowhere_and_gives_nan(number, place, window, monkeypatch):
    """Whichever loop reads it; the other request is what it was."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    monkeypatch.setattr(attention_prefill, "FORCED", TILES[0])
    cache = Cache([(3, 40), (5, 39)], 2, 1, 16, 8, torch.float32)
    right = cache.ours(window)
    cache.table[0, place] = cache.pages[0].shape[0] if number == "B" else number
    found = cache.ours(window)
    if window is None or place == 4:
        assert found[:3].isnan().all()
    else:  # not in the window
        assert torch.equal(found[:3], right[:3])
    assert torch.equal(found[3:], right[3:])


@needs_triton
def test_a_table_of_blocks_that_lies(monkeypatch):
    """What is not there is read and written nowhere: the interpreter watches. Blocks without keys give NaN."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    monkeypatch.setattr(attention_prefill, "FORCED", TILES[0])
    cache = Cache([(20, 40)], 2, 1, 16, 8, torch.float32)
    right, most = cache.ours(None), (1 << 31) - 1
    lies = [-1, 1, most], [-40, 48, most], [-30, 19, most], [-5, 0, most], [-1, 19, 62, most]
    for column, values in enumerate(lies):
        for value in values:
            blocks = cache.chunks().blocks_B5[-1:].clone()
            blocks[0, column] = value
            op = attention_prefill._op
            out = op(cache.q, *cache.views, cache.table, blocks, 16, 0)
            assert out.shape == right.shape
            if (column, value) in ((0, 1), (4, 62), (4, 19)):
                row = int(blocks[0, 1]) // 2
                assert out[row : row + 8].isnan().all()


def test_the_table_of_blocks():
    """Each row once; most keys first."""
    chunks = chunks_of([(5, 5), (0, 4), (40, 90)], 3, 16, torch.float32, torch.device("cpu"))
    rows, last, found = chunks.rows, [], []
    for r, row, first, n, length in chunks.blocks_B5.tolist():
        assert (first, n, length) == ((0, 5, 5), None, (5, 40, 90))[r]
        ends = min(row + rows, 3 * n)
        found += [(r, m) for m in range(row, ends)]
        last.append(length - n + -(-ends // 3))
    assert sorted(found) == [(0, m) for m in range(15)] + [(2, m) for m in range(120)]
    assert last == sorted(last, reverse=True)


@needs_triton
def test_registered_in_full():
    cache = Cache([(3, 20), (5, 5)], 2, 1, 16, 8, torch.float32)
    given = (cache.q, *cache.views, cache.table, cache.chunks().blocks_B5, cache.chunks().rows, 0)
    torch.library.opcheck(torch.ops.ptst.attention_prefill.default, given)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_do(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    cache = torch.zeros(2, 4, 1, 8, device=DEVICE)
    q, table = torch.zeros(0, 2, 8, device=DEVICE), torch.zeros(0, 1, dtype=torch.int32, device=DEVICE)
    chunks = chunks_of([], 2, 8, torch.float32, torch.device(DEVICE))
    assert prefill_attention(q, cache, cache, chunks, table_RN=table).shape == (0, 2, 8)


@pytest.mark.parametrize("way", WAYS)
def test_mistakes(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    q, k = torch.ones(7, 4, 8, device=DEVICE), torch.ones(6, 4, 2, 8, device=DEVICE)
    table = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    chunks = chunks_of([(3, 9), (4, 4)], 2, 8, torch.float32, torch.device(DEVICE))
    assert prefill_attention(q, k, k, chunks, table_RN=table).shape == q.shape
    thirds = torch.ones(6, 3, 2, 8, device=DEVICE)
    strided = torch.ones(6, 4, 2, 9, device=DEVICE)[..., :8]
    for wrong, more, said in (
        ((q.flatten(1), k, k), {}, r"queries \(7, 32\) must be \(T, H, D\)"),
        ((q, k, k[:5]), {}, r"values \(5, 4, 2, 8\)"),
        ((q[..., :6], k, k), {}, r"queries \(7, 4, 6\).*do not fit keys \(6, 4, 2, 8\)"),
        ((q[:, :2], k, k), {}, r"queries \(7, 2, 8\) in groups of 2 heads"),
        ((q, thirds, thirds), {}, r"keys \(6, 3, 2, 8\) lie in pages of 3"),
        ((q, k, strided), {}, r"keys \(6, 4, 2, 8\) have strides .*values"),
        ((q[1:], k, k), {}, r"2 requests with 7 new tokens do not fit queries \(6, 4, 8\)"),
        ((q, k, k), {"table_RN": table[:1]}, r"the block table \(1, 3\)"),
        ((q, k, k), {"table_RN": table[:, :2]}, r"9 tokens .* block table \(2, 2\)"),
        ((q, k, k), {"table_RN": table.float()}, r"table \(2, 3\) is torch\.float32"),
        ((q, k, k), {"table_RN": table.long()}, r"table \(2, 3\) is torch\.int64; it must be torch\.int32"),
        ((q, k[:0], k[:0]), {}, r"keys \(0, 4, 2, 8\)"),
        ((q, k, k), {"table_RN": table.to("meta")}, r"table \(2, 3\) .* on meta"),
        ((q, k, k), {"table_RN": table.t().contiguous().t()}, r"last axis of table \(2, 3\)"),
        ((q, k, k), {"window": 0}, "window is 0"),
        ((q.half(), k, k), {}, "k is torch.float32"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, k), {}, "last axis of q"),
        ((q, *[k.transpose(1, 3).contiguous().transpose(1, 3)] * 2), {}, "last axis of k"),
    ):
        with pytest.raises(ValueError, match=said):
            prefill_attention(*wrong, chunks, **{"table_RN": table, **more})
    with pytest.raises(ValueError, match="request 1 has 5 new tokens and stores 4"):
        chunks_of([(3, 9), (5, 4)], 2, 8, torch.float32, torch.device(DEVICE))


@needs_triton
def test_what_is_wider_than_a_block(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    cache = torch.ones(2, 4, 1, 257, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    chunks = chunks_of([(1, 1)], 1, 257, torch.float32, torch.device(DEVICE))
    with pytest.raises(ValueError, match="is 257; the kernel takes at most 256"):
        prefill_attention(torch.ones(1, 1, 257, device=DEVICE), cache, cache, chunks, table_RN=table)
