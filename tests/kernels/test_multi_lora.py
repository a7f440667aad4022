"""Adapters by row, in two launches: against a loop over rows in float64, with ranks of all kinds and base rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptst.kernels import multi_lora
from ptst.kernels.dispatch import triton
from ptst.kernels.multi_lora import Stacked, add_adapters, stack
from tests.kernels import interpreter
from tests.kernels.test_triton import DEVICE, DTYPES

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()


def adapters(ranks: list[int], inputs: int, outputs: int) -> list[tuple[Tensor, Tensor] | None]:
    return [(torch.randn(r, inputs), torch.randn(r, outputs) / inputs**0.5) if r else None for r in ranks]


def rows_alone(y: Tensor, x: Tensor, which: list[int], pairs) -> Tensor:
    """Each row by itself, in the dtype of all."""
    out = y.clone()
    for t, n in enumerate(which):
        if n >= 0 and pairs[n] is not None:
            a_RI, b_RO = (m.to(y.dtype) for m in pairs[n])
            out[t] += (x[t] @ a_RI.t()) @ b_RO
    return out


def check(ranks: list[int], which: list[int], inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pairs = adapters(ranks, inputs, outputs)
    pairs = [pair and tuple(m.to(dtype) for m in pair) for pair in pairs]
    y, x = torch.randn(len(which), outputs).to(dtype), torch.randn(len(which), inputs).to(dtype)
    exact = rows_alone(y.double(), x.double(), which, pairs)
    eager = rows_alone(y, x, which, pairs)
    ours = y.to(DEVICE)
    stacked = stack([pair and tuple(m.to(DEVICE) for m in pair) for pair in pairs])
    add_adapters(ours, x.to(DEVICE), torch.tensor(which, dtype=torch.int32, device=DEVICE), stacked)
    ours = ours.cpu()
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()
    for t, n in enumerate(which):
        if n < 0 or pairs[n] is None:
            assert torch.equal(ours[t], y[t])  # to the bit
        else:
            assert (ours[t] - exact[t]).norm() <= 0.02 * exact[t].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_adapters(dtype):
    """Ranks below, at and above a block's; an adapter that has no matrices here; base rows, alone and between."""
    which = [0, 1, -1, 2, 2, 4, 3, -1, 0, 5, 1, 5, -1, 4, 0, 2, 0, 1, 5, 5]
    check([4, 1, 16, 0, 70, 33], which, 70, 150, dtype)


@pytest.mark.parametrize(("ranks", "which"), [([3], [0]), ([3, 2], [1]), ([2], [-1] * 3), ([5, 2], [0] * 17 + [1])])
def test_few_rows(ranks, which):
    check(ranks, which, 40, 24, torch.float32)


def test_inputs_split_between_programs(monkeypatch):
    """Parts of whole blocks, the last one shorter, or with nothing left to do."""
    monkeypatch.setattr(multi_lora, "LEAST", 32)
    parts = []
    for inputs in (32, 100, 133, 260):
        stacked = stack([tuple(m.to(DEVICE) for m in pair) for pair in adapters([3, 2], inputs, 20)])
        which = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
        z = multi_lora.launch_shrink(torch.randn(3, inputs, device=DEVICE), which, stacked)
        parts.append(len(z))
        check([3, 2], [0, 1, -1, 0, 1, 1], inputs, 20, torch.float32)
    assert parts == [1, 4, 5, 8]


def test_prompts_take_larger_blocks(monkeypatch):
    monkeypatch.setattr(multi_lora, "MANY", 20)
    check([4, 9], [0] * 30 + [-1] * 9 + [1] * 50, 33, 40, torch.bfloat16)


def test_rows_of_wider_tensors():
    stacked = stack(adapters([4, 2], 32, 24))
    y, x = torch.randn(5, 60), torch.randn(5, 90)
    which = torch.tensor([[0, 1, -1, 1, 0], [7] * 5], dtype=torch.int32)
    ours, wanted = y.clone().to(DEVICE), y[:, 10:34].to(DEVICE).contiguous()
    stacked = Stacked(*(t.to(DEVICE) for t in stacked))
    add_adapters(ours[:, 10:34], x.to(DEVICE)[:, 8:40], which[0].to(DEVICE), stacked)
    add_adapters(wanted, x[:, 8:40].to(DEVICE).contiguous(), which[0].to(DEVICE), stacked)
    assert torch.equal(ours[:, 10:34], wanted)
    ours[:, 10:34] = y[:, 10:34].to(DEVICE)
    assert torch.equal(ours.cpu(), y)


def test_no_rows_and_no_adapter():
    assert stack([None, None]) is None
    stacked = Stacked(*(t.to(DEVICE) for t in stack(adapters([2], 8, 6))))
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    add_adapters(torch.zeros(0, 6, device=DEVICE), torch.zeros(0, 8, device=DEVICE), none, stacked)


@pytest.mark.parametrize("way", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"y": torch.ones(3, 7)}, r"y \(3, 7\), x \(3, 8\), which \(3,\), A \(2, 4, 8\) and B \(2, 4, 6\) do not fit"),
        ({"x": torch.ones(2, 8)}, "do not fit"),
        ({"which": torch.zeros(4, dtype=torch.int32)}, r"which \(4,\)"),
        ({"which": torch.zeros(3)}, r"which \(3,\) is torch.float32"),
        ({"which": torch.zeros(3, 2, dtype=torch.int32)[:, 0]}, r"last axis of which \(3,\)"),
        ({"x": torch.ones(3, 8).half()}, "x is torch.float16"),
        ({"y": torch.ones(6, 3).t()}, r"last axis of y \(3, 6\)"),
        ({"a": torch.ones(2, 4, 16)[:, :, :8]}, "must be contiguous"),
        ({"ranks": torch.ones(3, dtype=torch.int32)}, "do not fit"),
    ],
)
def test_mistakes(change, says, way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    given = {
        "y": torch.ones(3, 6), "x": torch.ones(3, 8), "which": torch.zeros(3, dtype=torch.int32),
        "a": torch.ones(2, 4, 8), "b": torch.ones(2, 4, 6), "ranks": torch.ones(2, dtype=torch.int32),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=says):
        add_adapters(given["y"], given["x"], given["which"], Stacked(given["a"], given["b"], given["ranks"]))
