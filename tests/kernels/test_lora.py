"""LoRA's group of projections: values and gradients on the plain path and through Triton, base in half precision."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptst.kernels.dispatch import triton
from ptst.kernels.lora import expand, lora_group
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

WAYS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="Triton is for Linux"))]


@pytest.fixture(autouse=True, params=WAYS)
def _way(request, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", request.param)
    if DEVICE == "cpu" and triton is not None:
        interpreter.install()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "I", "outs", "ranks"), [
    (1, 8, (8,), (2,)),
    (33, 40, (24, 16, 16), (3, 3, 3)),
    (70, 130, (200, 65), (16, 16)),
    (5, 16, (8, 8, 12), (4, None, 8)),
    (300, 20, (33,), (5,)),
    (9, 20, (33, 7), (100, 60)),
])  # fmt: skip
def test_group(T, I, outs, ranks, dtype):
    weights = [(random(o, I) / I**0.5).to(dtype) for o in outs]
    inputs, places = [random(T, I)], []
    for o, r in zip(outs, ranks, strict=True):
        places.append(None if r is None else (len(inputs), len(inputs) + 1))
        inputs += [] if r is None else [random(r, I) / I**0.5, random(o, r)]

    def ours(*leaves):
        base = [w.to(DEVICE, leaves[0].dtype) for w in weights]
        return lora_group(leaves[0], base, [p and (leaves[p[0]], leaves[p[1]]) for p in places], 0.5)

    def plain(*leaves):
        x, values = leaves[0], []
        for w, p in zip(weights, places, strict=True):
            y = x @ w.to(DEVICE, x.dtype).t()
            values.append(y if p is None else y + 0.5 * ((x @ leaves[p[0]].t()) @ leaves[p[1]].t()))
        return tuple(values)

    compare(ours, plain, inputs, dtype)


def test_biases():
    """One for each layer or None; they change the outputs and nothing else."""
    x, weights = random(9, 20).to(DEVICE, torch.float32), [random(o, 20).to(DEVICE, torch.float32) for o in (8, 6)]
    a, b = random(3, 20).to(DEVICE, torch.float32), random(8, 3).to(DEVICE, torch.float32)
    bias = random(8).to(DEVICE, torch.float32)
    plain = lora_group(x, weights, [(a, b), None], 0.5)
    biased = lora_group(x, weights, [(a, b), None], 0.5, [bias, None])
    torch.testing.assert_close(biased[0], plain[0] + bias)
    assert torch.equal(biased[1], plain[1])


def test_a_float32_adapter_over_a_bfloat16_base():
    """Gradients come in the adapter's dtype and are those of the float32 computation up to bfloat16's rounding."""
    x, w = torch.randn(40, 32, device=DEVICE), torch.randn(24, 32, device=DEVICE) / 6
    a, b = (torch.randn(*s, device=DEVICE) for s in ((4, 32), (24, 4)))
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        y = lora_group(x.to(dtype), [w.to(dtype)], [tuple(leaves)], 2.0)[0]
        assert y.dtype == dtype
        y.float().square().sum().backward()
        grads.append([t.grad for t in leaves])
    for exact, rounded in zip(*grads, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 2e-2 * exact.norm()


def test_the_adapters_part_is_added_before_rounding():
    """y is rounded twice in all, after the base's product and after the sum, and not a third time."""
    base, z, b = (random(*s).to(DEVICE, torch.bfloat16) for s in ((60, 50), (60, 4), (50, 4)))
    base = base * 8  # so that rounding the sum outweighs all else
    y = base.clone()
    expand(y, z, b, 1.0)
    exact = base.double() + z.double() @ b.double().t()
    once = exact.to(torch.bfloat16)
    assert (y != once).float().mean() <= 0.01
    twice = base + (z.double() @ b.double().t()).to(torch.bfloat16)
    assert (twice != once).float().mean() > 0.05  # what another rounding would do


class _Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen = getattr(self, "seen", []) + [tuple(t.shape) for t in (out,) if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("needed", [False, True])
def test_no_gradient_is_formed_that_nobody_needs(needed):
    x, w = torch.randn(5, 8, device=DEVICE, requires_grad=needed), torch.randn(6, 8, device=DEVICE)
    a, b = torch.randn(2, 8, device=DEVICE, requires_grad=True), torch.randn(6, 2, device=DEVICE, requires_grad=True)
    y = lora_group(x, [w], [(a, b)], 1.0)[0]
    with _Shapes() as shapes:
        y.backward(torch.ones_like(y))
    assert ((5, 8) in shapes.seen) == needed  # dx
    assert w.shape not in shapes.seen  # dW
    assert (a.grad.shape, b.grad.shape) == (a.shape, b.shape)


def test_mistakes():
    x, w = torch.ones(3, 8, device=DEVICE), torch.ones(6, 8, device=DEVICE)
    a, b = torch.ones(2, 8, device=DEVICE), torch.ones(6, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"A \(2, 7\)"):
        lora_group(x, [w], [(a[:, :7], b)], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora_group(x, [w], [(a, b[:5])], 1.0)
    with pytest.raises(ValueError, match=r"weight 1 is torch\.bfloat16"):
        lora_group(x, [w.bfloat16()], [(a, b)], 1.0)
    with pytest.raises(ValueError, match=r"B \(6, 2\) is on meta, x \(3, 8\) on"):
        lora_group(x, [w], [(a, b.to("meta"))], 1.0)
    with pytest.raises(ValueError, match=r"last axis of x \(3, 8\)"):
        lora_group(torch.ones(8, 3, device=DEVICE).t(), [w], [(a, b)], 1.0)
    with pytest.raises(ValueError, match="at least one of them not None"):
        lora_group(x, [w], [None], 1.0)


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
def test_registered_in_full():
    x, z = torch.randn(5, 8, device=DEVICE), torch.randn(5, 2, device=DEVICE)
    torch.library.opcheck(torch.ops.ptst.lora_shrink.default, (x, torch.randn(2, 8, device=DEVICE), 0.5))
    torch.library.opcheck(expand, (x.clone(), z, torch.randn(8, 2, device=DEVICE), 0.5))
    torch.library.opcheck(torch.ops.ptst.lora_weight_gradient.default, (z, x, 0.5, True))
