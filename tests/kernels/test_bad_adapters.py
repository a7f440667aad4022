"""An adapter that does not fit its weight is an error in the layer's functions, never a wrong number."""

from __future__ import annotations

import pytest
import torch

from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.lora import Projections
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
