"""Decoding over the blocks of a cache where they lie: ragged lengths, shared prefixes, windows, blocks of nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ptst.kernels import cpu_attention
from ptst.kernels.cpu import use_numba
from ptst.kernels.cpu_attention import paged_attention, rotate_and_store, split_queries
from ptst.kernels.rope import apply_rope, frequencies, tables
from tests.kernels.test_attention_decode import plain

pytestmark = pytest.mark.skipif(not use_numba(torch.empty(0)), reason="Numba is not installed")
P = 8


def cache_of(rows: list[Tensor], shared: int, order: torch.Generator) -> tuple[Tensor, np.ndarray]:
    """Blocks (B, K, P, D), shuffled, and each row's list; the first `shared` blocks of all rows are the same ones.
    What lies in nobody's blocks and behind a row's end is large, so that looking at it would show."""
    K, D = rows[0].shape[1:]
    counts = [-(-len(x) // P) for x in rows]
    numbers = (1 + torch.randperm(2 * sum(counts), generator=order)).tolist()
    store = torch.full((2 * sum(counts) + 1, K, P, D), 50.0)
    table, common = np.zeros((len(rows), max(counts)), np.int32), [numbers.pop() for _ in range(shared)]
    for r, (x, count) in enumerate(zip(rows, counts, strict=True)):
        table[r, :count] = common + [numbers.pop() for _ in range(count - shared)]
        for j in range(len(x)):
            store[table[r, j // P], :, j % P] = x[j]
    return store, table


def attend(q: Tensor, k: Tensor, v: Tensor, table: np.ndarray, lengths: list[int], window: int | None = None) -> Tensor:
    """(R, H, D) for queries (R, H, D); the keys and values that follow them in qkv are not read."""
    qkv = torch.cat((q, torch.full((len(q), 2 * k.shape[1], q.shape[2]), 70.0)), 1)
    out, lengths_R = torch.full_like(q, 90.0), np.array(lengths, np.int32)
    arrays = qkv.numpy(), (k.numpy(), v.numpy()), table, lengths_R, window, out.numpy()
    paged_attention(*arrays, split_queries(lengths_R))
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("window", [None, 11, 1])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("H", "K", "D"), [(6, 2, 8), (3, 3, 16), (4, 1, 5), (2, 1, 64)])
def test_paged_attention(H, K, D, shared, window, size, threads, monkeypatch):
    monkeypatch.setattr(cpu_attention, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    order = torch.Generator().manual_seed(1)
    lengths = [17, 33, 24, 46]
    keys, values = ([torch.randn(n, K, D) * factor for n in lengths] for factor in (size, 1))
    for part in (keys, values):
        for x in part[1:]:
            x[: shared * P] = part[0][: shared * P]
    k, table = cache_of(keys, shared, order.manual_seed(1))
    v, _ = cache_of(values, shared, order.manual_seed(1))
    q = torch.randn(len(lengths), H, D)
    padded = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (keys, values)]
    exact = plain(q.double(), *(x.double() for x in padded), lengths, window)
    eager = plain(q, *padded, lengths, window).double()
    ours = attend(q, k, v, table, lengths, window).double()
    # Of all requests together: torch's error of a single one may be small by chance, and is another on every CPU.
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()


def test_a_query_does_not_depend_on_the_others_and_their_nan_does_not_reach_it():
    keys = [torch.randn(n, 2, 16) for n in (9, 30, 20)]
    k, table = cache_of(keys, 0, torch.Generator().manual_seed(1))
    q, lengths = torch.randn(3, 4, 16), [9, 30, 20]
    k[table[0, 0], 1, 3] = float("nan")
    whole = attend(q, k, k, table, lengths)
    assert torch.equal(attend(q[1:], k, k, table[1:], lengths[1:]), whole[1:])
    assert whole[0, 2:].isnan().all() and whole[0, :2].isfinite().all() and whole[1:].isfinite().all()
    q[1, 0, 0] = float("inf")
    assert attend(q, k, k, table, lengths)[1, 0].isnan().all()


def test_tokens_of_one_request_each_see_one_token_more():
    keys = torch.randn(21, 1, 8)
    k, table = cache_of([keys], 0, torch.Generator().manual_seed(1))
    q = torch.randn(3, 2, 8)
    ours = attend(q, k, k, table.repeat(3, 0), [19, 20, 21])
    wanted = plain(q, *[keys.expand(3, -1, -1, -1)] * 2, [19, 20, 21], None)
    torch.testing.assert_close(ours, wanted)


def test_a_bfloat16_cache_is_read_exactly():
    keys = [torch.randn(n, 2, 16).bfloat16().float() for n in (9, 30)]
    k, table = cache_of(keys, 0, torch.Generator().manual_seed(1))
    half, q, lengths = k.bfloat16(), torch.randn(2, 4, 16), [9, 30]
    assert torch.equal(half.float(), k)
    half = half.view(torch.uint16)
    wanted = attend(q, k, k, table, lengths)
    torch.testing.assert_close(attend(q, half, half, table, lengths), wanted, rtol=1e-5, atol=1e-6)


def test_storing_rounds_to_the_nearest_bfloat16():
    x = torch.randn(1, 4, 64)
    odd = [0.0, -0.0, 3.3e38, float("inf"), float("nan"), 1e-40, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]
    x[0, 3, : len(odd)] = torch.tensor(odd)
    keys, values = (torch.zeros(1, 1, P, 64, dtype=torch.bfloat16) for _ in range(2))
    no_rotation = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    bits = [s.view(torch.uint16).numpy() for s in (keys, values)]
    rotate_and_store(x.clone().numpy(), *no_rotation, np.array([5]), *bits)
    for stored, exact in ((keys, x[0, 2]), (values, x[0, 3])):
        torch.testing.assert_close(stored[0, 0, 5], exact.bfloat16(), equal_nan=True, rtol=0, atol=0)


def test_rotate_and_store():
    H, K, D = 3, 2, 8
    qkv = torch.randn(4, H + 2 * K, D)
    cos, sin = tables(torch.tensor([5, 0, 77, 6]), frequencies(D, 10000.0, None))
    q, k = apply_rope(qkv[:, :H], qkv[:, H : H + K], cos, sin)
    v, before = qkv[:, H + K :].clone(), [torch.zeros(5, K, P, D) for _ in range(2)]
    keys, values = (x.clone() for x in before)
    place = np.array([3 * P + 7, 2 * P, 4 * P + 1, P + 2])
    rotate_and_store(*(x.numpy() for x in (qkv, cos[:, 0], sin[:, 0])), place, keys.numpy(), values.numpy())
    torch.testing.assert_close(qkv[:, :H], q)
    for stored, new, old in zip((keys, values), (k, v), before, strict=True):
        for t, at in enumerate(place):
            torch.testing.assert_close(stored[at // P, :, at % P], new[t])
            stored[at // P, :, at % P] = 0
        assert torch.equal(stored, old)


def test_queries_are_split_between_threads_by_their_keys(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_attention, "WORTH_A_THREAD", 10)
    assert split_queries(np.array([100, 10, 10, 80])) == [0, 1, 4]
    assert split_queries(np.array([1, 2, 3])) == [0, 3]
    assert split_queries(np.array([900])) == [0, 1]
    assert split_queries(np.array([900, 20, 20, 20]), 20) == [0, 2, 4]


def test_code_cached_for_one_model_is_not_loaded_for_another():
    """Numba's own cache key has the function's name, but not the sizes that it was compiled for."""
    made = [cpu_attention._attend.__wrapped__(*sizes) for sizes in ((4, 2, 8, 8, True), (4, 2, 16, 8, True))]
    assert made[0].py_func.__qualname__ != made[1].py_func.__qualname__
    with pytest.raises(ValueError, match="whole numbers"):
        cpu_attention._attend.__wrapped__(3, 2, 8, 8, True)


def test_without_numba_plain_torch_serves(monkeypatch):
    monkeypatch.setattr("ptst.kernels.cpu._has_numba", lambda: False)
    assert not use_numba(torch.empty(0))
