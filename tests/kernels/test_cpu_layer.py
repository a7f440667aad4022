"""RMSNorm with its residual sum and SwiGLU, row by row, beside torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm, silu

from ptst.kernels import cpu_layer
from ptst.kernels.cpu import run_in_threads, use_numba

pytestmark = pytest.mark.skipif(not use_numba(torch.empty(0)), reason="Numba is not installed")


@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 577)])
def test_add_rms_norm(shape):
    x, total, w = torch.randn(shape) * 3, torch.randn(shape), torch.randn(shape[1])
    wanted = x + total
    exact = rms_norm(wanted.double(), w.shape, w.double(), 1e-5)
    eager = rms_norm(wanted, w.shape, w, 1e-5)
    cpu_layer.add_rms_norm(x.numpy(), total.numpy(), w.numpy(), np.float32(1e-5))
    assert torch.equal(total, wanted)
    assert (x.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 577)])
def test_norm_add(shape):
    x, total, w = torch.randn(shape) * 3, torch.randn(shape), torch.randn(shape[1])
    exact = total + rms_norm(x.double(), w.shape, w.double(), 1e-5)
    eager = total + rms_norm(x, w.shape, w, 1e-5)
    cpu_layer.norm_add(x.numpy(), total.numpy(), w.numpy(), np.float32(1e-5))
    assert torch.equal(total, x)
    assert (x.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(("parts", "size"), [(1, 5), (4, 64), (3, 33)])
def test_norm_parts(parts, size):
    """Of each part by itself, within the columns that were given and nowhere else."""
    row, w = torch.randn(6, parts * size + 7) * 3, torch.randn(size)
    x, before = row[:, 2 : 2 + parts * size], row.clone()
    each = x.unflatten(1, (parts, size))
    exact = rms_norm(each.double(), w.shape, w.double(), 1e-5).flatten(1)
    eager = rms_norm(each, w.shape, w, 1e-5).flatten(1)
    cpu_layer.norm_parts(x.numpy(), w.numpy(), np.float32(1e-5))
    assert (x.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()
    assert torch.equal(row[:, :2], before[:, :2]) and torch.equal(row[:, 2 + parts * size :], before[:, -5:])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (2, 577)])
def test_swiglu(shape, threads, monkeypatch):
    monkeypatch.setattr(cpu_layer, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gate, up = torch.randn(shape) * 10, torch.randn(shape)
    exact, eager = silu(gate.double()) * up, silu(gate) * up
    ours = torch.full(shape, 9.0)
    cpu_layer.swiglu(torch.cat((gate, up), 1).numpy(), ours.numpy())
    assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


def test_large_and_missing_numbers():
    gate = torch.tensor([[-200.0, -88.0, 200.0, 0.0, float("nan"), float("inf")]])
    ours = torch.empty(1, 6)
    cpu_layer.swiglu(torch.cat((gate, torch.ones_like(gate)), 1).numpy(), ours.numpy())
    torch.testing.assert_close(ours[0, :4], torch.tensor([0.0, 0.0, 200.0, 0.0]), atol=1e-30, rtol=0)
    assert ours[0, 4].isnan() and ours[0, 5] == float("inf")
    x = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    cpu_layer.add_rms_norm(x.numpy(), np.zeros((2, 2), np.float32), np.ones(2, np.float32), np.float32(0))
    assert x[0].isnan().all() and x[1].isfinite().all()


def test_an_exception_in_a_thread_is_raised():
    """Otherwise half of an answer would be what the memory held before."""

    def work(done: list, start: int, end: int) -> None:
        if start == 4:
            raise ValueError("in a thread")
        done.append(start)

    done: list[int] = []
    with pytest.raises(ValueError, match="in a thread"):
        run_in_threads(work, (done,), [0, 4, 8, 12])
    assert sorted(done) == [0, 8]
