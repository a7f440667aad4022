"""Every family of models goes all the way: sampling, adapters (trained, merged, several at once), full fine-tuning, the
audit. Parity of the layers with Hugging Face is in test_parity.py; a GPU's way of sampling in test_engine.py."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity import peer
from ptst.audit.report import AuditConfig, audit_data
from ptst.generation import forward
from ptst.generation.engine import Engine, generate
from ptst.generation.forward import half_width_product, linear
from ptst.generation.multi_lora import read_adapter
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.kernels.dispatch import triton
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, load_adapter, merge_lora, save_adapter
from ptst.model.weights import load_decoder, save_full
from ptst.train import run_training
from ptst.training.config import TrainConfig
from tests.generation.test_generate import PREFIX, prompts, slow_greedy
from tests.kernels import interpreter
from tests.tiny import CONFIG, FAMILIES, write_tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp(request.param), **FAMILIES[request.param])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["auto", "reference"])
def test_sampled_answers_are_those_of_the_plain_forward_pass(folder, way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    decoder, asked, stops = load_decoder(folder), prompts(5, PREFIX), set(range(0, 300, 9))
    wanted = [slow_greedy(decoder, p, stops, 10) for p in asked]
    answers = generate(decoder, asked, stops, Sampling(10), EngineOptions(batch_size=4))
    assert [a.token_ids for a in answers] == wanted
    # A 16-bit model: the same weights, rounded, computed in float32 (through packed products on a CPU).
    half, exact = load_decoder(folder, torch.bfloat16), load_decoder(folder)
    for p, q in zip(exact.parameters(), half.parameters(), strict=True):
        p.data = q.data.float()
    wanted, got = (generate(d, asked, stops, Sampling(1, logprobs=True)) for d in (exact, half))
    for a, b in zip(got, wanted, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-2)  # keys and values are kept in 16 bits


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo3"])
def test_sampling_through_tritons_kernels(family, tmp_path, monkeypatch):
    decoder = load_decoder(write_tiny_model(tmp_path, **FAMILIES[family]))
    monkeypatch.setenv("PTST_KERNELS", "triton")
    interpreter.install()
    (answer,) = generate(decoder, [PREFIX[:9]], set(), Sampling(2))
    monkeypatch.setenv("PTST_KERNELS", "reference")
    assert answer.token_ids == slow_greedy(decoder, PREFIX[:9], set(), 2)


def test_adapters(folder, tmp_path):
    """Attached, named in a batch of several, merged, and as a folder of merged weights: the same answers."""
    tokens, config = torch.tensor(prompts(1, PREFIX)[0]), LoraConfig(rank=3, alpha=6)
    decoder = load_decoder(folder)
    base = decoder.logits(tokens)
    for p in add_lora(decoder, config).values():
        torch.nn.init.normal_(p, std=0.2)
    changed = decoder.logits(tokens).detach()
    assert (changed - base).abs().max() > 0.1
    save_adapter(decoder, tmp_path, config, str(folder))
    again = load_decoder(folder)
    adapters = {"a": read_adapter(again, tmp_path)}
    engine, done = Engine(again, {2}, EngineOptions(batch_size=2, max_length=100), adapters=adapters), {}
    engine.run([Request(tokens.tolist(), Sampling(1, logprobs=True), n, n) for n in ("a", None)], done.__setitem__)
    for name, logits in (("a", changed), (None, base)):
        token = int(logits[-1].argmax())
        assert done[name].token_ids == [token]
        assert done[name].logprobs == pytest.approx([float(logits[-1].log_softmax(0)[token])], abs=1e-4)
    load_adapter(again, tmp_path)
    close(again.logits(tokens), changed)
    merge_lora(again)
    close(again.logits(tokens), changed)
    merged = tmp_path / "merged"
    merged.mkdir()
    save_full(again, folder, merged)
    assert load_file(merged / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    close(load_decoder(merged).logits(tokens), changed)
    assert json.loads((merged / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("full", [False, True])
def test_training(folder, tmp_path, full):
    """A loss that falls, and under full fine-tuning every weight changes."""
    config = TrainConfig(model=str(folder), data="word-problems:6", examples_per_step=6, max_steps=3, epochs=3.0)
    run_training(replace(config, full=full, lr=1e-2, warmup=0, dtype="float32", out=tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.1
    if full:
        before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "run"))
        assert before.keys() == after.keys()
        assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_audit_opens_it(folder):
    audit = audit_data(AuditConfig(model=str(folder), data="word-problems:3"))
    assert not [f for f in audit.findings if f.level == "error"]


def test_activation_checkpointing_gives_the_same_gradients(folder):
    grads = []
    for checkpointing in (False, True):
        decoder = load_decoder(folder)
        decoder.activation_checkpointing = checkpointing
        parameters = add_lora(decoder, LoraConfig(rank=2))
        for i, p in enumerate(parameters.values()):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
        decoder.logits(torch.tensor(PREFIX)).square().mean().backward()
        grads.append([p.grad for p in parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_with_a_bias(rows, monkeypatch):
    monkeypatch.setattr(forward, "AMX", False)  # which rounds inputs and results, too: test_forward.py
    x, w, b = torch.randn(rows, 16), torch.randn(24, 16), torch.randn(24)
    torch.testing.assert_close(linear(x, w, b), x @ w.t() + b)
    for narrow in (w.bfloat16(), w.bfloat16() * 1e5):  # the second does not fit float16
        torch.testing.assert_close(half_width_product(narrow, b)(x), x @ narrow.float().t() + b, rtol=1e-4, atol=1e-3)


def test_hugging_face_reads_what_was_merged(folder, tmp_path):
    pytest.importorskip("transformers", reason="is what must read it")
    decoder = load_decoder(folder)
    for p in add_lora(decoder, LoraConfig(rank=2)).values():
        torch.nn.init.normal_(p, std=0.2)
    merge_lora(decoder)
    save_full(decoder, folder, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    kind = raw["architectures"][0].removesuffix("ForCausalLM").lower()
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": kind, "pad_token_id": 0}))
    tokens = torch.tensor(PREFIX)
    with torch.no_grad():
        assert (peer(tmp_path)(tokens[None]).logits[0] - decoder.logits(tokens)).abs().max() <= 1e-4


def test_a_decoder_has_the_weights_of_its_family_alone():
    """No bias and no norm but those that the switches ask for."""
    names = {}
    for family, changes in {"llama": {}, **FAMILIES}.items():
        decoder = Decoder(DecoderConfig.from_dict({**CONFIG, **changes}))
        names[family] = {n.removeprefix("layers.0.") for n in decoder.state_dict() if n.startswith("layers.0.")}
    plain = names["llama"]
    assert names["smollm3"] == names["ministral"] == plain
    assert names["qwen2"] - plain == {f"self_attn.{x}_proj.bias" for x in "qkv"}
    assert names["qwen3"] - plain == {f"self_attn.{x}_norm.weight" for x in "qk"}
    assert names["olmo2"] == names["olmo3"]
    assert plain - names["olmo2"] == {"input_layernorm.weight"}
    assert names["olmo2"] - plain == {
        *(f"self_attn.{x}_norm.weight" for x in "qk"),
        "post_feedforward_layernorm.weight",
    }
