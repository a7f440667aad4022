"""q, k and v of a folded layer as columns of one tensor, rotated in place, and their gradients likewise."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels import flash_attention, folded_layer
from ptst.kernels.attention import packed_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.folded_layer import FoldedGroup, folded_qkv
from ptst.kernels.joined import gradients_like, joined, own_gradients
from ptst.kernels.rope import frequencies, tables
from tests.kernels import interpreter
from tests.kernels.test_flash_attention import plain as plain_attention
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
BOUNDS, E, Q, K, D = [0, 20, 21, 37], 24, 4, 2, 16
HEADS = (Q, K, K)
OUTS = [n * D for n in HEADS]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()
        monkeypatch.setattr(flash_attention, "FORCED", (16, 16))


@pytest.fixture
def given():
    """x, the norm's weight, weights with biases, adapters of q and v, and the angles."""
    x, *flat = random(BOUNDS[-1], E), *(random(*s) for s in ((3, E), (OUTS[0], 3), (3, E), (OUTS[2], 3)))
    weights, biases = [random(o, E, scale=E**-0.5) for o in OUTS], [random(o) for o in OUTS]
    angles = tables(torch.arange(BOUNDS[-1], device=DEVICE) + 100, frequencies(D, 1e4).to(DEVICE))
    return [x, *flat], torch.rand(E, dtype=torch.float64) + 0.5, weights, biases, angles


def ours(given, leaves):
    """(x, q, k, v), by head."""
    _, norm, weights, biases, angles = given
    x, *flat = leaves
    weights, biases = ([t.to(DEVICE, x.dtype) for t in ts] for ts in (weights, biases))
    group = FoldedGroup(weights, [(flat[0], flat[1]), None, (flat[2], flat[3])], 0.5, biases)
    same, *qkv = folded_qkv(x, norm.to(x), 1e-5, group, None, angles)
    return same, *(t.unflatten(1, (-1, D)) for t in qkv)


def plain(given, leaves):
    _, norm, weights, biases, (cos, sin) = given
    x, *flat = leaves
    n = torch.nn.functional.rms_norm(x, (E,), norm.to(x), 1e-5)
    q, k, v = (n @ w.to(x).t() + b.to(x) for w, b in zip(weights, biases, strict=True))
    q, v = q + 0.5 * (n @ flat[0].t()) @ flat[1].t(), v + 0.5 * (n @ flat[2].t()) @ flat[3].t()
    q, k, v = (t.unflatten(1, (-1, D)) for t in (q, k, v))
    cos, sin = cos.to(x), sin.to(x)
    halves = [t.chunk(2, -1) for t in (q, k)]
    return x * 1, *(torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in halves), v


@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:2])
def test_rotated(given, dtype):
    """With gradients that are tensors of their own."""
    compare(lambda *leaves: ours(given, leaves), lambda *leaves: plain(given, leaves), given[0], dtype)


@pytest.mark.parametrize("window", [None, 5])
def test_through_attention(given, window, monkeypatch):
    """With gradients of which attention makes one tensor, which is rotated back where it is."""
    found = []
    monkeypatch.setattr(folded_layer, "own_gradients", lambda *dys: found.append(own_gradients(*dys)) or found[-1])

    def attended(*leaves):
        same, *qkv = ours(given, leaves)
        assert joined(*qkv) is not None
        return same, packed_attention(*qkv, BOUNDS, window=window)

    def exact(*leaves):
        same, *qkv = plain(given, leaves)
        return same, plain_attention(BOUNDS, BOUNDS, window)(*qkv)

    compare(attended, exact, given[0], torch.float32)
    assert len(found) == 1 and found[0].shape == (BOUNDS[-1], sum(OUTS))


def test_what_is_kept(given):
    """Of q, k and v no element twice, and none of q and k before their rotation."""
    kept = {}

    def keep(t):
        memory = t.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return t

    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in given[0]]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _, *qkv = ours(given, leaves)
        before = set(kept)
        packed_attention(*qkv, BOUNDS)
    sizes = sorted(kept[p] for p in set(kept) - before)
    T = BOUNDS[-1]
    assert sizes == sorted([T * sum(OUTS) * 4, T * OUTS[0] * 4, T * Q * 4])  # q|k|v, the output, its statistics


def test_gradients_that_someone_else_holds_are_not_changed(given):
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in given[0]]
    _, *qkv = ours(given, leaves)
    whole = torch.linspace(-1, 1, BOUNDS[-1] * sum(OUTS), device=DEVICE).view(BOUNDS[-1], -1)
    before = whole.clone()
    columns = [x.unflatten(1, (-1, D)) for x in whole.split(OUTS, 1)]
    assert joined(*columns) is not None and own_gradients(*columns) is None
    together = torch.autograd.grad(qkv, leaves, columns, retain_graph=True)
    assert torch.equal(whole, before)
    apart = torch.autograd.grad(qkv, leaves, [x.contiguous() for x in columns], retain_graph=True)
    own = gradients_like(*qkv)
    for to, x in zip(own, columns, strict=True):
        to.copy_(x)
    in_place = torch.autograd.grad(qkv, leaves, own, retain_graph=True)
    for a, b, c in zip(together, apart, in_place, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    ones = [torch.ones(1, 1, 1, device=DEVICE).expand(x.shape) for x in qkv]
    expanded = torch.autograd.grad(qkv, leaves, ones, retain_graph=True)
    dense = torch.autograd.grad(qkv, leaves, [x.contiguous() for x in ones])
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("window", [None, 5])
def test_attentions_gradients_are_the_same_to_the_bit(window):
    qkv = torch.randn(BOUNDS[-1], sum(HEADS), D, device=DEVICE)
    do = torch.randn(BOUNDS[-1], Q, D, device=DEVICE)
    grads = []
    for form in (lambda t: t, torch.Tensor.contiguous):
        leaves = [form(t) for t in qkv.split(HEADS, 1)]
        out, lse = torch.ops.ptst.attention(*leaves, BOUNDS, BOUNDS, window or 0)
        grads.append(torch.ops.ptst.attention_backward(do, *leaves, out, lse, BOUNDS, BOUNDS, window or 0))
    assert own_gradients(*grads[0]) is not None and joined(*grads[1]) is None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_joined():
    x = torch.arange(48.0).view(4, 12)
    q, k, v = x[:, :6].unflatten(1, (3, 2)), x[:, 6:9], x[:, 9:]
    assert torch.equal(joined(q, k, v), x) and joined(q, k, v).data_ptr() == x.data_ptr()
    assert torch.equal(joined(q[1:3], k[1:3], v[1:3]), x[1:3])
    others = [(q, v, k), (q, k), (q, k, v.clone()), (q, k, v[:3]), (q, k[1:], v[1:]), (q, k.flip(1), v), (q, k, v, v)]
    others.append((q, x.clone()[:, 6:9], v))
    assert all(joined(*parts) is None for parts in others)


def test_mistakes(given):
    leaves = [x.to(DEVICE, torch.float32) for x in given[0]]
    cos, sin = given[-1]
    for angles in ((cos[1:], sin[1:]), (cos, sin[:, :, 1:]), (cos[..., :5], sin[..., :5])):
        with pytest.raises(ValueError, match=r"the tables \(3\d, 1, \d\), .* do not fit 37 tokens"):
            ours([*given[:-1], angles], leaves)
    with pytest.raises(ValueError, match="the tables are on meta"):
        ours([*given[:-1], (cos.to("meta"), sin.to("meta"))], leaves)
