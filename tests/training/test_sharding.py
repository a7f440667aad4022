"""Weights spread over 2 and 4 ranks: the same losses and weights as one process, which holds all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.sharded_weights import load_sharded_decoder
from ptst.model.weights import load_decoder
from ptst.training import parallel
from ptst.training.parallel import ALONE, World
from ptst.training.sharding import gathered, mesh_of
from ptst.training.trainer import Trainer, TrainerConfig
from tests.tiny import write_tiny_model
from tests.training.steps import examples
from tests.training.test_parallel import as_torchrun, start

LORA = LoraConfig(rank=2, alpha=4)
# Steps of 5 examples in micro-batches of 24 tokens: ranks have two, one or none of them.
STEPS = TrainerConfig(lr=1e-2, examples_per_step=5, micro_batch_tokens=24, epochs=3, seed=1)
MODEL = {"hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 3, "tie_word_embeddings": False}
CASES = {
    "full": (torch.float32, None),
    "lora": (torch.float32, LORA),
    "full in bfloat16": (torch.bfloat16, None),
    "lora in bfloat16": (torch.bfloat16, LORA),
}


def trainer(folder, dtype, lora, world: World = ALONE, sharded: bool = False, **more) -> Trainer:
    if sharded:
        decoder, parameters = load_sharded_decoder(folder, dtype, mesh_of(world), lora, seed=1)
    else:
        decoder = load_decoder(folder, dtype)
        parameters = add_lora(decoder, lora, 1) if lora else dict(decoder.requires_grad_(True).named_parameters())
    return Trainer(decoder, parameters, examples(13), STEPS, world=world, **more)


def curve(trained: Trainer) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step, and the trained weights after the last, on rank 0."""
    reports = [[r.loss, r.grad_norm] for r in trained]
    return reports, {n: t.clone() for n, t in gathered(trained.masters.tensors, trained.rows, trained.world)}


def ranks_curves(rank: int, size: int, port: int, folder: Path, out: Path) -> None:
    as_torchrun(rank, size, port)
    found = {}
    with parallel.world() as world:
        for name, how in CASES.items():
            for sharded in (True, False):
                trained = trainer(folder, *how, world, sharded)
                found[f"{name}.{sharded}"], weights = curve(trained)
                if rank == 0:
                    save_file(weights, out / f"{name}.{sharded}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_ranks_follow_the_loss_curve_of_one_process(tmp_path, size):
    folder = write_tiny_model(tmp_path, **MODEL)
    start(ranks_curves, size, folder, tmp_path)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(size)]
    assert all(rank == ranks[0] for rank in ranks)
    for name, (dtype, lora) in CASES.items():
        # In bfloat16, a rank rounds the gradient of each of its micro-batches: as it does without sharding.
        if dtype == torch.float32:
            alone, weights = curve(trainer(folder, dtype, lora))
        else:
            alone, weights = ranks[0][f"{name}.False"], load_file(tmp_path / f"{name}.False.safetensors")
        for one, others in zip(alone, ranks[0][f"{name}.True"], strict=True):
            print(name, one, others)
        stored = load_file(tmp_path / f"{name}.True.safetensors")
        assert stored.keys() == weights.keys()
        print(max((stored[key] - wanted).norm() / wanted.norm() for key, wanted in weights.items()))
