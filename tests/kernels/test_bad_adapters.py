"""An adapter that does not fit its weight is an error in the layer's functions, never a wrong number."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.lora import Projections, lora_group
from ptst.kernels.lora_layer import lora_add, lora_feed_forward, lora_qkv


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 7), torch.zeros(8, 2)),  # too narrow
        (torch.zeros(2, 8), torch.zeros(9, 2)),  # too many outputs
        (torch.zeros(2, 8), torch.zeros(8, 3)),  # another rank
        (torch.zeros(2, 8, device="meta"), torch.zeros(8, 2)),
    ],
    ids=["inputs", "outputs", "rank", "device"],
)
def test_an_adapter_that_does_not_fit(a, b):
    x, w, good = torch.ones(3, 8), torch.ones(8, 8), (torch.zeros(2, 8), torch.zeros(8, 2))
    three = Projections([w, w, w], [good, (a, b), None], 1.0)
    for call in (
        lambda: lora_qkv(x, None, 1e-5, three),
        lambda: lora_feed_forward(x, None, 1e-5, three),
        lambda: lora_add(None, x, Projections([w], [(a, b)], 1.0)),
        lambda: lora_group(x, [w, w], [good, (a, b)], 1.0),
    ):
        with pytest.raises(ValueError, match=r"weight [12] \(8, 8\)"):
            call()


def test_a_residual_is_not_repeated():
    x, layer = torch.ones(3, 8), Projections([torch.ones(8, 8)], [(torch.zeros(2, 8), torch.zeros(8, 2))], 1.0)
    for residual in (torch.ones(8), torch.ones(1, 8), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="residual"):
            lora_add(residual, x, layer)


def test_counters_elsewhere():
    q, k, lengths = torch.ones(2, 1, 16), torch.ones(2, 4, 1, 16), torch.tensor([1, 2])
    for counters in (torch.zeros(4, dtype=torch.int32, device="meta"), torch.zeros(8, dtype=torch.int32)[::2]):
        with pytest.raises(ValueError, match="counters"):
            decode_attention(q, k, k, lengths, counters=counters)


def test_what_gets_no_gradient_is_frozen():
    """A weight, bias or norm that wants a gradient would be left without one in silence."""
    x, w, pair = torch.ones(3, 8), torch.ones(8, 8), (torch.zeros(2, 8), torch.zeros(8, 2))
    trained, bias = torch.ones(8, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    three = Projections([w, w, trained], [pair, None, None], 1.0)
    frozen = Projections([w, w, w], [pair, None, None], 1.0)
    for call, name in (
        (lambda: lora_group(x, [w, trained], [pair, None], 1.0), r"weight 2 \(8, 8\)"),
        (lambda: lora_group(x, [w, w], [pair, None], 1.0, [None, bias]), r"bias 2 \(8,\)"),
        (lambda: lora_qkv(x, None, 1e-5, three), r"weight 3 \(8, 8\)"),
        (lambda: lora_qkv(x, bias, 1e-5, frozen), r"norm \(8,\)"),
        (lambda: lora_feed_forward(x, None, 1e-5, three), r"weight 3 \(8, 8\)"),
        (lambda: lora_add(None, x, Projections([trained], [pair], 1.0)), r"weight 1 \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=name + " requires a gradient"):
            call()
        with torch.no_grad():
            call()


def test_biases_that_do_not_fit():
    x, w, pair = torch.ones(3, 8), torch.ones(6, 8), (torch.zeros(2, 8), torch.zeros(6, 2))
    for bias, message in (
        (torch.ones(7), r"bias 1 \(7,\) does not fit weight 1 \(6, 8\)"),
        (torch.ones(1), r"bias 1 \(1,\)"),  # addmm would repeat it
        (torch.ones(3, 6), r"bias 1 \(3, 6\)"),  # addmm would take it as one for each token
        (torch.ones(6).double(), "bias 1 is torch.float64"),
        (torch.ones(6, device="meta"), "bias 1 is torch.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_group(x, [w], [pair], 1.0, [bias])
    with pytest.raises(ValueError, match="1 weights, 1 adapters and 2 biases"):
        lora_group(x, [w], [pair], 1.0, [None, torch.ones(6)])
    with pytest.raises(ValueError, match=r"bias 1 \(6,\) would not be added"):
        lora_add(None, x, Projections([w], [pair], 1.0, biases=[torch.ones(6)]))


def test_weights_that_do_not_fit():
    x, w, pair = torch.ones(3, 8), torch.ones(8, 8), (torch.zeros(2, 8), torch.zeros(8, 2))
    for wrong in (torch.ones(8, 7), torch.ones(8), torch.ones(7, 8)):
        layers = Projections([w, wrong, w], [pair, None, None], 1.0)
        with pytest.raises(ValueError, match=r"weight 2 \(.*\) does not fit x \(3, 8\)"):
            lora_feed_forward(x, None, 1e-5, layers)
    for call in (
        lambda: lora_qkv(x, None, 1e-5, Projections([w, w], [pair, None], 1.0)),
        lambda: lora_feed_forward(x, None, 1e-5, Projections([w], [pair], 1.0)),
        lambda: lora_add(None, x, Projections([w, w], [pair, None], 1.0)),
    ):
        with pytest.raises(ValueError, match=r"weights, \d adapters and \d biases are given"):
            call()
    for wrong in (torch.ones(8), torch.ones(2, 3, 8)):
        with pytest.raises(ValueError, match=r"does not fit x \(.*8.*\), which must be \(T, I\)"):
            lora_group(wrong, [w], [pair], 1.0)
