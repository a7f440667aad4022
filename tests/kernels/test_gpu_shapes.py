"""Kernels at the shapes of real models, compiled: loops of many steps, whole and cut blocks, in half precision.

|ours - f64| <= 2 |eager - f64| forward and 3 backward in norms, + 1e-6 |f64|; and twice the same bits, since a bit that
moves is a race. Skipped without a GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ptst.kernels.attention import packed_attention
from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.folded_layer import FoldedGroup, folded_add, folded_feed_forward, folded_qkv
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.kernels.lora import Projections, lora_group
from ptst.kernels.lora_layer import Dropout, lora_feed_forward
from ptst.kernels.rms_norm import add_rms_norm
from ptst.kernels.rope import apply_rope, frequencies, reference, tables
from ptst.kernels.swiglu import swiglu
from tests.gpu import DEVICE, ON_GPU, needs_gpu, size
from tests.kernels import interpreter
from tests.kernels.test_attention_decode import paged
from tests.kernels.test_attention_decode import plain as plain_decode
from tests.kernels.test_attention_prefill import Cache
from tests.kernels.test_flash_attention import bounds, plain, use_blocks
from tests.kernels.test_loss import plain_cross_entropy
from tests.kernels.test_triton import compare

pytestmark = [needs_gpu, pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if not ON_GPU:
        interpreter.install()
        use_blocks(monkeypatch, (32, 16))


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE) * scale


def twice_the_same(function, inputs: list[Tensor]) -> None:
    """Outputs and gradients are equal to the bit in two runs."""
    runs = []
    for _ in range(2):
        leaves = [x.detach().to(HALF).requires_grad_() for x in inputs]
        out = function(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        runs.append([*outs, *torch.autograd.grad([o.float().square().sum() for o in outs], leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check(ours, exact, inputs: list[Tensor]) -> None:
    compare(ours, exact, inputs, HALF)
    twice_the_same(ours, inputs)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [None, 100, 4096])
@pytest.mark.parametrize(("H", "K"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[4097], [1000, 129, 2968]])
def test_attention(D, window, H, K, lengths):
    cu = bounds(size(lengths, [n // 80 for n in lengths]))
    inputs = [random(cu[-1], n, D) for n in (H, K, K)]
    check(partial(packed_attention, cu_seqlens=cu, window=window), plain(cu, cu, window), inputs)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_with_fewer_queries_than_keys(D, window):
    cu_q = bounds(size([1, 129, 500, 1000], [1, 20, 5]))
    cu_k = bounds(size([300, 129, 1501, 4097], [30, 20, 41]))
    inputs = [random(cu_q[-1], 4, D), random(cu_k[-1], 2, D), random(cu_k[-1], 2, D)]
    ours = partial(packed_attention, cu_seqlens=cu_q, cu_seqlens_k=cu_k, window=window)
    check(ours, plain(cu_q, cu_k, window), inputs)


@pytest.mark.parametrize(("V", "trained_head"), [(128256, False), (32000, False), (32000, True)])
def test_loss(V, trained_head):
    """Several chunks of logits, 30 % of the tokens trained."""
    T, H, V = size((6000, 512, V), (9, 16, 500))
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[torch.rand(T, device=DEVICE) > 0.3] = -1
    targets[0] = V - 1
    inputs = [random(T, H), random(V, H, scale=0.05)]
    exact = plain_cross_entropy(targets, torch.ones(T, device=DEVICE), 1777.0)
    ours = partial(linear_cross_entropy, targets_T=targets, divisor=1777.0)
    if trained_head:
        return check(ours, exact, inputs)
    head = inputs[1].to(HALF)
    return check(lambda h: ours(h, head), lambda h: exact(h, head.to(h.dtype)), inputs[:1])


@pytest.mark.parametrize("T", [4096, 1000])
def test_lora_of_a_7b_layer(T):
    T, I, outs = size((T, 4096, (4096, 1024, 1024)), (33, 40, (48, 16, 16)))
    weights = [random(o, I, scale=I**-0.5).to(HALF) for o in outs]
    inputs = [random(T, I)]
    for o in outs:
        inputs += [random(16, I, scale=I**-0.5), random(o, 16)]

    def ours(x, *flat):
        return lora_group(x, weights, Projections.from_flat(weights, flat, 2.0).adapters, 2.0)

    def exact(x, *flat):
        pairs = zip(weights, flat[::2], flat[1::2], strict=True)
        return tuple(x @ w.to(x.dtype).t() + 2.0 * (x @ a.t()) @ b.t() for w, a, b in pairs)

    check(ours, exact, inputs)


@pytest.mark.parametrize("T", [4096, 1000])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_folded_7b_layer(T, rank):
    """q, k and v through attention, o, and the feed-forward half; with dropout twice the same, to the bit."""
    T, E, kv, F, D = size((T, 4096, 1024, 11008, 128), (33, 32, 16, 72, 8))
    shapes = [(E, E), (kv, E), (kv, E), (E, E), (F, E), (F, E), (E, F)]
    weights = [random(o, i, scale=i**-0.5).to(HALF) for o, i in shapes]
    norm, inputs = torch.rand(E, device=DEVICE).to(HALF) + 0.5, [random(T, E)]
    for o, i in shapes:
        inputs += [random(rank, i, scale=i**-0.5), random(o, rank, scale=rank**-0.5)]

    cos, sin = tables(torch.arange(T, device=DEVICE), frequencies(D, 1e4).to(DEVICE))
    cu = [0, T // 3, T]

    def by_head(*qkv):
        return [t.unflatten(1, (-1, D)) for t in qkv]

    def ours(x, *flat, dropout=None):
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        spans = ((0, 3), (3, 4), (4, 6), (6, 7))
        qkv, o, gate_up, down = (FoldedGroup(weights[a:b], pairs[a:b], 0.5) for a, b in spans)
        same, *given = folded_qkv(x, norm, 1e-5, qkv, dropout, (cos, sin))
        attended = packed_attention(*by_head(*given), cu)
        half = folded_feed_forward(x, norm, 1e-5, gate_up, down, dropout)
        return same, attended, folded_add(x, x, o, dropout), half

    def exact(x, *flat):
        def linear(x, number):
            a, b = flat[2 * number : 2 * number + 2]
            return x @ weights[number].to(x.dtype).t() + 0.5 * (x @ a.t()) @ b.t()

        n = torch.nn.functional.rms_norm(x, (E,), norm.to(x.dtype), 1e-5)
        h = torch.nn.functional.silu(linear(n, 4)) * linear(n, 5)
        q, k, v = by_head(*(linear(n, i) for i in range(3)))
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        q, k = (torch.cat((a * c - b * s, b * c + a * s), -1) for a, b in (t.chunk(2, -1) for t in (q, k)))
        return x * 1, plain(cu, cu, None)(q, k, v), x + linear(x, 3), x + linear(h, 6)

    check(ours, exact, inputs)
    twice_the_same(partial(ours, dropout=Dropout(0.05, (1, 2), (0, T // 3, T))), inputs)


@pytest.mark.parametrize("T", [4096, 1000])
def test_the_feed_forward_of_a_7b_layer(T):
    T, E, F = size((T, 4096, 11008), (33, 40, 72))
    shapes = ((F, E), (F, E), (E, F))
    weights = [random(o, i, scale=i**-0.5).to(HALF) for o, i in shapes]
    norm = torch.rand(E, device=DEVICE).to(HALF) + 0.5
    inputs = [random(T, E)]
    for o, i in shapes:
        inputs += [random(16, i, scale=i**-0.5), random(o, 16)]

    def ours(x, *flat):
        return lora_feed_forward(x, norm, 1e-5, Projections.from_flat(weights, flat, 0.5))

    def exact(x, *flat):
        def linear(x, number):
            a, b = flat[2 * number : 2 * number + 2]
            return x @ weights[number].to(x.dtype).t() + 0.5 * (x @ a.t()) @ b.t()

        n = torch.nn.functional.rms_norm(x, (E,), norm.to(x.dtype), 1e-5)
        return x + linear(torch.nn.functional.silu(linear(n, 0)) * linear(n, 1), 2)

    check(ours, exact, inputs)


@pytest.mark.parametrize("H", [4096, 5120, 16384])
def test_norm_and_swiglu(H):
    """The widest norm is one block of sixteen warps; its weight trained and frozen."""
    T, H = size((1000, H), (7, 100))
    inputs = [random(T, H), random(T, H), random(H) + 2]

    def plain_norm(x, r, w):
        return torch.nn.functional.rms_norm(x + r, (H,), w, 1e-5), x + r

    check(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), plain_norm, inputs)
    w = inputs[2].to(HALF)
    frozen = lambda x, r: add_rms_norm(x, r, w, 1e-5)  # noqa: E731
    check(frozen, lambda x, r: plain_norm(x, r, w.to(x.dtype)), inputs[:2])
    check(swiglu, lambda g, u: torch.nn.functional.silu(g) * u, inputs[:2])


@pytest.mark.parametrize(("Q", "K", "D"), [(32, 8, 128), (9, 3, 64), (28, 4, 128)])
def test_rope(Q, K, D):
    T = size(3000, 5)
    cos, sin = tables(torch.arange(T, device=DEVICE), frequencies(D, 1e4).to(DEVICE))
    q, k = (random(T, n, D).to(HALF) for n in (Q, K))
    for ours, x in zip(apply_rope(q, k, cos, sin), (q, k), strict=True):
        exact = reference(x.double(), cos, sin)
        assert (ours - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("R", "longest"), [(1, 4096), (1, 1), (64, 4096), (256, 700)])
def test_decode(D, window, R, longest):
    """As the engine has it: blocks of 32 tokens, heads first in memory, ragged lengths, a table that is a slice."""
    R, longest = size((R, longest), (min(R, 5), min(longest, 70)))
    H, K, P = 8, 2, 32
    q, k, v = (random(*s).to(HALF) for s in ((R, H, D), (R, longest, K, D), (R, longest, K, D)))
    lengths = torch.randint(1, longest + 1, (R,), dtype=torch.int32)
    lengths[0] = longest
    (k_blocks, table), (v_blocks, _) = (paged(x, P) for x in (k, v))
    k_blocks, v_blocks = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_blocks, v_blocks))
    given = torch.cat((table.new_zeros(R, 2), table), 1)[:, 2:]
    run = partial(decode_attention, q, k_blocks, v_blocks, lengths.to(DEVICE), longest=longest)
    ours = run(table_RN=given, window=window)
    exact = plain_decode(q.double(), k.double(), v.double(), lengths.tolist(), window)
    eager = plain_decode(q, k, v, lengths.tolist(), window)
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()
    assert torch.equal(ours, run(table_RN=given, window=window))


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("H", "K"), [(8, 2), (7, 1)])
def test_prefill(D, window, H, K):
    """Chunks over pages of 32 tokens: of one token, whole prompts, and some that begin inside a page."""
    spans = size([(1, 4096), (129, 129), (500, 1501), (1000, 4097), (33, 64)], [(1, 70), (20, 41), (5, 5)])
    cache = Cache(spans, H, K, D, 32, HALF)
    cache.check(window)
    assert torch.equal(cache.ours(window), cache.ours(window))
