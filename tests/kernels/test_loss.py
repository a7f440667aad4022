"""The loss through Triton's kernel, forward and backward: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ptst.kernels.dispatch import triton
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES, compare, random

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
loss_file = sys.modules["ptst.kernels.linear_cross_entropy"]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()


def plain_cross_entropy(targets, weights, divisor):
    def plain(h, e):
        rows = targets >= 0
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.nn.functional.cross_entropy((h[rows] @ e.t()).to(wide), targets[rows], reduction="none")
        return (losses * weights[rows].to(wide)).sum() / divisor

    return plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "V", "share"), [(1, 8, 5, 1.0), (7, 16, 100, 1.0), (5, 8, 4097, 0.5)])
def test_linear_cross_entropy(T, H, V, share, dtype, monkeypatch):
    """The head frozen and trained, weighted and not, in one chunk and in several."""
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[torch.rand(T, device=DEVICE) > share] = -1
    targets[0] = V - 1
    inputs = [random(T, H, scale=2), random(V, H)]
    for weights, chunk in ((torch.ones(T, device=DEVICE), 1 << 24), (torch.rand(T, device=DEVICE) + 0.5, 2 * V)):
        monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS", chunk)
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
        monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS", chunk)
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


@pytest.mark.parametrize("place", [0, 4096, 8191])
def test_the_largest_logit_may_lie_in_any_block(place):
    """exp of it alone overflows, so that the maximum of an earlier block would not do."""
    head = torch.zeros(8192, 4, device=DEVICE)
    head[place] = 500.0
    h = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(h, head, torch.tensor([place, (place + 1) % 8192], device=DEVICE), 1.0)
    loss.backward()
    assert loss == 2000.0
    assert torch.equal(h.grad, torch.tensor([[0.0] * 4, [500.0] * 4], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_divisor_is_exact(dtype):
    """The inverse of the divisor is no number of the dtype: gradients have it all the same."""
    targets, divisor = torch.randint(0, 50, (40,), device=DEVICE), 3001.0
    grads = []
    for given in (dtype, torch.float64):
        h, e = (torch.randn(*s, generator=torch.Generator().manual_seed(5)).to(dtype) for s in ((40, 8), (50, 8)))
        leaves = [x.to(DEVICE, given).requires_grad_() for x in (h, e)]
        plain = plain_cross_entropy(targets, torch.ones(40, device=DEVICE), divisor)
        way = plain if given == torch.float64 else partial(linear_cross_entropy, targets_T=targets, divisor=divisor)
        grads.append([g.double() for g in torch.autograd.grad(way(*leaves), leaves)])
    for ours, exact in zip(*grads, strict=True):
        factor = (ours * exact).sum() / exact.square().sum()  # 1 / 3001 in bfloat16 is 0.14 % off, in all gradients
        assert abs(factor - 1) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}[dtype]


def test_the_indices_of_trained_tokens_are_taken_as_given():
    """They are not counted anew, for which the host would wait."""
    h, head, targets = (
        torch.randn(4, 8, device=DEVICE),
        torch.randn(9, 8, device=DEVICE),
        torch.arange(4, device=DEVICE),
    )
    some = linear_cross_entropy(h, head, targets, 1.0, trained_N=torch.tensor([1, 3], device=DEVICE))
    torch.testing.assert_close(some, linear_cross_entropy(h[1::2], head, targets[1::2].contiguous(), 1.0))


def test_a_chunk_on_a_gpu_is_a_multiple_of_1024_rows():
    def rows(vocabulary: int, size: int) -> int:
        hidden = SimpleNamespace(is_cuda=True, element_size=lambda: size)
        return loss_file._chunk(hidden, SimpleNamespace(shape=(vocabulary, 8)))

    assert [rows(V, 2) for V in (128256, 151936, 32000, 49152)] == [1024, 1024, 4096, 2048]
    assert rows(32000, 4) == 2048


def test_the_heads_gradient_is_added_by_the_product_where_torch_can(monkeypatch):
    """torch.addmm with a float32 sum and half-precision factors is CUDA's alone: here a stand-in, that a wrong torch's
    are told from a right one's."""
    file, a = loss_file, torch.full((16, 16), 1 / 3)
    probe = file._adds_in_float32.__wrapped__

    def right(total, a, b, out_dtype, out):
        return out.copy_(total + (a.float() @ b.float()).to(out_dtype))

    def rounded(total, a, b, out_dtype, out):
        return out.copy_(total + (a @ b).to(out_dtype))

    def forgets(total, a, b, out_dtype, out):
        return out.copy_(a.float() @ b.float())

    for stand_in, said in ((right, True), (rounded, False), (forgets, False)):
        monkeypatch.setattr(torch, "addmm", stand_in)
        assert probe(torch.device("cpu"), torch.bfloat16) is said
    monkeypatch.undo()
    if DEVICE == "cpu":
        assert probe(torch.device("cpu"), torch.bfloat16) is False
    total = torch.ones(16, 16, device=DEVICE)
    file._add_product(total, a.to(DEVICE, torch.bfloat16), a.to(DEVICE, torch.bfloat16))
    torch.testing.assert_close(total, torch.full_like(total, 1 + 16 / 9), atol=2e-2, rtol=0)
