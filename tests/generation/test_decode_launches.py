"""Launches of a decode step, counted in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ptst.generation.cuda_graphs import _GraphAttention
from ptst.generation.forward import Forward
from ptst.generation.kv_cache import KVCache
from ptst.kernels.dispatch import triton
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from tests.kernels import interpreter
from tests.tiny import CONFIG


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_five_launches_a_layer_besides_products(monkeypatch):
    """Two norms, of which one begins the next layer, rotation and store, attention, SwiGLU."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setenv("PTST_KERNELS", "triton")
    interpreter.install()
    launches: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counted(self, *args, **named):
        launches[self.fn.__name__] += 1
        return launch(self, *args, **named)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    found = []
    for layers in (1, 2):
        config = replace(DecoderConfig.from_dict(CONFIG), num_layers=layers)
        forward = Forward(Decoder(config), None)
        cache = KVCache(config, 9, torch.float32, torch.device("cpu"))
        launches.clear()
        positions = torch.tensor([5, 40], dtype=torch.int32)
        table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
        with torch.inference_mode():
            forward(torch.tensor([3, 4]), positions, _GraphAttention(cache, forward, positions, table))
        found.append(launches.copy())
    assert sum((found[1] - found[0]).values()) == 5, found[1] - found[0]
