"""The memory plan against what autograd keeps, and what follows from it: auto, the dry run, the words for no memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import memory_plan
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.model.config import TARGETS, DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.training import memory
from ptst.training.memory import Method
from tests.model.test_fused import SWITCHES
from tests.tiny import write_tiny_model

CONFIG = DecoderConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=64, sliding_window=None, tie_embeddings=True,
)  # fmt: skip
TOKENS = 33


def kept(
    lora: LoraConfig | None, dtype: torch.dtype, activation_checkpointing: bool, config: DecoderConfig = CONFIG
) -> int:
    """Bytes of distinct memory that autograd keeps for one row, weights and token ids not counted."""
    decoder = Decoder(config).to(dtype).requires_grad_(lora is None)
    if lora is not None:
        add_lora(decoder, lora)
    decoder.activation_checkpointing = activation_checkpointing
    tokens = torch.arange(TOKENS) % 60
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = decoder.documents(tokens, [0, 13, TOKENS])
        head = decoder.head_VE.detach()  # its gradient, under full fine-tuning, is counted with the gradients
        loss = linear_cross_entropy(hidden, head, tokens, 1.0)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LoraConfig(3), LoraConfig(2, targets=("q_proj", "down_proj")), None])
def test_activations_are_what_autograd_keeps(lora, dtype):
    told = memory.activation_bytes(CONFIG, lora, dtype, TOKENS)
    assert kept(lora, dtype, False) == pytest.approx(told, rel=0.01)


@pytest.mark.parametrize("lora", [LoraConfig(3), None])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_family_is_planned(switches, lora):
    config = replace(CONFIG, **SWITCHES[switches] | {"sliding_window": None})
    decoder = Decoder(config)
    assert memory.count_parameters(config) == sum(p.numel() for p in decoder.parameters())
    told = memory.activation_bytes(config, lora, torch.float32, TOKENS)
    assert kept(lora, torch.float32, False, config) == pytest.approx(told, rel=0.01)


def test_recomputation_keeps_the_layers_inputs():
    outside = kept(LoraConfig(3), torch.float32, True)
    insides = memory.activation_bytes(CONFIG, LoraConfig(3), torch.float32, TOKENS, True) - outside
    one = memory.activation_bytes(CONFIG, LoraConfig(3), torch.float32, TOKENS) // CONFIG.num_layers
    assert 0.8 * one < insides < 1.1 * one


def test_counts():
    decoder = Decoder(CONFIG)
    assert memory.count_parameters(CONFIG) == sum(p.numel() for p in decoder.parameters())
    for lora in (LoraConfig(5), LoraConfig(2, targets=("q_proj", "down_proj"))):
        fresh = Decoder(CONFIG).requires_grad_(False)
        assert memory.count_adapter(CONFIG, lora) == sum(p.numel() for p in add_lora(fresh, lora).values())


def test_llama_2_7b_fits_where_the_survey_says():
    """Published sizes: 6.74e9 parameters; r 16 on all linears is 40.0e6."""
    llama = DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, None, 4096, None, False)
    plan = memory.plan_memory(llama, Method(LoraConfig(16, targets=TARGETS), torch.bfloat16, "cuda"), 4096)
    assert plan.parameters == 6_738_415_616
    assert plan.trained == 39_976_960
    assert 26e9 < plan.peak < 30e9
    full = memory.plan_memory(llama, Method(None, torch.bfloat16, "cuda"), 4096)
    assert (full.optimizer, full.masters, full.gradients) == tuple(n * full.parameters for n in (8, 4, 4))
    stochastic = memory.plan_memory(llama, Method(None, torch.bfloat16, "cuda", weight_update="stochastic"), 4096)
    assert full.peak - stochastic.peak == 4 * full.parameters
    block = memory.plan_memory(llama, Method(LoraConfig(16), torch.bfloat16, "cuda", True), 4096)
    assert block.activations < 0.15 * plan.activations


def test_auto_takes_the_most_that_fits():
    ask = (CONFIG, Method(LoraConfig(3), torch.float32))

    def need(tokens: int) -> int:
        plan = memory.plan_memory(*ask, tokens)
        return plan.peak - plan.process

    free = round(need(1000) / memory.SHARE)
    chosen = memory.choose_micro_batch_tokens(*ask, longest=50, free=free)
    assert chosen == 768
    assert need(chosen) <= memory.SHARE * free < need(chosen + memory.STEP)
    assert memory.choose_micro_batch_tokens(*ask, longest=50, free=1 << 50) == memory.MOST["cpu"]
    assert memory.choose_micro_batch_tokens(*ask, longest=900, free=free) == 900
    with pytest.raises(ValueError, match=r"longest example alone needs .* set activation_checkpointing to block"):
        memory.choose_micro_batch_tokens(*ask, longest=1100, free=free)


def test_out_of_memory_is_told_in_one_sentence():
    plan = memory.plan_memory(CONFIG, Method(LoraConfig(3), torch.float32), 256)
    words = r"out of memory: the plan was .* of 256 tokens: .* lower micro_batch_tokens"
    with pytest.raises(ValueError, match=words), memory.explain_oom(plan):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(ValueError, match="out of memory"), memory.explain_oom(plan):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), memory.explain_oom(plan):
        raise RuntimeError("something else")


def test_dry_run_runs_nothing(tiny_folder, tmp_path, monkeypatch, capsys):
    from ptst import cli
    from ptst.train import run_training
    from ptst.training.config import TrainConfig

    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(tiny_folder), "--limit", "20", "--dry-run", "--micro-batch-tokens", "auto", "--json"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--activation-checkpointing", "block"])
    cli.run(run_training, TrainConfig, "train")
    told = capsys.readouterr()
    plan = json.loads(told.out.splitlines()[-1])
    assert plan["micro_batch_tokens"] == memory.MOST["cpu"]
    assert plan["steps"] == 3
    assert plan["peak"] == sum(plan[p] for p in memory.PURPOSES)
    assert "expected peak" in told.err
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("flags", [memory_plan.MANY, [*memory_plan.MANY, "--full", *memory_plan.VALIDATION]])
def test_the_planned_peak_is_the_measured_one(tmp_path, flags):
    """benchmarks/memory_plan.py has more sizes and methods."""
    folder = write_tiny_model(tmp_path, hidden_size=256, intermediate_size=704, vocab_size=60_000)
    found = memory_plan.measure(folder, [*flags, "--limit", "100", "--too-long", "drop"], tmp_path / "run")
    assert found["ratio"] == pytest.approx(1, abs=memory_plan.TOLERANCE)
