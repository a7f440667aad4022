"""The Triton kernels, forward and backward: in Triton's interpreter on a CPU, compiled on a GPU.

Per tensor in norms: |ours - f64| <= 2 |eager - f64| forward and 3 backward, + 1e-6 |f64|, eager being plain torch in
the same dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ptst.kernels.dispatch import triton, use_triton
from ptst.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probabilities
from ptst.kernels.lora import Projections
from ptst.kernels.lora_layer import lora_qkv
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, reference, tables
from ptst.kernels.swiglu import swiglu
from tests.conftest import ROOT
from tests.kernels import interpreter

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
rms_norm_file = sys.modules["ptst.kernels.rms_norm"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernels are compiled")
def test_one_process_is_enough():
    """The tests' own settings choose the interpreter before anything imports Triton, also without workers (-n 0)."""
    code = "import tests.conftest, ptst.kernels.swiglu as s; print(type(s._backward).__name__)"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "InterpretedFunction", done.stderr


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


@pytest.fixture
def _few_programs(monkeypatch):
    """So that each adds up several tokens of dw."""
    monkeypatch.setattr(rms_norm_file, "PROGRAMS", 4)


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 128), (19, 20), (7, 100)])
def test_rms_norm(shape, dtype):
    inputs = [random(*shape, scale=3), random(shape[1]) + 2]
    compare(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5), inputs, dtype
    )


@pytest.mark.usefixtures("_few_programs")
def test_the_weight_of_a_norm_too_wide_for_one_program(monkeypatch):
    """Columns apart: as many as fill a few programs, and some more; rows of a wider tensor and under a residual."""
    monkeypatch.setattr(rms_norm_file, "WIDEST_DW", 64)
    monkeypatch.setattr(rms_norm_file, "COLUMNS", 32)
    inputs = [random(6, 80, scale=3), random(70) + 2]

    def plain(x, w):
        return torch.nn.functional.rms_norm(x[:, 5:75] + x[:, :70], w.shape, w, 1e-5)

    compare(lambda x, w: add_rms_norm(x[:, 5:75], x[:, :70], w, 1e-5)[0], plain, inputs, torch.float32)
    alone = [random(6, 70), random(70) + 2]
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5),
        alone,
        torch.bfloat16,
    )
    results = []
    wide, weight = torch.randn(6, 90, device=DEVICE), torch.rand(70, device=DEVICE)
    for x in (wide[:, 12:82], wide[:, 12:82].contiguous()):
        results.append(gradients_of_rows(lambda x, w: rms_norm(x, w, 1e-5), [x, weight]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 33), (19, 20)])
def test_add_rms_norm(shape, dtype):
    def plain(x, r, w):
        return torch.nn.functional.rms_norm(x + r, w.shape, w, 1e-5), x + r

    inputs = [random(*shape), random(*shape), random(shape[1]) + 2]
    compare(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_sum_is_that_of_the_sum_as_stored(dtype):
    x, residual = (torch.randn(4, 100, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(100, device=DEVICE).to(dtype)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5))


def gradients_of_rows(function, parts: list[Tensor]) -> list[Tensor]:
    """What a function of rows returns, and its gradients for an upstream gradient that is a view if the rows are."""
    leaves = [x.detach().requires_grad_() for x in parts]
    out = function(*leaves)
    given = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape[1], out.shape[0]).t()
    given = given.contiguous() if parts[0].is_contiguous() else given
    return [out.detach(), *torch.autograd.grad(out, leaves, given)]


