"""Flash attention in Triton, forward and backward, at ragged shapes; packed documents do not see each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ptst.kernels import flash_attention
from ptst.kernels.attention import causal_mask, packed_attention
from ptst.kernels.dispatch import triton
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()
        monkeypatch.setattr(flash_attention, "FORCED", (16, 16))


def plain(cu_q, cu_k, window):
    """One masked softmax per document and head, in the dtype of the inputs."""

    def attention(q, k, v):
        outs = []
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            group = q.shape[1] // k.shape[1]
            keys, values = (x[k0:k1].repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q[q0:q1], keys) / q.shape[2] ** 0.5
            mask = causal_mask(q1 - q0, k1 - k0, window, q.device)
            outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, float("-inf")).softmax(-1), values))
        return torch.cat(outs)

    return attention


def bounds(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


# Lengths around one and two blocks of 16, with empty documents.
CASES = [
    ([2], None, 16, 8, 8),  # many heads: the rounding of one alone is luck
    ([17, 0, 33, 1], None, 4, 2, 16),
    ([16, 32], None, 2, 1, 20),
    ([40, 5], 1, 2, 2, 16),
    ([40, 5], 9, 3, 1, 16),
    ([33, 20], 64, 2, 2, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "window", "H", "K", "D"), CASES)
def test_attention(lengths, window, H, K, D, dtype):
    cu = bounds(lengths)
    inputs = [random(cu[-1], H, D), random(cu[-1], K, D), random(cu[-1], K, D)]
    compare(lambda q, k, v: packed_attention(q, k, v, cu, window=window), plain(cu, cu, window), inputs, dtype)


@pytest.mark.parametrize("window", [None, 9])
def test_shared_prefixes(window):
    """As with whole documents: the second and the fourth begin with tokens of the first."""
    lengths, prefixes, rows = [20, 3, 4, 17], [(0, 0), (0, 18), (0, 0), (0, 18)], []
    cu = bounds(lengths)
    for (start, size), a, b in zip(prefixes, cu, cu[1:], strict=False):
        rows += [*range(start, start + size), *range(a, b)]
    cu_k = bounds([n + size for n, (_, size) in zip(lengths, prefixes, strict=True)])

    def longer(q, k, v):
        return plain(cu, cu_k, window)(q, *(x[torch.tensor(rows, device=x.device)] for x in (k, v)))

    inputs = [random(44, 4, 16), random(44, 2, 16), random(44, 2, 16)]
    ours = partial(packed_attention, cu_seqlens=cu, shared_prefixes=prefixes, window=window)
    compare(ours, longer, inputs, torch.float32)


@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_are_the_last_of_their_documents(window):
    """Cached prefill: fewer queries than keys. Keys that no query sees get a gradient of zero."""
    cu_q, cu_k = [0, 3, 20, 21], [0, 20, 37, 60]
    inputs = [random(21, 4, 16), random(60, 2, 16), random(60, 2, 16)]
    compare(
        lambda q, k, v: packed_attention(q, k, v, cu_q, cu_seqlens_k=cu_k, window=window),
        plain(cu_q, cu_k, window),
        inputs,
        torch.float32,
    )


def test_large_scores_stay_finite():
    q, k, v = (torch.randn(20, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = packed_attention(q * 1e3, k * 1e3, v, [0, 20])
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert x.isfinite().all()


def test_documents_do_not_leak():
    """Another text in one document: the other documents' outputs and gradients stay bit for bit what they were."""
    cu, results = [0, 18, 40, 45], []
    start = [torch.randn(45, 2, 16, device=DEVICE) for _ in range(3)]
    for change in (0.0, 1.0):
        leaves = [x.clone() for x in start]
        for x in leaves:
            x[18:40] += change
            x.requires_grad_()
        out = packed_attention(*leaves, cu)
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    others = [*range(18), *range(40, 45)]
    for prefixes, after in zip(*results, strict=True):
        assert torch.equal(prefixes[others], after[others])
        assert not torch.equal(prefixes[18:40], after[18:40])


def test_the_backward_pass_is_deterministic():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        leaves = [torch.randn(33, n, 16, device=DEVICE, requires_grad=True) for n in (4, 2, 2)]
        packed_attention(*leaves, [0, 33]).square().sum().backward()
        runs.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_slices_of_one_product():
    qkv = torch.randn(20, 8, 16, device=DEVICE)
    parts = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    whole = [x.contiguous() for x in parts]
    assert torch.equal(packed_attention(*parts, [0, 20]), packed_attention(*whole, [0, 20]))


def test_registered_in_full():
    q, k, v = (torch.randn(9, n, 16, device=DEVICE, requires_grad=True) for n in (4, 2, 2))
    torch.library.opcheck(torch.ops.ptst.attention.default, (q, k, v, [0, 4, 9], [0, 4, 9], 0))


@pytest.mark.parametrize("way", ["triton", "reference"])
def test_mistakes(way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    q = torch.ones(4, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="more queries than keys"):
        packed_attention(q, q[:3], q[:3], [0, 4], cu_seqlens_k=[0, 3])
    with pytest.raises(ValueError, match=r"queries \(4, 3, 8\).*must be a multiple"):
        packed_attention(q, q[:, :2], q[:, :2], [0, 4])
    with pytest.raises(ValueError, match=r"k is torch\.bfloat16"):
        packed_attention(q, q.bfloat16(), q.bfloat16(), [0, 4])
