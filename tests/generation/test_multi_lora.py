"""Adapters by request: each answer is that of its own adapter alone, attached, merged or named."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks.divergence import divergences
from ptst.generation.cuda_graphs import DecodeGraphs, Several
from ptst.generation.engine import Engine, generate
from ptst.generation.forward import Forward
from ptst.generation.multi_lora import StackedLora, attached_adapter, read_adapter
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.score import token_log_probabilities
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, load_adapter, merge_lora, save_adapter
from ptst.model.weights import load_decoder
from tests.generation.test_engine import _Replayed as Replayed
from tests.tiny import write_tiny_model

PROMPTS = [[*range(10, 60), 7 + i, *range(3, 3 + i)] for i in range(9)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Three adapters, of other ranks and places; each changes the answers."""
    made = {}
    for seed, (name, config) in enumerate({
        "all": LoraConfig(4, 8.0),
        "few": LoraConfig(2, 2.0, ("q_proj", "v_proj", "up_proj")),
        "root": LoraConfig(3, 6.0, ("k_proj", "o_proj", "down_proj"), rslora=True),
    }.items()):  # fmt: skip
        decoder = load_decoder(base)
        for p in add_lora(decoder, config, seed).values():
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))
        made[name] = tmp_path_factory.mktemp(name)
        save_adapter(decoder, made[name], config, "tiny")
    return made


def same(decoder, a: list[list[int]], b: list[list[int]]) -> None:
    assert all(d.gap <= 1e-3 for d in divergences(decoder, PROMPTS, a, b, {2}))


def test_each_answer_is_its_own_adapters(base, folders):
    decoder = load_decoder(base)
    before = {n: p.clone() for n, p in decoder.named_parameters()}
    adapters = {name: read_adapter(decoder, folder) for name, folder in folders.items()}
    engine = Engine(decoder, {2}, EngineOptions(batch_size=5, max_length=200, max_prefill_tokens=40), adapters=adapters)
    done: dict = {}
    # All of them together, with the base, in one batch.
    requests = [Request(p, Sampling(8), (name, i), name) for i, p in enumerate(PROMPTS) for name in (*adapters, None)]
    engine.run(requests, done.__setitem__)
    wanted = {}
    for name in (*adapters, None):
        attached = load_decoder(base)
        if name:
            load_adapter(attached, folders[name])
        ours = [done[name, i].token_ids for i in range(len(PROMPTS))]
        wanted[name] = [c.token_ids for c in generate(attached, PROMPTS, {2}, Sampling(8))]
        same(attached, ours, wanted[name])
        if name:
            merged = copy.deepcopy(attached)
            merge_lora(merged)
            same(attached, wanted[name], [c.token_ids for c in generate(merged, PROMPTS, {2}, Sampling(8))])
            single, one = {}, Engine(decoder, {2}, EngineOptions(max_length=200), adapters={"": adapters[name]})
            one.run([Request(p, Sampling(8), i, "") for i, p in enumerate(PROMPTS)], single.__setitem__)
            same(attached, wanted[name], [single[i].token_ids for i in range(len(PROMPTS))])
            rows = [([*p, 5, 9, 4], [False] * len(p) + [True] * 3) for p in PROMPTS]
            ours = token_log_probabilities(decoder, rows, adapters[name])
            theirs = token_log_probabilities(attached, rows)
            assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 1e-4
    assert len({str(w) for w in wanted.values()}) == 4  # they do differ
    # A prefix is cached once for each adapter: its keys differ.
    assert len({s.adapter for s in engine.cache.prefixes}) == 4
    assert all(torch.equal(p, before[n]) for n, p in decoder.named_parameters())


