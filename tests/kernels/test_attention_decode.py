"""One query per request over the cache: in blocks and without, split and whole, with a window, at ragged lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptst.kernels import attention_decode
from ptst.kernels.attention_decode import counters_for, decode_attention, splits_for
from ptst.kernels.dispatch import triton
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES

LENGTHS = [1, 40, 17, 16, 33]
WAYS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="Triton is for Linux"))]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    if DEVICE == "cpu" and triton is not None:
        interpreter.install()
    monkeypatch.setattr(attention_decode, "BLOCKS", dict.fromkeys((2, 4), (16, 4, 1)))


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Request by request; q (R, H, D), k and v (R, L, K, D)."""
    outs = []
    for r, length in enumerate(lengths):
        low = 0 if window is None else max(0, length - window)
        keys, values = (x[r, low:length].repeat_interleave(q.shape[1] // k.shape[2], dim=1) for x in (k, v))
        weights = (torch.einsum("hd,lhd->hl", q[r], keys) / q.shape[2] ** 0.5).softmax(-1)
        outs.append(torch.einsum("hl,lhd->hd", weights, values))
    return torch.stack(outs)


def paged(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(R, L, K, D) cut into shuffled blocks of `size` tokens, and their table."""
    R, L = x.shape[:2]
    count = -(-L // size)
    padded = torch.full((R, count * size, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    padded[:, :L] = x
    order = torch.arange(R * count, device=x.device).flip(0)
    blocks = torch.empty((R * count, size, *x.shape[2:]), dtype=x.dtype, device=x.device)
    blocks[order] = padded.view(R * count, size, *x.shape[2:])
    return blocks, order.view(R, count).to(torch.int32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "D", "window", "size", "splits"), [
    (4, 2, 16, None, None, 1),
    (3, 1, 20, 9, None, 1),
    (2, 2, 64, None, 8, 2),
    (4, 1, 16, 20, 5, 3),
    (8, 2, 8, None, None, 4),
])  # fmt: skip
def test_decode_attention(way, H, K, D, window, size, splits, dtype, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    monkeypatch.setattr(attention_decode, "splits_for", lambda *_: splits)
    R, L = len(LENGTHS), max(LENGTHS)
    q, k, v = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((R, H, D), (R, L, K, D), (R, L, K, D)))
    exact = plain(q.double(), k.double(), v.double(), LENGTHS, window)
    eager = plain(q, k, v, LENGTHS, window)
    table = None
    if size is not None:
        # What lies behind a request's last token is never looked at (NaN on purpose, zero for the plain path's sake).
        (k, table), (v, _) = paged(k, size), paged(v, size)
        if way == "reference":
            k, v = k.nan_to_num(), v.nan_to_num()
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    counters = counters_for(R, K, lengths.device)
    given = {"longest": L, "table_RN": table, "window": window}
    ours = decode_attention(q, k, v, lengths, counters=counters, **given)
    assert not counters.any()  # as the next layer needs them
    assert torch.equal(ours, decode_attention(q, k, v, lengths, counters=counters, **given))
    assert ours.dtype == dtype
    limit = 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()
    assert (ours.double() - exact).norm() <= limit


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
def test_what_the_cache_does_not_have_is_read_nowhere_and_gives_nan(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    q, k = torch.randn(3, 2, 16, device=DEVICE), torch.randn(4, 8, 2, 16, device=DEVICE)
    table = torch.tensor([[0, 1], [2, 9], [3, 0]], dtype=torch.int32, device=DEVICE)
    out = decode_attention(q, k, k, torch.tensor([12, 12, 25], device=DEVICE), table_RN=table)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_table_that_is_a_slice_and_values_that_lie_otherwise_than_keys(way, monkeypatch):
    """As in a captured graph, whose table is part of its inputs."""
    monkeypatch.setenv("PTST_KERNELS", way)
    q, x = torch.randn(3, 4, 16, device=DEVICE), torch.randn(12, 8, 2, 64, device=DEVICE)
    k, v = x[..., :16].contiguous(), x[:, :, :, 32:48]  # v's strides are others
    table = torch.randperm(12, device=DEVICE).view(3, 4).int()
    lengths = torch.tensor([32, 9, 17], device=DEVICE)
    wanted = decode_attention(q, k, v.contiguous(), lengths, table_RN=table)
    inputs = torch.cat((torch.full((3, 2), 11, device=DEVICE, dtype=torch.int32), table), 1)
    torch.testing.assert_close(decode_attention(q, k, v, lengths, table_RN=inputs[:, 2:]), wanted)
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(decode_attention(q, k, heads_first, lengths, table_RN=inputs[:, 2:]), wanted)
    torch.testing.assert_close(decode_attention(q.repeat(1, 1, 2)[..., :16], k, v, lengths, table_RN=table), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_view_of_a_cache_that_keeps_heads_first(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    q, k, v = (torch.randn(*s, device=DEVICE) for s in ((2, 4, 16), (3, 2, 20, 16), (3, 2, 20, 16)))
    lengths = torch.tensor([20, 7], device=DEVICE)
    views = [x.transpose(1, 2) for x in (k, v)]
    whole = decode_attention(q, *(x.contiguous() for x in views), lengths)
    torch.testing.assert_close(decode_attention(q, *views, lengths), whole)
    assert not torch.equal(whole[0], whole[1])


def test_as_many_splits_as_keep_the_processors_busy():
    assert splits_for(1, 32, 4096, 132) == 8
    assert splits_for(1, 8, 300, 132) == 2
    assert splits_for(256, 32, 4096, 132) == 1


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
def test_as_many_splits_as_the_keys_that_a_window_leaves(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    seen = []
    monkeypatch.setattr(attention_decode, "splits_for", lambda *given: seen.append(given[2]) or 1)
    q, k = torch.randn(1, 1, 16, device=DEVICE), torch.randn(1, 40, 1, 16, device=DEVICE)
    for window in (None, 9):
        decode_attention(q, k, k, torch.tensor([30], device=DEVICE), longest=33, window=window)
    assert seen == [33, 9]


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
def test_registered_in_full():
    q, k = torch.randn(2, 2, 16, device=DEVICE), torch.randn(2, 20, 1, 16, device=DEVICE)
    lengths = torch.tensor([3, 20], device=DEVICE)
    torch.library.opcheck(
        torch.ops.ptst.attention_decode.default, (q, k, k, None, lengths, 0, 2, counters_for(2, 1, lengths.device))
    )


@pytest.mark.parametrize("way", WAYS)
def test_mistakes(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    q, k = torch.ones(2, 3, 8, device=DEVICE), torch.ones(2, 5, 3, 8, device=DEVICE)
    lengths = torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="do not fit keys"):
        decode_attention(q, k[:, :, :2], k[:, :, :2], lengths)
    with pytest.raises(ValueError, match="2 requests need a length"):
        decode_attention(q, k, k, lengths[:1])
    with pytest.raises(ValueError, match="need a length and blocks"):
        decode_attention(q, k[:1], k[:1], lengths)
    with pytest.raises(ValueError, match=r"k is torch\.float16"):
        decode_attention(q, k.half(), k.half(), lengths)
    with pytest.raises(ValueError, match=r"last axis of lengths \(2,\) is not contiguous"):
        decode_attention(q, k, k, torch.ones(2, 3, device=DEVICE, dtype=torch.long)[:, 1])
    with pytest.raises(ValueError, match=r"last axis of table \(2, 2\) is not contiguous"):
        decode_attention(q, k, k, lengths, table_RN=torch.zeros(2, 2, device=DEVICE, dtype=torch.int32).t())
    with pytest.raises(ValueError, match=r"table \(2, 2\) is torch\.float32"):
        decode_attention(q, k, k, lengths, table_RN=torch.zeros(2, 2, device=DEVICE))
    with pytest.raises(ValueError, match=r"lengths \(2,\) is .* on meta"):
        decode_attention(q, k, k, lengths.to("meta"))
    with pytest.raises(ValueError, match=r"queries \(2, 24\) must be \(R, H, D\)"):
        decode_attention(q.flatten(1), k, k, lengths)
    with pytest.raises(ValueError, match=r"counters torch\.int32 \(5,\) must be int32, 6 or more"):
        decode_attention(q, k, k, lengths, counters=counters_for(1, 5, lengths.device))
    with pytest.raises(ValueError, match="window is 0"):
        decode_attention(q, k, k, lengths, window=0)


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
@pytest.mark.parametrize(("heads", "D"), [(1, 257), (257, 8)])
def test_what_is_wider_than_a_block(heads, D, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    q, k = torch.ones(1, heads, D, device=DEVICE), torch.ones(1, 5, 1, D, device=DEVICE)
    with pytest.raises(ValueError, match="is 257; the kernel takes at most 256"):
        decode_attention(q, k, k, torch.tensor([2], device=DEVICE))
