"""Decoding over the blocks of a cache where they lie: ragged lengths, shared beginnings, windows, blocks of nobody."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_blocks import blocks_attention, plan_blocks
from tests.kernels.test_attention_decode import plain

P = 4


def cache_of(rows: list[torch.Tensor], shared: int, order: torch.Generator) -> tuple[torch.Tensor, list[list[int]]]:
    """Blocks (B, K, P, D), shuffled, and each row's list; the first `shared` blocks of all rows are the same ones.
    What lies in nobody's blocks and behind a row's end is large, so that looking at it would show."""
    K, D = rows[0].shape[1:]
    counts = [-(-len(x) // P) for x in rows]
    numbers = (1 + torch.randperm(2 * sum(counts), generator=order)).tolist()
    store = torch.full((2 * sum(counts) + 1, K, P, D), 50.0, dtype=rows[0].dtype)
    lists, common = [], [numbers.pop() for _ in range(shared)]
    for x, count in zip(rows, counts, strict=True):
        own = common + [numbers.pop() for _ in range(count - shared)]
        for j in range(len(x)):
            store[own[j // P], :, j % P] = x[j]
        lists.append(own)
    return store, lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 6, 1])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("H", "K", "D"), [(6, 2, 8), (3, 3, 16), (4, 1, 5)])
def test_blocks_attention(H, K, D, shared, window, dtype):
    order = torch.Generator().manual_seed(1)
    lengths = [9, 17, 12, 23]
    rows = [[torch.randn(n, K, D, dtype=dtype) for n in lengths] for _ in range(2)]
    for x in (x for part in rows for x in part[1:]):
        x[: shared * P] = (rows[0] if any(x is y for y in rows[0]) else rows[1])[0][: shared * P]
    k, lists = cache_of(rows[0], shared, order.manual_seed(1))
    v, _ = cache_of(rows[1], shared, order.manual_seed(1))
    q = torch.randn(len(lengths), H, D, dtype=dtype)
    padded = [torch.zeros(len(lengths), max(lengths), K, D, dtype=dtype) for _ in range(2)]
    for target, part in zip(padded, rows, strict=True):
        for r, x in enumerate(part):
            target[r, : len(x)] = x
    exact = plain(q.double(), *(x.double() for x in padded), lengths, window)
    # Two requests share, one holds the same blocks as their owner, one has none in common.
    plan = plan_blocks(lists, [shared, shared, 0, shared], lengths, H, P, dtype, window)
    ours = blocks_attention(q, k, v, plan)
    assert ours.dtype == dtype
    eager = plain(q, *padded, lengths, window).double()
    assert (ours.double() - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()


def test_groups_of_different_beginnings():
    rows = [torch.randn(n, 1, 4) for n in (9, 10, 11, 5)]
    rows[1][:8], rows[2][:4] = rows[0][:8], rows[3][:4]
    store = torch.full((20, 1, P, 4), 50.0)
    lists = [[3, 4, 7], [3, 4, 8], [11, 12, 13], [11, 2]]
    for x, blocks in zip(rows, lists, strict=True):
        for j in range(len(x)):
            store[blocks[j // P], :, j % P] = x[j]
    lengths = [len(x) for x in rows]
    plan = plan_blocks(lists, [2, 2, 1, 1], lengths, 2, P, torch.float32)
    assert len(plan.groups) == 2
    q = torch.randn(4, 2, 4)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    torch.testing.assert_close(blocks_attention(q, store, store, plan), plain(q, padded, padded, lengths, None))


def test_mistakes():
    plan = plan_blocks([[1], [2]], [0, 0], [1, 2], 2, P, torch.float32)
    q, k = torch.randn(2, 2, 4), torch.randn(3, 1, P, 4)
    with pytest.raises(ValueError, match="do not fit"):
        blocks_attention(q[:1], k, k, plan)
    with pytest.raises(ValueError, match="do not fit"):
        blocks_attention(q, k, k[..., :3], plan)
    with pytest.raises(ValueError, match=r"k is torch\.float64"):
        blocks_attention(q, k.double(), k.double(), plan)
