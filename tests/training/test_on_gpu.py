"""Training on a GPU: the losses, gradients and weights of a CPU, and what a checkpoint and a command do there. Skipped
without one."""

from __future__ import annotations

import json

import pytest
import torch

from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.fold import fold_adapters
from ptst.model.weights import load_decoder
from ptst.train import run_training
from ptst.training.checkpoint import Checkpoints
from ptst.training.config import TrainConfig
from ptst.training.memory import Method, choose_micro_batch_tokens, explain_oom, plan_memory
from ptst.training.metrics import peak_memory
from ptst.training.trainer import Trainer, TrainerConfig
from tests.gpu import DEVICE, needs_cuda, needs_gpu
from tests.training.steps import examples, trained

WAYS: dict[str, dict] = {
    "lora": {},
    "folded": {"folded": True},
    "full": {"full": True},
    "checkpointing": {"activation_checkpointing": True},
    "average": {"average": 0.9},
    "proximal": {"proximal": 0.1},
}


def trainer(folder, device: str, dtype=torch.float32, full=False, average=None, dropout=0.0, **settings) -> Trainer:
    decoder = load_decoder(folder, dtype, device)
    decoder.activation_checkpointing = settings.pop("activation_checkpointing", False)
    named = trained(decoder, full, dropout)
    if settings.pop("folded", False) and device != "cpu":
        assert fold_adapters(decoder) == 4 * len(decoder.layers)
    config = TrainerConfig(**{"lr": 1e-3, "examples_per_step": 4, "micro_batch_tokens": 30, **settings})
    return Trainer(decoder, named, examples(12), config, average=average)


def run(made: Trainer, steps: int = 3) -> tuple[list, torch.Tensor]:
    reports = [made.step() for _ in range(steps)]
    weights = torch.cat([w.detach().float().cpu().flatten() for w in made.parameters.values()])
    return [(r.loss, r.grad_norm) for r in reports], weights


@needs_gpu
@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_those_of_a_cpu(tiny_folder, way):
    torch.manual_seed(0)
    (on_cpu, weights), (on_gpu, others) = (run(trainer(tiny_folder, d, **WAYS[way])) for d in ("cpu", DEVICE))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    # AdamW divides by the gradient's size, so that the rounding of a tiny one shows: a step is at most lr.
    assert (weights - others).abs().max() <= 3 * 1e-3
    assert (weights - others).norm() <= 1e-2 * weights.norm()


@needs_gpu
@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_half_precision(tiny_folder, update):
    """In bfloat16 the loss is that of float32 up to its rounding, and all weights move."""
    exact, _ = run(trainer(tiny_folder, DEVICE, full=True))
    made = trainer(tiny_folder, DEVICE, torch.bfloat16, full=True, weight_update=update)
    before = [p.detach().clone() for p in made.parameters.values()]
    rounded, _ = run(made)
    assert [a for a, _ in rounded] == pytest.approx([a for a, _ in exact], rel=0.02)
    assert all(not torch.equal(a, b) for a, b in zip(before, made.parameters.values(), strict=True))


@needs_gpu
def test_a_checkpoint_goes_on_to_the_same_bits(tiny_folder, tmp_path):
    """Dropout draws on the device, and the random state of the GPU is part of a checkpoint."""
    _, whole = run(trainer(tiny_folder, DEVICE, dropout=0.3))
    first = Checkpoints(tmp_path / "state", trainer(tiny_folder, DEVICE, dropout=0.3), 3)
    first.trainer.step()
    first.save({})
    after = torch.rand(3, device=DEVICE)
    again = Checkpoints(tmp_path / "state", trainer(tiny_folder, DEVICE, dropout=0.3), 3)
    again.restore()
    assert again.trainer.done == 1
    assert torch.equal(torch.rand(3, device=DEVICE), after)
    _, resumed = run(again.trainer, 2)
    assert torch.equal(whole, resumed)


@needs_gpu
def test_the_command(tiny_folder, tmp_path):
    """Train, then validation loss and sample answers on the way, in the device's own dtype."""
    config = TrainConfig(
        data="word-problems:6", val_data="word-problems:3", examples_per_step=2, rank=2, model=str(tiny_folder),
        eval_every=2, out=tmp_path / "run", micro_batch_tokens="auto",
    )  # fmt: skip
    run_training(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["validation_loss"] for r in rows if r["kind"] == "eval"]
    assert losses[-1] < losses[0]
    assert all(r["time"]["peak_memory"] > 0 for r in rows if r["kind"] == "step")


@needs_cuda
def test_memory(tiny_folder):
    config = load_decoder(tiny_folder).config
    method = Method(LoraConfig(rank=2), dtype=torch.bfloat16, device="cuda")
    assert choose_micro_batch_tokens(config, method, 200) > 200
    assert peak_memory() >= 0
    with pytest.raises(UserError, match="out of memory"), explain_oom(plan_memory(config, method, 200)):
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
