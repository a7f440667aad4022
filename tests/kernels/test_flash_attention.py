"""Flash attention in Triton, forward and backward, at ragged shapes; packed documents do not see each other.

Blocks of queries and of keys are of equal and of unequal sizes: a loop that steps by the other's size, or a bound that
uses it, is right where both are equal. The shapes that a GPU takes are in test_gpu_shapes.py.
"""

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
        use_blocks(monkeypatch, SQUARE)


SQUARE, UNEQUAL = (16, 16), ((32, 16), (16, 32))  # (queries, keys) of a block


def use_blocks(monkeypatch, blocks: tuple[int, int]) -> None:
    """Small blocks in the interpreter, so that short documents have several; a GPU keeps its own."""
    if DEVICE == "cpu":
        monkeypatch.setattr(flash_attention, "FORCED", blocks)


ALL_BLOCKS = [SQUARE, *UNEQUAL] if DEVICE == "cpu" else [SQUARE]


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
    ([17, 0, 33, 1], None, 2, 1, 16),  # 33 queries: more than one block of either size
    ([16, 32], None, 2, 1, 20),
    ([40, 5], 1, 2, 2, 16),
    ([40, 5], 2, 2, 1, 16),  # the last query that sees a block's last key is alone in the next block
    ([40, 5], 9, 2, 1, 16),  # the first block of a late query's window holds no key that it sees
    ([33, 20], 64, 2, 2, 32),
    ([75, 3], None, 2, 1, 16),  # several unmasked blocks for one of the other kind
    ([75, 3], 40, 2, 1, 16),  # a window that ends between unmasked blocks
]
EVERYWHERE = [([17, 0, 33, 1], None), ([40, 5], 2), ([40, 5], 9), ([75, 3], None), ([75, 3], 40)]
# Each case in every dtype, its blocks in turn; those whose loops depend on blocks most in all of them.
RUNS = [
    (*case, dtype, blocks)
    for number, case in enumerate(CASES)
    for place, dtype in enumerate(DTYPES)
    for index, blocks in enumerate(ALL_BLOCKS)
    if (dtype == torch.float32 and case[:2] in EVERYWHERE) or index == (number + place) % len(ALL_BLOCKS)
]


@pytest.mark.parametrize(("lengths", "window", "H", "K", "D", "dtype", "blocks"), RUNS)
def test_attention(lengths, window, H, K, D, dtype, blocks, monkeypatch):
    use_blocks(monkeypatch, blocks)
    cu = bounds(lengths)
    inputs = [random(cu[-1], H, D), random(cu[-1], K, D), random(cu[-1], K, D)]
    compare(lambda q, k, v: packed_attention(q, k, v, cu, window=window), plain(cu, cu, window), inputs, dtype)


@pytest.mark.parametrize("blocks", ALL_BLOCKS)
@pytest.mark.parametrize("window", [None, 9])
def test_shared_prefixes(window, blocks, monkeypatch):
    """As with whole documents: the second and the fourth begin with tokens of the first."""
    use_blocks(monkeypatch, blocks)
    lengths, prefixes, rows = [20, 3, 4, 17], [(0, 0), (0, 18), (0, 0), (0, 18)], []
    cu = bounds(lengths)
    for (start, size), a, b in zip(prefixes, cu, cu[1:], strict=False):
        rows += [*range(start, start + size), *range(a, b)]
    cu_k = bounds([n + size for n, (_, size) in zip(lengths, prefixes, strict=True)])

    def longer(q, k, v):
        return plain(cu, cu_k, window)(q, *(x[torch.tensor(rows, device=x.device)] for x in (k, v)))

    inputs = [random(44, 2, 16), random(44, 1, 16), random(44, 1, 16)]
    ours = partial(packed_attention, cu_seqlens=cu, shared_prefixes=prefixes, window=window)
    compare(ours, longer, inputs, torch.float32)


@pytest.mark.parametrize("blocks", ALL_BLOCKS)
@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_are_the_last_of_their_documents(window, blocks, monkeypatch):
    """Cached prefill: fewer queries than keys. Keys that no query sees get a gradient of zero."""
    use_blocks(monkeypatch, blocks)
    cu_q, cu_k = [0, 3, 37, 38], [0, 20, 58, 81]
    inputs = [random(38, 2, 16), random(81, 1, 16), random(81, 1, 16)]
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
    """q, k and v lie in one tensor, v in another of other strides; the output's gradient is a view, too."""
    qkv, wide = torch.randn(20, 6, 16, device=DEVICE), torch.randn(20, 2, 48, device=DEVICE)
    parts = qkv[:, :4], qkv[:, 4:6], wide[..., :16]
    results = []
    for form in (lambda x: x, torch.Tensor.contiguous):
        leaves = [form(x.detach()).requires_grad_() for x in parts]
        out = packed_attention(*leaves, [0, 20])
        out.backward(form(torch.linspace(-1, 1, out.numel(), device=DEVICE).view(4, 20, 16).transpose(0, 1)))
        results.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
    with pytest.raises(ValueError, match=r"last axis of v \(4, 3, 8\)"):
        packed_attention(q, q, torch.ones(4, 8, 3, device=DEVICE).transpose(1, 2), [0, 4])


@pytest.mark.parametrize("D", [256, 257, 320])
def test_a_head_that_is_wider_than_a_block(D):
    """Right or an error, never a part of it."""
    q = torch.randn(4, 1, D, device=DEVICE)
    if D <= 256:
        torch.testing.assert_close(packed_attention(q, q, q, [0, 4]), plain([0, 4], [0, 4], None)(q, q, q))
        return
    with pytest.raises(ValueError, match=rf"queries \(4, 1, {D}\), .* at most 256"):
        packed_attention(q, q, q, [0, 4])
