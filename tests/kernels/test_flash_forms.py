"""Flash attention's two ways to load, its edges, and outputs that start as whatever memory held."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels import flash_attention
from ptst.kernels.attention import packed_attention
from ptst.kernels.dispatch import triton
from tests.kernels import interpreter
from tests.kernels.test_flash_attention import bounds, plain
from tests.kernels.test_triton import DEVICE

pytestmark = [
    pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone"),
    pytest.mark.skipif(DEVICE != "cpu", reason="looks into the launches of the interpreter"),
]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    """No output may be what memory held: new memory is NaN."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    interpreter.install()
    monkeypatch.setattr(flash_attention, "FORCED", (32, 16))
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        found = new_empty(self, *size, **options)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def run(leaves, cu_q, cu_k=None, window=None):
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = packed_attention(*leaves, cu_q, cu_seqlens_k=cu_k, window=window)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def inputs(queries, keys, dim=16):
    return [torch.randn(queries, 4, dim), torch.randn(keys, 2, dim), torch.randn(keys, 2, dim)]


@pytest.mark.parametrize("window", [None, 40])
def test_with_and_without_descriptors(window, monkeypatch):
    used = []
    find = flash_attention._descriptors
    monkeypatch.setattr(
        flash_attention, "_descriptors", lambda *x, **k: (used.append(find(*x, **k)[0] is not None), find(*x, **k))[1]
    )
    cu = bounds([75, 3])
    leaves = [x[:, : x.shape[1] // 2] for x in inputs(78, 78)]
    results = []
    for tma in (True, False):
        monkeypatch.setattr(flash_attention, "TMA", tma)
        results.append(run(leaves, cu, window=window))
    assert used == [True] * 3 + [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = plain(cu, cu, window)(*exact_leaves)
    (exact * torch.linspace(-1, 1, exact.numel()).view(exact.shape)).sum().backward()
    for found, wanted in zip(results[0], [exact.detach(), *(x.grad for x in exact_leaves)], strict=True):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_a_descriptor_cannot_hold_is_loaded_by_address():
    """Addresses and strides must be multiples of 16 bytes; a head of 20 in half precision is 40."""
    x = torch.randn(9, 3, 16)
    described = flash_attention._descriptor(x, 16, 16)
    assert (described.shape, described.strides, described.block_shape) == ([9, 3, 16], [48, 16, 1], [16, 1, 16])
    assert flash_attention._descriptor(torch.randn(9, 3, 20).half(), 16, 32) is None
    assert flash_attention._descriptor(torch.randn(9, 3, 18)[..., 1:17], 16, 16) is None
    rows = torch.randn(9, 50)[:, 1:49].unflatten(1, (3, 16))
    assert flash_attention._descriptor(rows, 16, 16) is None
    assert flash_attention._descriptors(x, rows, rows=16, wide=16, tma=True) == (None, None)


def test_infinities_of_one_document_stay_there():
    """0 x inf is NaN: a key of another document must not even be multiplied by zero."""
    cu, results = [0, 18, 58, 63], []
    for value in (1.0, float("inf")):
        q, k, v = inputs(63, 63)
        torch.manual_seed(1)
        for x in (q, k, v):
            x.normal_()
            x[18:58, :, 3] = value
        results.append(run((q, k, v), cu))
    others = [*range(18), *range(58, 63)]
    for finite, infinite in zip(*results, strict=True):
        assert torch.equal(finite[others], infinite[others]) and finite.isfinite().all()


def test_keys_that_no_query_sees_and_documents_without_queries():
    cu_q, cu_k = [0, 0, 5, 5], [0, 40, 70, 75]
    found = run(inputs(5, 75), cu_q, cu_k)
    assert all(x.isfinite().all() for x in found)
    for grad in found[2:]:
        assert (grad[:40] == 0).all() and (grad[70:] == 0).all() and (grad[40:70] != 0).any()
    empty = run(inputs(0, 20), [0, 0], [0, 20])
    assert empty[0].shape == (0, 4, 16) and (empty[2] == 0).all() and (empty[3] == 0).all()
