"""Norms of queries and keys within the step's attention, in Triton's interpreter, against the forward pass's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptst.generation.forward import Forward
from ptst.generation.kv_cache import KVCache
from ptst.generation.paged_attention import StepAttention
from ptst.kernels.dispatch import triton
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder, RMSNorm
from tests.kernels import interpreter
from tests.tiny import CONFIG, FAMILIES


def hidden_states(decoder: Decoder) -> tuple[torch.Tensor, bool]:
    """Of a step that decodes one request and reads another's prompt; whether attention normalized queries and keys."""
    config, device = decoder.config, torch.device("cpu")
    forward, cache = Forward(decoder, None), KVCache(decoder.config, 5, torch.float32, device)
    # As on a GPU, to the cache and to the forward pass.
    cache.on_gpu, forward.numba = True, False
    tables = [cache.allocate(n) for n in (3, 6)]
    for table, n in zip(tables, (3, 6), strict=True):
        assert table is not None
        cache.extend(table, n)
    attend = StepAttention(cache, [(tables[0], 3)], [(tables[1], 0, 6)], config, forward.head_norms)
    positions = torch.tensor([2, *range(6)])
    with torch.inference_mode():
        return forward(positions + 40, positions, attend), attend.normalizes


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("family", "by_attention"), [("plain", False), ("qwen3", True), ("olmo2", False)])
def test_queries_and_keys_are_normalized_once(family, by_attention, monkeypatch):
    config = replace(
        DecoderConfig.from_dict({**CONFIG, **({} if family == "plain" else FAMILIES[family])}), rms_norm_eps=1e-2
    )
    decoder = Decoder(config).requires_grad_(False)
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.weight.uniform_(0.5, 1.5)
    monkeypatch.setenv("PTST_KERNELS", "reference")
    wanted, _ = hidden_states(decoder)
    monkeypatch.setenv("PTST_KERNELS", "triton")
    interpreter.install()
    found, normalizes = hidden_states(decoder)
    assert normalizes == by_attention
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
