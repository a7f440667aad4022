"""Launches of a decode step, counted in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.lora_passes import FREE, PRODUCTS
from ptst.generation.cuda_graphs import _GraphAttention
from ptst.generation.forward import Forward
from ptst.generation.kv_cache import KVCache
from ptst.kernels.dispatch import triton
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from tests.kernels import interpreter
from tests.tiny import CONFIG, FAMILIES


class _Torch(TorchDispatchMode):
    """Counts torch's own launches but products."""

    def __init__(self, launches: Counter[str]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in (*FREE, *PRODUCTS):
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("family", "number"), [("plain", 5), ("qwen3", 5)])
def test_launches_of_a_layer_besides_products(family, number, monkeypatch):
    """Two norms, of which one begins the next layer; rotation and store, with the norms of queries and keys where a
    model has them by head; attention; SwiGLU."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setenv("PTST_KERNELS", "triton")
    interpreter.install()
    launches: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counted(self, *args, **named):
        launches[self.fn.__name__] += 1
        with _disable_current_modes():
            return launch(self, *args, **named)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    found = []
    R = 8  # a CPU's product has a way of its own for fewer
    positions = torch.arange(R, dtype=torch.int32) + 30
    table = torch.arange(2 * R, dtype=torch.int32).view(R, 2) + 1
    for layers in (1, 2):
        changes = {} if family == "plain" else FAMILIES[family]
        config = replace(DecoderConfig.from_dict({**CONFIG, **changes}), num_layers=layers)
        forward = Forward(Decoder(config), None)
        cache = KVCache(config, 2 * R + 1, torch.float32, torch.device("cpu"))
        cache.on_gpu = True
        launches.clear()
        with torch.no_grad():  # not in inference mode, where operations of several launches count as one
            attend = _GraphAttention(cache, forward, positions, table)
            with _Torch(launches):
                forward(torch.arange(R), positions, attend)
        found.append(launches.copy())
    assert sum((found[1] - found[0]).values()) == number, found[1] - found[0]
