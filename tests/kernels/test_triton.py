"""The Triton kernels, forward and backward: in Triton's interpreter on a CPU, compiled on a GPU.

Per tensor in norms: |ours - f64| <= 2 |eager - f64| forward and 3 backward, + 1e-6 |f64|, eager being plain torch in
the same dtype.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from ptst.kernels.dispatch import triton, use_triton
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, reference, tables
from ptst.kernels.swiglu import swiglu
from tests.kernels import interpreter

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
linear_cross_entropy_file = sys.modules["ptst.kernels.linear_cross_entropy"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()
    assert use_triton(torch.zeros(1, device=DEVICE))


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def compare(ours, plain, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients of `ours` and `plain` in `dtype` against `plain` in float64. Inputs are rounded first."""
    results = []
    rounded = [x.to(dtype) for x in inputs]
    for function, to in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [x.detach().to(DEVICE, to, copy=True).requires_grad_() for x in rounded]
        values = function(*leaves)
        values = values if isinstance(values, tuple) else (values,)
        weights = [
            torch.linspace(-1, 1, v.numel(), dtype=torch.float64).view(v.shape).to(DEVICE, dtype) for v in values
        ]
        sum((v * w.to(to)).sum() for v, w in zip(values, weights, strict=True)).backward()
        results.append(([v.detach().double() for v in values], [x.grad.double() for x in leaves]))
    for factor, part in ((2, 0), (3, 1)):
        # Exact zeros (the query's gradient where it sees one key) are held against the largest tensor's size.
        size = max(exact.norm() for exact in results[2][part])
        assert size > 0
        for index, (a, b, exact) in enumerate(zip(*(r[part] for r in results), strict=True)):
            limit = factor * (b - exact).norm() + 1e-6 * (exact.norm() or size)
            assert (a - exact).norm() <= limit, (part, index, float((a - exact).norm()), float(limit))


SHAPES = [(1, 1), (3, 33), (5, 128), (300, 20), (7, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    inputs = [random(*shape, scale=3), random(shape[1]) + 2]
    compare(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 33), (300, 20)])
def test_add_rms_norm(shape, dtype):
    def plain(x, r, w):
        return torch.nn.functional.rms_norm(x + r, w.shape, w, 1e-5), x + r

    inputs = [random(*shape), random(*shape), random(shape[1]) + 2]
    compare(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), plain, inputs, dtype)


def test_a_frozen_norm_forms_no_gradient_of_its_weight():
    x, w = torch.randn(4, 32, device=DEVICE, requires_grad=True), torch.ones(32, device=DEVICE)
    seen = []
    original = torch.ops.ptst.rms_norm_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.ptst, "rms_norm_backward", lambda *a: seen.append(original(*a)) or seen[-1])
        rms_norm(x, w, 1e-5).sum().backward()
    assert seen[0][1].numel() == 0
    assert x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1024), (2, 1025)])
def test_swiglu(shape, dtype):
    compare(swiglu, lambda g, u: torch.nn.functional.silu(g) * u, [random(*shape, scale=4), random(*shape)], dtype)


def test_swiglu_of_the_halves_of_one_product():
    both = random(5, 2 * 40)

    def plain(x):
        gate, up = x.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    compare(lambda x: swiglu(*x.chunk(2, dim=1)), plain, [both], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "Q", "K", "D"), [(1, 1, 1, 2), (5, 4, 2, 64), (3, 6, 1, 20), (2, 40, 8, 16)])
def test_rope(T, Q, K, D, dtype):
    positions = torch.randint(0, 4000, (T,), device=DEVICE)
    cos, sin = tables(positions, frequencies(D, 1e4).to(DEVICE))

    def plain(q, k):
        out = []
        for x in (q, k):
            a, b = x.chunk(2, dim=-1)
            c, s = cos.to(x.dtype), sin.to(x.dtype)
            out.append(torch.cat((a * c - b * s, b * c + a * s), dim=-1))
        return tuple(out)

    compare(lambda q, k: apply_rope(q, k, cos, sin), plain, [random(T, Q, D), random(T, K, D)], dtype)
    q = random(T, Q, D).to(DEVICE, torch.float32)
    torch.testing.assert_close(apply_rope(q, q, cos, sin)[0], reference(q, cos, sin))


def test_rope_of_slices_of_one_product():
    cos, sin = tables(torch.arange(5, device=DEVICE), frequencies(8, 1e4).to(DEVICE))
    qkv = torch.randn(5, 8, 8, device=DEVICE)
    q, k = apply_rope(qkv[:, :4], qkv[:, 4:6], cos, sin)
    torch.testing.assert_close(q, reference(qkv[:, :4], cos, sin))
    torch.testing.assert_close(k, reference(qkv[:, 4:6], cos, sin))


