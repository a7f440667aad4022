"""Launches and passes of a LoRA layer's training step, counted (benchmarks/lora_passes.py) at an eighth of Llama-2-7B's
widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptst.kernels.dispatch import triton

pytestmark = pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="counts in Triton's interpreter")
MOST_LAUNCHES, LEAST_SAVED = 24, 0.4


@pytest.mark.parametrize("documents", [0, 5])
def test_launches_and_bytes(documents):
    from benchmarks.lora_passes import LLAMA_2_7B, count

    config = replace(LLAMA_2_7B, hidden_size=512, intermediate_size=1376, num_heads=4, num_kv_heads=4)
    before, after = (count(config, 1024, 2, folded, documents) for folded in (False, True))
    launched = [sum((c.launches for c in way), start=type(way[0].launches)()) for way in (before, after)]
    if not documents:
        assert sum(n for name, n in launched[0].items() if "." in name) == 47  # of Triton
    else:  # a mask for each document at each of four places, in each direction
        assert launched[0]["bernoulli_"] == 8 * documents
    assert launched[1].total() <= MOST_LAUNCHES
    assert [c.products for c in after] == [4, 4]
    old, new = (sum(c.total for c in way) for way in (before, after))
    assert new <= (1 - LEAST_SAVED) * old
    # By hand, of the layer that is folded: units of T E elements of bfloat16.
    unit, F = 1024 * 512 * 2, 1376 / 512
    forward = 2 + 4 + 4 + 2 + 3 * F + 3  # norm, rope, o, norm, SwiGLU, the residual under the last product
    backward = 5 * F + 1 + 1 + 4 + 2 + 2 + 4 + 3 + 1 + 4  # SwiGLU, dB, dA, norm; o; rope; dB, dA, norm
    assert abs(new / unit - forward - backward) < 0.05 * (forward + backward)  # and what has ranks for columns
