"""What only a GPU does in the engine: copies that nobody waits for, captured decode steps, sampling without
sorting. Skipped without one; the rest of the engine is tested on a CPU, a stand-in for the graphs included."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptst.generation.engine import Engine
from ptst.generation.kv_cache import plan_blocks
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.sampling import sample, top_log_probabilities
from ptst.generation.transfer import HostCopy
from ptst.kernels.transfer import to_device
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, save_adapter
from ptst.model.weights import load_decoder
from ptst.system_memory import free_memory
from tests.generation.test_engine import CLOSE, STOPS, divergences, prompts
from tests.gpu import DEVICE, needs_cuda, needs_gpu
from tests.tiny import FAMILIES, write_tiny_model

KINDS: dict[str, dict] = {
    "plain": {},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 21},
    **FAMILIES,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_tiny_model(tmp_path_factory.mktemp(kind), **changes) for kind, changes in KINDS.items()}


def answers(decoder, requests, graphs: bool = True, **named) -> tuple[dict, Engine]:
    done: dict = {}
    engine = Engine(decoder, STOPS, EngineOptions(batch_size=8, max_length=400, max_prefill_tokens=40), **named)
    if not graphs:
        engine._runner.graphs = None
    engine.run(requests, done.__setitem__)
    return {i: c.token_ids for i, c in done.items()}, engine


def same(decoder, requests, a: dict, b: dict) -> None:
    """Equal greedy answers, but for choices between logits closer than CLOSE; `decoder` is on the CPU."""
    asked, ids = [r.prompt for r in requests], [r.id for r in requests]
    found = divergences(decoder, asked, [a[i] for i in ids], [b[i] for i in ids], STOPS)
    assert all(d.gap <= CLOSE for d in found), found


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_answers_of_single_launches_and_of_a_cpu(folders, kind):
    """In float32. Requests end at different lengths, so that steps of many sizes are captured."""
    on_cpu, on_gpu = (load_decoder(folders[kind], device=device) for device in ("cpu", DEVICE))
    requests = [Request(p, Sampling(6 + i % 9), i) for i, p in enumerate(prompts(20))]
    wanted, _ = answers(on_cpu, requests)
    with_graphs, engine = answers(on_gpu, requests)
    without, _ = answers(on_gpu, requests, graphs=False)
    same(on_cpu, requests, wanted, with_graphs)
    same(on_cpu, requests, with_graphs, without)
    if DEVICE == "cuda":
        assert len(engine._runner.graphs._captured) >= 2


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_replay_the_step(folders, dtype):
    """Logits of a captured step are those of the same step launched, to the bit, with other inputs every time."""
    decoder = load_decoder(folders["window"], dtype, DEVICE)
    engine = Engine(decoder, STOPS, EngineOptions(batch_size=8, max_length=200))
    graphs = engine._runner.graphs
    with torch.inference_mode():
        for step, rows in itertools.product(range(3), (1, 2, 3, 7, 8)):
            engine.cache.data.normal_()
            graphs.newest_tokens.random_(3, 290)
            blocks = [[1 + r] for r in range(rows)]
            logits = graphs.logits(range(rows), [(5 * step + r) % 30 for r in range(rows)], blocks, [None] * rows)
            replayed = logits.clone()
            (captured,) = [
                c for (size, _), c in graphs._captured.items() if c.logits_RV.data_ptr() == logits.data_ptr()
            ]
            assert torch.equal(replayed, graphs._step(captured.inputs, None)[:rows])


@needs_gpu
def test_an_adapter_in_a_graph(folders, tmp_path):
    from ptst.generation.multi_lora import read_adapter

    decoder = load_decoder(folders["plain"])
    for p in add_lora(decoder, LoraConfig(4, 8.0)).values():
        torch.nn.init.normal_(p, std=0.2)
    save_adapter(decoder, tmp_path, LoraConfig(4, 8.0), "base")
    results = []
    for device in ("cpu", DEVICE):
        base = load_decoder(folders["plain"], device=device)
        adapters = {"a": read_adapter(base, tmp_path)}
        requests = [Request(p, Sampling(8), i, adapter=(None, "a")[i % 2]) for i, p in enumerate(prompts(12))]
        alone = [Request(p, Sampling(8), i, adapter="a") for i, p in enumerate(prompts(12))]
        results.append([answers(base, r, adapters=adapters)[0] for r in (requests, alone)])
    assert results[0] == results[1]  # random weights of this size: no two logits are close


@needs_gpu
def test_sampling_gives_a_cpus_tokens():
    """Also where the tokens that top-p keeps are more than those that a CPU sorts first."""
    logits = torch.randn(6, 5000) * 0.1
    samplings = [Sampling(temperature=1.0, top_p=p, top_k=k) for p, k in ((0.9, 0), (0.5, 0), (1.0, 700), (0.3, 50))]
    samplings += [Sampling(), Sampling(temperature=0.7)]
    for uniforms in torch.rand(20, 6).tolist():
        ours = sample(logits.to(DEVICE), samplings, uniforms)
        assert ours.tolist() == sample(logits, samplings, uniforms).tolist()
    ids, logprobs = top_log_probabilities(logits.to(DEVICE), 5)
    wanted = top_log_probabilities(logits, 5)
    assert torch.equal(ids.cpu(), wanted[0])
    torch.testing.assert_close(logprobs.cpu(), wanted[1])


@needs_cuda
def test_a_copy_to_the_host_is_read_once_it_has_arrived():
    for value in range(5):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        copy = HostCopy(torch.full((1 << 16,), value, device=DEVICE))
        assert copy.wait().eq(value).all()


@needs_cuda
def test_a_decode_step_waits_for_nothing(folders):
    """Ten steps of a batch that reads no prompt, under torch's watch over synchronization."""
    engine = Engine(load_decoder(folders["plain"], device=DEVICE), [], EngineOptions(batch_size=4, max_length=400))
    for i, prompt in enumerate(prompts(4)):
        engine.add(Request(prompt, Sampling(40), i))
    for _ in range(8):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_memory_and_copies(folders):
    device = torch.device(DEVICE)
    assert free_memory(device) > 1 << 20
    assert to_device([3, 1], device, torch.int32).tolist() == [3, 1]
    config = load_decoder(folders["plain"]).config
    assert plan_blocks(config, torch.bfloat16, device, 8, 400, None) >= 8