def plain_cross_entropy(targets, weights, divisor):
    def plain(h, e):
        rows = targets >= 0
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.nn.functional.cross_entropy((h[rows] @ e.t()).to(wide), targets[rows], reduction="none")
        return (losses * weights[rows].to(wide)).sum() / divisor

    return plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "V"), [(1, 8, 5), (7, 16, 100), (5, 8, 4097)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_linear_cross_entropy(T, H, V, share, dtype, monkeypatch):
    """The head frozen and trained, weighted and not, in one chunk and in several."""
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[torch.rand(T, device=DEVICE) > share] = -1
    targets[0] = V - 1
    inputs = [random(T, H, scale=2), random(V, H)]
    for weights, chunk in ((torch.ones(T, device=DEVICE), 1 << 24), (torch.rand(T, device=DEVICE) + 0.5, 2 * V)):
        monkeypatch.setattr(linear_cross_entropy_file, "CHUNK_ELEMENTS", chunk)
        given = None if weights.eq(1).all() else weights
        plain = plain_cross_entropy(targets, weights, 3.0)
        compare(lambda h, e, g=given: linear_cross_entropy(h, e, targets, 3.0, g), plain, inputs, dtype)
        head = inputs[1].to(DEVICE, dtype)
        compare(
            lambda h, head=head, g=given: linear_cross_entropy(h, head, targets, 3.0, g),
            lambda h, head=head, f=plain: f(h, head.to(h.dtype)),
            inputs[:1],
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_without_gradients(dtype, monkeypatch):
    """Row by row what torch says of the logits, in one chunk and in several."""
    hidden, head = (random(*s).to(DEVICE, dtype) for s in ((5, 8), (4097, 8)))
    targets = torch.randint(0, 4097, (5,), device=DEVICE)
    for chunk in (1 << 24, 2 * 4097):
        monkeypatch.setattr(linear_cross_entropy_file, "CHUNK_ELEMENTS", chunk)
        each = [torch.where(torch.arange(5, device=DEVICE) == i, targets, -1) for i in range(5)]
        losses = torch.stack([linear_cross_entropy(hidden, head, t, 1.0) for t in each])
        total = linear_cross_entropy(hidden, head, targets, 1.0)
        exact = torch.nn.functional.cross_entropy((hidden @ head.t()).double(), targets, reduction="none")
        assert losses.dtype == torch.float32
        assert (losses - exact).norm() <= 1e-5 * exact.norm()
        assert abs(total - exact.sum()) <= 1e-5 * exact.sum()
    assert linear_cross_entropy(hidden[:0], head, targets[:0], 1.0) == 0


def test_large_logits_and_targets_outside_the_vocabulary():
    h = torch.full((3, 4), 200.0, device=DEVICE, requires_grad=True)
    head = torch.eye(5, 4, device=DEVICE) * 100
    loss = linear_cross_entropy(h, head, torch.tensor([0, 1, 4], device=DEVICE), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert h.grad.isfinite().all()
    for wrong in (5, 1 << 40):
        assert linear_cross_entropy(h, head, torch.tensor([0, 1, wrong], device=DEVICE), 1.0).isnan()


def test_no_rows():
    empty, w = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    out = rms_norm(empty, w, 1e-5).sum() + swiglu(empty, empty).sum()
    out.backward()
    assert empty.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5), r"weight \(3,\)"),
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(4).bfloat16(), 1e-5), "weight is torch.bfloat16"),
        (lambda: rms_norm(torch.ones(4, 2).t(), torch.ones(4), 1e-5), "last axis of x"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), 1e-5), r"residual \(3, 4\)"),
        (lambda: swiglu(torch.ones(2, 4), torch.ones(2, 5)), r"up \(2, 5\)"),
        (lambda: swiglu(torch.ones(2, 4), torch.ones(2, 4).half()), "up is torch.float16"),
        (
            lambda: apply_rope(torch.ones(2, 1, 4), torch.ones(3, 1, 4), torch.ones(2, 1, 2), torch.ones(2, 1, 2)),
            "do not",
        ),
        (lambda: linear_cross_entropy(torch.ones(2, 4), torch.ones(5, 3), torch.ones(2).long(), 1.0), r"head \(5, 3\)"),
        (
            lambda: linear_cross_entropy(torch.ones(2, 4), torch.ones(5, 4), torch.ones(3).long(), 1.0),
            r"targets \(3,\)",
        ),
        (
            lambda: linear_cross_entropy(torch.ones(2, 4), torch.ones(5, 4).half(), torch.ones(2).long(), 1.0),
            "head is torch.float16",
        ),
    ],
)
@pytest.mark.parametrize("way", ["triton", "reference"])
def test_mistakes(call, says, way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "linear_cross_entropy"])
@pytest.mark.parametrize("way", ["triton", "reference"])
def test_operators_are_registered_in_full(name, way, monkeypatch):
    """Schema, fake kernel, autograd and its registration, as torch's own checker sees them."""
    monkeypatch.setenv("PTST_KERNELS", way)
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    heads = torch.randn(3, 2, 4, device=DEVICE, requires_grad=True)
    cos, sin = tables(torch.arange(3, device=DEVICE), frequencies(4, 1e4).to(DEVICE))
    args = {
        "rms_norm": (x, torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True), 1e-5),
        "swiglu": (x, torch.randn(3, 8, device=DEVICE, requires_grad=True)),
        "linear_cross_entropy": (
            *(x, torch.randn(5, 8, device=DEVICE, requires_grad=True), torch.tensor([1, -1, 4], device=DEVICE)),
            *(None, torch.tensor([0, 2], device=DEVICE), True, True, 0.75),
        ),
        "rope": (heads, heads.detach().clone().requires_grad_(), cos, sin, False),
    }[name]
    torch.library.opcheck(getattr(torch.ops.ptst, name).default, args)


@pytest.mark.skipif(DEVICE == "cuda", reason="the watch lives in the interpreter")
def test_the_watch_sees_what_the_interpreter_does_not():
    import triton.language as tl

    @triton.jit
    def past_the_end(x, n, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))

    @triton.jit
    def race(x, n, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32))

    with pytest.raises(Exception, match="out of bounds"):
        past_the_end[(1,)](torch.ones(5), 5, BLOCK=8)
    race[(1,)](torch.ones(8), 8, BLOCK=8)
    with pytest.raises(Exception, match="in the same launch"):
        race[(2,)](torch.ones(8), 8, BLOCK=8)
