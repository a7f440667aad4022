"""The plain-torch operations, forward and backward, against float64 formulas written out the long way.

Tolerance per tensor in norms: |ours - f64| <= 2 |eager - f64| forward and 3 backward, + 1e-6 |f64|.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ptst.kernels.attention import packed_attention
from ptst.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probabilities
from ptst.kernels.lora import lora_group
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, tables
from ptst.kernels.swiglu import swiglu


def long_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], window: int | None = None) -> Tensor:
    """Query by query, key by key."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for a, b in pairwise(bounds):
        for i in range(a, b):
            first = a if window is None else max(a, i - window + 1)
            for h in range(q.shape[1]):
                scores = k[first : i + 1, h // group] @ q[i, h] / math.sqrt(q.shape[2])
                out[i, h] = scores.softmax(0) @ v[first : i + 1, h // group]
    return out


def check(ours, eager, exact, inputs: list[Tensor]) -> None:
    """Compare value and gradients of three functions of the same inputs; `exact` runs in float64."""
    results = []
    for function, dtype in ((ours, torch.float32), (eager, torch.float32), (exact, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        value = function(*leaves)
        weight = torch.linspace(-1, 1, value.numel(), dtype=dtype).view(value.shape) + 0.3
        (value * weight).sum().backward()
        results.append([value.detach().double(), *(x.grad.double() for x in leaves)])
    # Exact zeros (the query's gradient where it sees one key) are held against the largest tensor's size.
    scale = max(f64.norm() for f64 in results[2])
    for index, (a, b, f64) in enumerate(zip(*results, strict=True)):
        limit = (2 if index == 0 else 3) * (b - f64).norm() + 1e-6 * scale
        assert index or f64.norm() > 0  # a gradient may vanish: one key alone always has weight one
        assert (a - f64).norm() <= limit, f"tensor {index}: {(a - f64).norm():.2e} > {limit:.2e}"


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 12], [0, 5, 0, 3]])
def test_attention(window, heads, lengths):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    shapes = [(bounds[-1], heads[0], 8), (bounds[-1], heads[1], 8), (bounds[-1], heads[1], 8)]
    inputs = [torch.randn(s) for s in shapes]

    def long(q, k, v):
        return long_attention(q, k, v, bounds, window)

    check(lambda q, k, v: packed_attention(q, k, v, bounds, window=window), long, long, inputs)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_with_fewer_queries_than_keys(window):
    """Queries are the last ones of their documents: the same rows as of the whole documents."""
    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    whole = packed_attention(q, k, v, [0, 9, 14], window=window)
    part = torch.cat([q[6:9], q[13:14]])
    ours = packed_attention(part, k, v, [0, 3, 4], cu_seqlens_k=[0, 9, 14], window=window)
    torch.testing.assert_close(ours, torch.cat([whole[6:9], whole[13:14]]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 10, 11])  # the longest document has 9 tokens of its own, 11 in all
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_with_shared_prefixes(window, heads):
    """Values and gradients are those of whole documents, whose shared prefixes are copied."""
    bounds, prefixes = [0, 9, 12, 12, 17, 21, 22], [(0, 0), (0, 6), (0, 6), (0, 6), (0, 0), (17, 3)]
    copies = [*range(9), *range(6), 9, 10, 11, *range(6), *range(12, 17), *range(17, 21), 17, 18, 19, 21]
    whole = [0, 9, 18, 18, 29, 33, 37]
    own = [*range(9), *range(15, 18), *range(24, 29), *range(29, 33), 36]
    inputs = [torch.randn(22, heads[0], 8), torch.randn(22, heads[1], 8), torch.randn(22, heads[1], 8)]

    def long(q, k, v):
        return long_attention(*(x[torch.tensor(copies)] for x in (q, k, v)), whole, window)[torch.tensor(own)]

    check(
        lambda q, k, v: packed_attention(q, k, v, bounds, shared_prefixes=prefixes, window=window), long, long, inputs
    )


def test_attention_refuses_shared_prefixes_that_do_not_fit():
    q = torch.randn(4, 2, 8)
    for prefixes, message in (
        ([(0, 0)], "1 shared prefixes are given for 2"),
        ([(0, 0), (1, 3)], "tokens 1 to 4 do not precede"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(q, q, q, [0, 3, 4], shared_prefixes=prefixes)
    with pytest.raises(ValueError, match="not both"):
        packed_attention(q, q, q, [0, 3, 4], cu_seqlens_k=[0, 3, 4], shared_prefixes=[(0, 0), (0, 2)])


def test_attention_refuses_boundaries_that_do_not_fit():
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="boundaries end at 5"):
        packed_attention(q, q, q, [0, 5])
    with pytest.raises(ValueError, match="more queries than keys"):
        packed_attention(q, q[:3], q[:3], [0, 4], cu_seqlens_k=[0, 3])
    for lie in ([1, 4], [0, 3, 2, 4], []):
        with pytest.raises(ValueError, match="never fall"):
            packed_attention(q, q, q, lie)
    with pytest.raises(ValueError, match="window is 0"):
        packed_attention(q, q, q, [0, 4], window=0)


@pytest.mark.parametrize("chunk", [1 << 24, 40])
def test_linear_cross_entropy(chunk, monkeypatch):
    monkeypatch.setattr("ptst.kernels.linear_cross_entropy.CHUNK_ELEMENTS", chunk)
    targets = torch.tensor([3, -1, 0, 16, -1, -1, 9])
    rows = targets >= 0

    def long(h, e):
        return torch.nn.functional.cross_entropy((h @ e.t())[rows], targets[rows], reduction="sum")[None] / 11

    inputs = [torch.randn(7, 5) * 3, torch.randn(17, 5)]
    check(lambda h, e: linear_cross_entropy(h, e, targets, 11.0)[None], long, long, inputs)
    with torch.no_grad():
        alone = linear_cross_entropy(*inputs, targets, 11.0)
    torch.testing.assert_close(alone, long(*inputs)[0])


@pytest.mark.parametrize("chunk", [1, 30, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_log_probabilities(chunk, dtype, monkeypatch):
    monkeypatch.setattr("ptst.kernels.linear_cross_entropy.CHUNK_ELEMENTS", chunk)
    hidden, head = torch.randn(7, 4, dtype=dtype), torch.randn(11, 4, dtype=dtype)
    targets, trained = torch.tensor([3, -1, 10, 0, -1, 5, 5]), torch.tensor([0, 2, 3, 5, 6])
    found = linear_log_probabilities(hidden, head, targets, trained)
    wanted = (hidden @ head.t()).double().log_softmax(1)[trained, targets[trained]]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert (found - wanted).abs().max() <= 8 * torch.finfo(found.dtype).eps * (1 + wanted.abs().max())
    assert linear_log_probabilities(hidden, head, targets, trained[:0]).shape == (0,)


def test_linear_cross_entropy_with_a_frozen_head_and_large_logits():
    hidden, head = (torch.randn(4, 6) * 100).requires_grad_(), torch.randn(9, 6)
    loss = linear_cross_entropy(hidden, head, torch.tensor([1, 2, 3, -1]), 3.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert head.grad is None
    assert hidden.grad[3].abs().sum() == 0
    with pytest.raises(ValueError, match="divisor is 0"):
        linear_cross_entropy(hidden, head, torch.tensor([1, 2, 3, -1]), 0)
    with pytest.raises(ValueError, match="shapes do not fit"):
        linear_cross_entropy(hidden, head, torch.tensor([1, 2]), 1)


def test_swiglu():
    def long(g, u):
        return g / (1 + torch.exp(-g)) * u

    check(swiglu, long, long, [torch.randn(5, 7) * 3, torch.randn(5, 7)])


def test_rms_norm():
    def long(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w

    check(lambda x, w: rms_norm(x, w, 1e-5), long, long, [torch.randn(5, 8) * 4, torch.randn(8)])


def test_lora_group():
    weight = torch.randn(6, 5)

    def long(x, a, b):
        return x @ weight.to(x.dtype).t() + 0.5 * (x @ a.t()) @ b.t()

    def ours(x, a, b):
        return lora_group(x, [weight], [(a, b)], 0.5)[0]

    check(ours, long, long, [torch.randn(7, 5), torch.randn(2, 5), torch.randn(6, 2)])


def test_rope_turns_each_pair_by_its_angle():
    positions = torch.tensor([0, 1, 7])
    cos, sin = tables(positions, frequencies(8, 100.0))

    def long(x):
        out = torch.zeros_like(x)
        for t, p in enumerate([0, 1, 7]):
            for i in range(4):
                angle = p * 100.0 ** (-2 * i / 8)
                a, b = x[t, :, i], x[t, :, i + 4]
                out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, :, i + 4] = b * math.cos(angle) + a * math.sin(angle)
        return out

    check(lambda x: apply_rope(x, x[:, :1], cos, sin)[0], long, long, [torch.randn(3, 2, 8)])


def test_gradcheck(monkeypatch):
    """Every operation's gradient against finite differences, in float64."""
    monkeypatch.setenv("PTST_KERNELS", "reference")

    def leaves(*shapes):
        return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    targets, weights = torch.tensor([2, -1, 0, 4]), torch.rand(4, dtype=torch.float64) + 0.5
    cos, sin = tables(torch.arange(5), frequencies(4, 100.0))
    base = [torch.randn(n, 5, dtype=torch.float64) for n in (4, 3, 2)]

    def attention(q, k, v):
        return packed_attention(q, k, v, [0, 3, 5], cu_seqlens_k=[0, 4, 6], window=3)

    def lora(x, a, b, c, d):
        return lora_group(x, base, [(a, b), None, (c, d)], 0.5)

    for function, inputs in (
        (attention, leaves((5, 2, 4), (6, 1, 4), (6, 1, 4))),
        (lambda h, e: linear_cross_entropy(h, e, targets, 3.0, weights), leaves((4, 3), (5, 3))),
        (lambda x, w: rms_norm(x, w, 1e-5), leaves((3, 4), (4,))),
        (lambda x, r, w: add_rms_norm(x, r, w, 1e-5), leaves((3, 4), (3, 4), (4,))),
        (swiglu, leaves((3, 4), (3, 4))),
        (lora, leaves((3, 5), (2, 5), (4, 2), (1, 5), (2, 1))),
    ):
        assert torch.autograd.gradcheck(function, inputs)
    # Angles are float32, and so is the rotation: a difference of 1e-3 is as fine as it can see.
    rotated = leaves((5, 2, 4), (5, 1, 4))
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin), rotated, eps=1e-2, atol=1e-4, rtol=1e-3)