@pytest.mark.parametrize("graphs", [False, True])
def test_adapters_by_row_give_the_same_answers(base, folders, graphs, monkeypatch):
    """A GPU's way, on a CPU: a step's rows are given the number of their adapter, in a replayed step too."""
    decoder = load_decoder(base)
    adapters = {name: read_adapter(decoder, folder) for name, folder in folders.items()}
    requests = [Request(p, Sampling(7), (name, i), name) for i, p in enumerate(PROMPTS) for name in (*adapters, None)]
    options = EngineOptions(batch_size=5, max_length=200, max_prefill_tokens=40)
    wanted: dict = {}
    Engine(decoder, {2}, options, adapters=adapters).run(requests, wanted.__setitem__)
    monkeypatch.setenv("PTST_KERNELS", "reference")
    engine, done, kinds = Engine(decoder, {2}, options, adapters=adapters), {}, set()
    engine._lag, engine.cache.on_gpu = 1, True
    engine.forward.stacked = StackedLora(engine.forward.adapters)

    def capture(self: DecodeGraphs, size: int, adapter) -> Replayed:
        kinds.add(adapter)
        return self._captured.setdefault((size, adapter), Replayed(self, size, adapter))

    if graphs:
        monkeypatch.setattr(DecodeGraphs, "_capture", capture)
        engine._runner.graphs = DecodeGraphs(engine.forward, engine.cache, engine._runner.newest_tokens, 200)
    engine.run(requests, done.__setitem__)
    for name in (*adapters, None):
        attached = load_decoder(base)
        if name:
            load_adapter(attached, folders[name])
        same(attached, *([d[name, i].token_ids for i in range(len(PROMPTS))] for d in (done, wanted)))
    assert (Several.ADAPTERS in kinds) == graphs


def test_stacked_adapters_are_kept_once(base, folders):
    decoder = load_decoder(base)
    forward = Forward(decoder, {name: read_adapter(decoder, folder) for name, folder in folders.items()})
    before = [[g and (g.a_Ir.clone(), g.b_rO.clone()) for g in layer] for layer in forward.adapters["few"]]
    stacked = StackedLora(forward.adapters)
    assert stacked.which(["few", None, "root", "all"]) == [1, -1, 2, 0]
    assert [s.ranks_N.tolist() for s in stacked.layers[0]] == [[12, 4, 3], [4, 0, 3], [8, 2, 0], [4, 0, 3]]
    for layer, groups, kept in zip(stacked.layers, forward.adapters["few"], before, strict=True):
        for all_of, group, pair in zip(layer, groups, kept, strict=True):
            if group is not None:
                assert group.b_rO.untyped_storage().data_ptr() == all_of.b_NRO.untyped_storage().data_ptr()
                assert torch.equal(group.a_Ir, pair[0])
                assert torch.equal(group.b_rO, pair[1])


def test_the_decoder_can_still_be_trained_and_saved(base, folders, tmp_path):
    """Sampling joins weights behind the decoder's back; their values, gradients and files stay what they were."""
    from ptst.model.weights import load_decoder as load
    from ptst.model.weights import save_safetensors

    decoder, other = load(base), load(base)
    generate(decoder, PROMPTS, {2}, Sampling(2))
    for d in (decoder, other):
        d.requires_grad_(True)
        d.logits(torch.arange(3, 20)).square().sum().backward()
    for (name, p), q in zip(decoder.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    with torch.no_grad():
        decoder.layers[0].self_attn.k_proj.weight.mul_(0.5)  # training goes on: the next answers follow
        other.layers[0].self_attn.k_proj.weight.mul_(0.5)
    a, b = (generate(d, PROMPTS, {2}, Sampling(8)) for d in (decoder, other))
    assert [c.token_ids for c in a] == [c.token_ids for c in b]
    save_safetensors(tmp_path / "model.safetensors", dict(decoder.named_parameters()))


def test_an_adapter_of_another_base_is_refused(base, folders, tmp_path):
    wider = load_decoder(write_tiny_model(tmp_path, intermediate_size=64))
    with pytest.raises(ValueError, match="was it trained on another model"):
        read_adapter(wider, folders["all"])
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    with pytest.raises(ValueError, match=r"the adapter lacks \d+ tensors"):
        read_adapter(load_decoder(write_tiny_model(deeper, num_hidden_layers=3)), folders["all"])
    # An adapter in memory, of a deeper decoder or a wider one: none of it may be left out in silence.
    for other in (load_decoder(write_tiny_model(deeper, num_hidden_layers=3)), wider):
        add_lora(other, LoraConfig(2), 0)
        with pytest.raises(ValueError, match=r"the adapter changes layers\.\d\.\S+ of \d+ x \d+, and the model has"):
            Engine(load_decoder(base), {2}, adapters={"other": attached_adapter(other)})
    config = json.loads((folders["all"] / "adapter_config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        read_adapter(load_decoder(base), odd)
