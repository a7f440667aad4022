"""Arguments that do not fit are an error that names them with their shapes, or a right number; never a wrong one."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels import flash_attention
from ptst.kernels.attention import packed_attention
from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.dispatch import MOST_ROWS, launchable
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.kernels.lora import Projections
from ptst.kernels.lora_layer import Dropout, lora_add, lora_qkv
from ptst.kernels.multi_lora import Stacked, add_adapters
from ptst.kernels.rope import apply_rope
from ptst.kernels.rope_store import rotate_and_store


def of(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=grad)


LENGTHS, SLOTS, TARGETS = torch.tensor([1, 2]), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 4])
STACKED = Stacked(of(1, 2, 8), of(1, 2, 6), torch.tensor([2], dtype=torch.int32))
WHICH = torch.zeros(3, dtype=torch.int32)
COS = of(3, 1, 4)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: packed_attention(of(3, 0, 8), of(3, 1, 8), of(3, 1, 8), [0, 3]), r"queries \(3, 0, 8\)"),
        (lambda: packed_attention(of(3, 2, 0), of(3, 1, 0), of(3, 1, 0), [0, 3]), "no heads or no head_dim"),
        (
            lambda: packed_attention(of(3, 2, 8), of(3, 1, 8), of(3, 1, 8), torch.tensor([0, 3])),
            r"boundaries \(2,\) are a tensor",
        ),
        (
            lambda: packed_attention(*[torch.ones(3, 1, 8, dtype=torch.int64)] * 3, [0, 3]),
            "q .* is torch.int64; it must hold real numbers",
        ),
        (lambda: decode_attention(of(2, 0, 16), *[of(2, 4, 1, 16)] * 2, LENGTHS), r"queries \(2, 0, 16\)"),
        (lambda: decode_attention(of(2, 1, 16), *[of(2, 0, 1, 16)] * 2, LENGTHS), r"keys \(2, 0, 1, 16\)"),
        (lambda: decode_attention(of(2, 1, 16, grad=True), *[of(2, 4, 1, 16)] * 2, LENGTHS), r"q \(2, 1, 16\) req"),
        (lambda: linear_cross_entropy(of(3, 8), of(4, 8), TARGETS, 3.0), "are 0 to 4; the head has 4 rows"),
        (lambda: linear_cross_entropy(of(3, 8), of(5, 8), TARGETS, float("inf")), "the divisor is inf"),
        (lambda: linear_cross_entropy(of(3, 8), of(0, 8), TARGETS, 3.0), r"head \(0, 8\)"),
        (lambda: linear_cross_entropy(of(3, 8), of(5, 8), TARGETS, 3.0, of(3, grad=True)), r"weights \(3,\) requires"),
        (lambda: apply_rope(of(3, 2, 8), of(3, 1, 8), of(3, 1, 4, grad=True), COS), r"cos \(3, 1, 4\) requires"),
        (lambda: rotate_and_store(of(3, 4, 8), COS, COS, SLOTS, *[of(1, 1, 0, 8)] * 2), r"\(1, 1, 0, 8\)"),
        (lambda: rotate_and_store(of(3, 4, 8, grad=True), COS, COS, SLOTS, *[of(1, 1, 4, 8)] * 2), "qkv .* requires"),
        (lambda: add_adapters(of(1, 6).expand(3, 6), of(3, 8), WHICH, STACKED), r"rows of y \(3, 6\) overlap"),
        (lambda: add_adapters(of(3, 6), of(3, 8, grad=True), WHICH, STACKED), r"x \(3, 8\) requires"),
        (lambda: Dropout(0.5, (1,), (1, 3)), "must begin at 0 and never fall"),
        (lambda: Dropout(0.5, (1, 2), (0, 3, 2)), "must begin at 0 and never fall"),
    ],
)
def test_what_does_not_fit_is_named(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_every_token_has_its_mask():
    """Tokens behind the last document would be left out of the output, or get the mask of none."""
    layer = Projections([of(8, 8)], [(of(2, 8), of(8, 2))], 1.0)
    three = Projections([of(8, 8)] * 3, [(of(2, 8), of(8, 2)), None, None], 1.0)
    short = Dropout(0.5, (1,), (0, 2))
    for call in (lambda: lora_add(None, of(3, 8), layer, short), lambda: lora_qkv(of(3, 8), None, 1e-5, three, short)):
        with pytest.raises(ValueError, match=r"documents of dropout end at 2, x \(3, 8\)"):
            call()


@pytest.mark.parametrize("length", [0, 4, 5])
def test_a_length_beyond_what_is_read_is_no_number(length):
    q, k = torch.randn(2, 1, 16), torch.randn(2, 4, 1, 16)
    out = decode_attention(q, k, k, torch.tensor([2, length]), longest=3)
    assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1, 2 * MOST_ROWS + 5])
def test_a_long_table_is_launched_in_parts(rows):
    """A grid's second axis ends at 65,535 programs; each part begins where 16 bytes do."""
    table = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    parts = launchable(table)
    assert torch.equal(torch.cat(list(parts)), table) and max(map(len, parts)) <= MOST_ROWS
    assert all(part.storage_offset() * 4 % 16 == 0 for part in parts)


def test_attention_is_the_same_in_parts(monkeypatch):
    """Blocks that do not fit into one launch, forward and backward."""
    monkeypatch.setenv("PTST_KERNELS", "triton")
    q, k, v = (torch.randn(100, heads, 16, requires_grad=True) for heads in (2, 1, 1))

    def run() -> list[torch.Tensor]:
        out = packed_attention(q, k, v, [0, 30, 65, 100])
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    whole = run()
    monkeypatch.setattr(flash_attention, "launchable", lambda table: table.split(1))
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


def test_tma_describes_no_repeated_tokens():
    """A descriptor's strides are above 0; expanded keys are read without one."""
    assert flash_attention._descriptor(torch.ones(1, 1, 16).expand(8, 1, 16), 8, 16) is None
