"""The decoder with an adapter, through the operators: compiled, checkpointed by choice of operator, and sharded.

Each must give the gradients of the plain eager run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ptst.kernels.attention import packed_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.rope import frequencies, tables
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder, Layer
from ptst.model.lora import add_lora
from tests.kernels import interpreter
from tests.model.test_fused import SWITCHES

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=64, sliding_window=None, tie_embeddings=True,
)  # fmt: skip
BOUNDS = [0, 5, 12]


@pytest.fixture(autouse=True, params=["reference", "triton"])
def way(request, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", request.param)
    if DEVICE == "cpu":
        interpreter.install()
    return request.param


def model(switches: str = "none") -> tuple[Decoder, torch.Tensor]:
    """A small decoder, frozen but for its adapters (both factors random), and hidden states to begin with."""
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, **SWITCHES[switches])).requires_grad_(False).to(DEVICE)
    for p in add_lora(decoder, LoraConfig(4, 8.0)).values():
        torch.nn.init.normal_(p, std=0.2)
    return decoder, torch.randn(BOUNDS[-1], CONFIG.hidden_size).to(DEVICE)


def attend(_layer, q, k, v):
    return packed_attention(q, k, v, BOUNDS)


def run(layer: Layer, x_TE: torch.Tensor, call) -> list[torch.Tensor]:
    """The output and the gradients of input and adapters, `call(layer, *inputs)` being the way there."""
    positions = torch.cat([torch.arange(5), torch.arange(7)]).to(DEVICE)
    cos, sin = tables(positions, frequencies(CONFIG.head_dim, CONFIG.rope_theta).to(DEVICE))
    x_TE = x_TE.clone().requires_grad_()
    layer.zero_grad()
    out = call(layer, x_TE, 0, cos, sin, attend)
    out.square().sum().backward()
    return [out.detach(), x_TE.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def assert_same(ours: list[torch.Tensor], eager: list[torch.Tensor]) -> None:
    assert len(ours) == len(eager) == 2 + 14
    for a, b in zip(ours, eager, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-6 * b.norm()


def plain(layer, *inputs):
    return layer(*inputs)


@pytest.mark.parametrize("switches", ["none", "olmo3"])
def test_compiled(switches):
    decoder, x = model(switches)
    layer = decoder.layers[0]
    eager = run(layer, x, plain)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(layer, x, lambda _layer, *inputs: compiled(*inputs)), eager)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing(way):
    """Everything is rebuilt in the backward pass but the operator that the policy keeps."""
    decoder, x = model()
    layer = decoder.layers[0]
    eager = run(layer, x, plain)
    counts = {}
    for kept in ((), (torch.ops.ptst.attention.default,)):
        context = partial(create_selective_checkpoint_contexts, list(kept))
        with _Count() as count:
            again = run(layer, x, lambda f, *i, c=context: checkpoint(f, *i, use_reentrant=False, context_fn=c))
        assert_same(again, eager)
        counts[bool(kept)] = count.calls.count("ptst.attention.default")
    assert counts == ({False: 2, True: 1} if way == "triton" else {False: 0, True: 0})


def _worker(rank: int, ranks: int, file: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if DEVICE == "cpu":
        interpreter.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        decoder, x = model()
        layer = decoder.layers[0]
        eager = run(layer, x, plain)
        fully_shard(layer)
        sharded = run(layer, x, plain)
        assert_same([getattr(t, "full_tensor", lambda t=t: t)() for t in sharded], eager)
        assert any(hasattr(p, "full_tensor") for p in layer.parameters())
        dist.barrier()  # neither goes while the other still listens to it
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two ranks would need two GPUs")
def test_sharded(way, tmp_path):
    environment = {"PTST_KERNELS": way, "TRITON_INTERPRET": "1"}
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store"), environment), nprocs=2)