@pytest.mark.usefixtures("_few_programs")  # fewer than tokens
@pytest.mark.parametrize("trained", [False, True])
def test_norms_of_rows_of_a_wider_tensor(trained):
    wide, weight = torch.randn(5, 60, device=DEVICE), torch.rand(24, device=DEVICE)
    results = []
    for x in (wide[:, 12:36], wide[:, 12:36].contiguous()):
        parts = [x, weight] if trained else [x]
        results.append(gradients_of_rows(lambda x, w=weight: rms_norm(x, w, 1e-5), parts))
        results[-1] += add_rms_norm(x, wide[:, :24], weight, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_programs_of_a_norms_backward_pass():
    """Every processor has as many warps whatever the width, and the tokens under way fit into its memory."""
    cpu = torch.device("cpu")
    assert [rms_norm_file._programs(H, cpu) // 132 for H in (64, 128, 4096, 5120, 16384)] == [16, 16, 2, 1, 1]
    for H in (64, 128, 4096, 5120, 16384):
        for element_bytes in (4, 6, 8, 12):
            later = rms_norm_file._stages(H, element_bytes) - 1
            assert later * H * element_bytes <= 64 * 1024
            assert later >= (H * element_bytes <= 16 * 1024)


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


def test_swiglu_of_rows_of_two_tensors():
    """Gate and up have strides of their own."""
    parts = torch.randn(5, 60, device=DEVICE)[:, :40], torch.randn(5, 90, device=DEVICE)[:, 50:]
    a, b = (gradients_of_rows(swiglu, p) for p in (parts, [x.contiguous() for x in parts]))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_that_swiglus_backward_pass_writes(dtype):
    """It is the forward pass's, to the bit, and gradients are those without it."""
    gate, up, dh = (torch.randn(3, 1030, device=DEVICE).to(dtype) for _ in range(3))
    dgate, dup, h = torch.ops.ptst.swiglu_backward(dh, gate, up, True)
    without = torch.ops.ptst.swiglu_backward(dh, gate, up, False)
    assert torch.equal(h, swiglu(gate, up))
    assert torch.equal(dgate, without[0])
    assert torch.equal(dup, without[1])
    assert without[2].numel() == 0


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
            lambda: apply_rope(torch.ones(3, 1, 4), torch.ones(3, 1, 4), *[torch.ones(2, 1, 3)] * 2),
            r"the tables \(2, 1, 3\)",
        ),
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
        (
            lambda: linear_cross_entropy(torch.ones(2, 4), torch.ones(5, 4), torch.ones(4).long()[::2], 1.0),
            r"last axis of targets \(2,\)",
        ),
        (
            lambda: linear_log_probabilities(torch.ones(2, 4), torch.ones(5, 4), torch.ones(2), torch.arange(1)),
            r"targets \(2,\) is torch.float32.* must hold integers",
        ),
        (
            lambda: linear_log_probabilities(torch.ones(2, 4), torch.ones(5, 3), torch.ones(2).long(), torch.arange(1)),
            r"head \(5, 3\)",
        ),
        (lambda: rms_norm(torch.ones(1, 16385), torch.ones(16385), 1e-5), r"x \(1, 16385\) is wider than 16384"),
        (
            lambda: lora_qkv(torch.ones(1, 16385), torch.ones(16385), 1e-5, wide_projections()),
            r"x \(1, 16385\) is wider than 16384",
        ),
        (
            lambda: apply_rope(torch.ones(2, 1, 4), torch.ones(2, 1, 4), *[torch.ones(2, 1, 2, device="meta")] * 2),
            r"cos \(2, 1, 2\) is on meta",
        ),
    ],
)
@pytest.mark.parametrize("way", ["triton", "reference"])
def test_mistakes(call, says, way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    with pytest.raises(ValueError, match=says):
        call()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def wide_projections() -> Projections:
    base = [torch.ones(2, 16385)] * 3
    return Projections(base, [(torch.ones(1, 16385), torch.ones(2, 1))] * 3, 1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: torch.ops.ptst.rms_norm(ones(1, 16385), None, ones(16385), 1e-5), "the width is 16385"),
        (lambda: apply_rope(*[ones(1, 1, 2050)] * 2, *[ones(1, 1, 1025)] * 2), "head_dim / 2 is 1025"),
        (lambda: swiglu(*[ones(2, 3).double()] * 2), r"not on \(2, 3\) torch.float64 on"),
    ],
)
def test_what_only_the_kernels_cannot_take(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_tensors_on_a_gpu_that_is_not_the_current_one(monkeypatch):
    def there(index: int) -> Tensor:
        device = torch.device("cuda", index)
        return SimpleNamespace(is_cuda=True, device=device, dtype=torch.float32, shape=(3, 4))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert use_triton(there(0))
    with pytest.raises(ValueError, match=r"\(3, 4\) torch.float32 on cuda:1: the current GPU is cuda:0; .*device\(1\)"):
        use_triton(there(1), there(1))
    monkeypatch.setenv("PTST_KERNELS", "auto")
    double = there(0)
    double.dtype = torch.float64
    assert not use_triton(double)  # plain torch computes it, in full precision


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
