"""Weights spread over 2 and 4 ranks: the same losses and weights as one process, which holds all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.data.order import Step
from ptst.data.steps import _BLOCK, Steps
from ptst.errors import UserError
from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.model import read_in_place, sharded_weights
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.lora import add_lora
from ptst.model.read_in_place import TensorFile
from ptst.model.sharded_weights import Rows, load_sharded_decoder, own_rows, read_parts, write_tensors
from ptst.model.weights import load_decoder, save_safetensors
from ptst.train import run_training
from ptst.training import heartbeat, parallel, shard_choice, sharded_answers
from ptst.training.memory import Method, plan_memory
from ptst.training.parallel import ALONE, World
from ptst.training.shard_choice import check_ranks, choose_sharding
from ptst.training.sharding import gathered, mesh_of
from ptst.training.trainer import Trainer, TrainerConfig
from tests.ports import held_port
from tests.tiny import CONFIG as TINY
from tests.tiny import FAMILIES, write_tiny_model
from tests.training.steps import examples
from tests.training.test_parallel import CONFIG, as_torchrun, ranks_train, start
from tests.training.test_ranks import Train, told

LORA = LoraConfig(rank=2, alpha=4)
# Steps of 5, 5 and 3 examples in micro-batches of 24 tokens: some ranks have fewer than others, some have none.
STEPS = TrainerConfig(lr=1e-2, examples_per_step=5, micro_batch_tokens=24, epochs=2, seed=1)
MODEL = {"hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 3, "tie_word_embeddings": False}
CASES = {
    "full": (torch.float32, None),
    "lora": (torch.float32, LORA),
    "full.bfloat16": (torch.bfloat16, None),
    "lora.bfloat16": (torch.bfloat16, LORA),
}


def trainer(folder, dtype, lora, world: World = ALONE, sharded: bool = False) -> Trainer:
    if sharded:
        decoder, parameters = load_sharded_decoder(folder, dtype, mesh_of(world), lora, seed=1)
    else:
        decoder = load_decoder(folder, dtype)
        parameters = add_lora(decoder, lora, 1) if lora else dict(decoder.requires_grad_(True).named_parameters())
    return Trainer(decoder, parameters, examples(13), STEPS, world=world)


def curve(trained: Trainer) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step, and the trained weights after the last, on rank 0."""
    reports = [[r.loss, r.grad_norm] for r in trained]
    return reports, {n: t.clone() for n, t in gathered(trained.masters.tensors, trained.rows, trained.world)}


READ: list[tuple[int, int]] = []  # first byte and the one after the last of what was read of a file


class Recorder(TensorFile):
    """Notes what is read of a file's values."""

    def read(self, offset, into):
        READ.append((offset, offset + into.nbytes))
        super().read(offset, into)


def answers(decoder) -> list[tuple[list[int], str, str | None]]:
    """To prompts of several lengths; then with a stop token that ends one before the others."""
    prompts = [[5, 9, 2], [7], [3, 3, 8, 1, 6]]

    def answered(stop_ids):
        if decoder.sharded:
            found = sharded_answers.sharded_answers(decoder, prompts, stop_ids, 8)
        else:
            found = generate(decoder, prompts, stop_ids, Sampling(8))
        return [(a.token_ids, a.finish_reason, a.error) for a in found]

    first = answered(())
    return [*first, *answered(first[0][0][2:3])]


def ranks_curves(rank: int, size: int, port: int, folder: Path, out: Path) -> None:
    as_torchrun(rank, size, port)
    read_in_place.TensorFile = Recorder
    if rank:  # as if its arithmetic differed: rank 0 chooses the tokens of answers
        sharded_answers.sample = lambda logits_NV, *_: torch.zeros(len(logits_NV), dtype=torch.long)
    curves, held, read, told = {}, {}, {}, {}
    with parallel.world() as world:
        for name, how in CASES.items():
            for sharded in (True, False):
                READ.clear()
                trained = trainer(folder, *how, world, sharded)
                if sharded:
                    read[name] = list(READ)
                    base = [p for n, p in trained.decoder.named_parameters() if ".lora_" not in n]
                    held[name] = sum(own_rows(p).nbytes for p in base)
                curves[f"{name}.{sharded}"], weights = curve(trained)
                told[f"{name}.{sharded}"] = answers(trained.decoder)
                if rank == 0:
                    save_file(weights, out / f"{name}.{sharded}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps({"curves": curves, "held": held, "read": read, "answers": told}))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("size", "family"),
    [(2, None), *(pytest.param(4, f, marks=pytest.mark.thorough) for f in (None, "qwen2", "qwen3", "olmo2"))],
)
def test_ranks_follow_the_loss_curve_of_one_process(tmp_path, size, family):
    """Families with biases, norms of queries and keys, norms after a layer, and a head that is the embedding."""
    (tmp_path / "model").mkdir()
    folder = write_tiny_model(tmp_path / "model", **(FAMILIES[family] if family else MODEL))
    start(ranks_curves, size, folder, tmp_path)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(size)]
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, (dtype, lora) in CASES.items():
        curves = [rank["curves"][f"{name}.True"] for rank in ranks]
        assert curves == [curves[0]] * size
        if dtype == torch.float32:
            alone, weights = curve(trainer(folder, dtype, lora))
        else:  # each rank rounds the gradients of its micro-batches, with sharding or without
            alone, weights = ranks[0]["curves"][f"{name}.False"], load_file(tmp_path / f"{name}.False.safetensors")
        said = [rank["answers"] for rank in ranks]
        assert [one[f"{name}.True"] for one in said] == [said[0][f"{name}.True"]] * size
        if dtype == torch.float32:  # on a CPU the engine computes others in float32
            assert said[0][f"{name}.True"] == said[0][f"{name}.False"]
            assert len({len(ids) for ids, *_ in said[0][f"{name}.True"]}) > 1
        # Sums in another order, amplified by the rounding of weights.
        tolerance = 1e-5 if dtype == torch.float32 else 5e-3
        for one, others in zip(alone, curves[0], strict=True):
            assert others == pytest.approx(one, rel=tolerance), name
        found = load_file(tmp_path / f"{name}.True.safetensors")
        assert found.keys() == weights.keys()
        for key, wanted in weights.items():
            assert found[key].dtype == torch.float32
            assert (found[key] - wanted).norm() <= tolerance * wanted.norm(), (name, key)
        # Of every weight a rank holds and reads its rows; together they read each row once.
        whole = sum(t.numel() for t in stored.values()) * (4 if lora is None else dtype.itemsize)
        assert sum(rank["held"][name] for rank in ranks) == whole
        assert max(rank["held"][name] for rank in ranks) < 1.05 * whole / size
        parts = sorted((a, b) for rank in ranks for a, b in rank["read"][name])
        assert parts[-1][1] == path.stat().st_size and sum(b - a for a, b in parts) == sum(
            t.nbytes for t in stored.values()
        )
        assert all(b == c for (_, b), (c, _) in pairwise(parts)), name


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
def test_rows_are_divided_as_torch_divides_them(size, length):
    whole = torch.arange(length * 2).view(length, 2)
    parts = [Rows.of(whole.shape, rank, size) for rank in range(size)]
    chunks = [*torch.chunk(whole, size), *[whole[:0]] * size][:size]
    assert [whole[p.start : p.stop].tolist() for p in parts] == [chunk.tolist() for chunk in chunks]
    assert [p.own_shape for p in parts] == [chunk.shape for chunk in chunks]


def test_a_file_written_tensor_by_tensor_is_the_librarys(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).to(torch.bfloat16), "step": torch.tensor(3.0)}
    order = sharded_weights.in_file_order({n: (t.dtype, t.shape) for n, t in tensors.items()})
    described = {n: (tensors[n].dtype, tensors[n].shape) for n in order}
    write_tensors(tmp_path / "ours", described, ((n, tensors[n]) for n in order))
    save_safetensors(tmp_path / "theirs", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_of_another_tensor_are_refused(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.arange(12.0).view(6, 2)})
    (name, part) = next(read_parts(tmp_path / "a.safetensors", {"w": Rows(torch.Size([6, 2]), 2, 4)}))
    assert (name, part.tolist()) == ("w", [[4, 5], [6, 7]])
    with pytest.raises(UserError, match=r"w has shape \[6, 2\], not \[5, 2\]"):
        list(read_parts(tmp_path / "a.safetensors", {"w": Rows(torch.Size([5, 2]), 2, 4)}))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or damaged"):
        list(read_parts(tmp_path / "a.safetensors", {}))
    with pytest.raises(UserError, match="does not exist"):
        list(read_parts(tmp_path / "b.safetensors", {}))


def chosen(monkeypatch, free: int = 10**12, size: int = 2, **settings) -> bool:
    monkeypatch.setattr(shard_choice, "free_memory", lambda _device: free)
    config = replace(CONFIG, **settings)
    shape = DecoderConfig.from_dict(TINY)
    world = SimpleNamespace(rank=0, size=size, min=lambda value: value)
    return choose_sharding(config, shape, Method.of(config), 100, world)


def test_what_auto_chooses(monkeypatch, capsys):
    assert chosen(monkeypatch, full=True)
    assert not chosen(monkeypatch, full=True, size=1)
    assert not chosen(monkeypatch, full=True, shard="none")
    assert not chosen(monkeypatch, full=True, weight_update="stochastic")
    assert not chosen(monkeypatch)
    assert chosen(monkeypatch, free=10**6)
    assert "they do not fit into the memory of one" in capsys.readouterr().err
    assert chosen(monkeypatch, shard="full")
    with pytest.raises(UserError, match=r"stochastic has none; leave one of them out"):
        chosen(monkeypatch, full=True, shard="full", weight_update="stochastic")
    assert not chosen(monkeypatch, shard="full", size=1)
    assert not chosen(monkeypatch, free=10**6, quantize="nf4")
    with pytest.raises(UserError, match=r"a base in nf4 has none; leave out shard or quantize"):
        chosen(monkeypatch, shard="full", quantize="nf4")
    assert "there is one rank" in capsys.readouterr().err


def test_more_ranks_than_examples(capsys):
    steps = [Step(0.0, [0, 1, 2]), Step(0.5, [3])]
    check_ranks(steps, False, World(0, 3))
    with pytest.raises(
        UserError, match="4 ranks, and no step has more than 3 examples, so 1 would never compute; start"
    ):
        check_ranks(steps, False, World(0, 4))
    with pytest.raises(UserError, match="no step has more than 3 examples"):
        check_ranks(Steps([Step(0.0, [])] * _BLOCK + steps), False, World(0, 4))
    check_ranks(Steps(), False, World(0, 4))
    check_ranks(steps, True, World(0, 4))
    assert "they only hold their part of the weights" in capsys.readouterr().err


def test_the_plan_of_a_rank():
    """Weights, masters, gradients and moments shrink with the ranks; what passes through does not."""
    shape = DecoderConfig.from_dict(TINY)
    for lora in (None, LORA):
        one, four, many = (
            plan_memory(shape, Method(lora, torch.bfloat16, ranks=ranks), 100) for ranks in (1, 4, 10**6)
        )
        assert one.activations == four.activations
        assert four.optimizer == (one.optimizer if lora else -(-one.optimizer // 4))
        assert four.weights - many.weights == pytest.approx(one.parameters * 2 / 4 if lora else 0, abs=2)


def kill_one(rank: int, config) -> None:
    """The last rank is killed in the midst of its fourth step."""
    heartbeat.BEAT, heartbeat.GRACE = 0.05, 60.0
    step, taken = Trainer._sum_gradients, []

    def sum_gradients(self, losses):
        taken.append(1)
        if len(taken) == 4 and rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, losses)

    Trainer._sum_gradients = sum_gradients
    run_training(config)


RUN = replace(
    CONFIG,
    data="word-problems:14",
    examples_per_step=4,
    epochs=2.0,
    eval_every=3,
    save_every=3,
    at_epochs=(1.0,),
    average=0.5,
    proximal=0.1,
    activation_checkpointing="block",
    token_constraint=(0.5, 2, 0.1),
)


@pytest.mark.thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [{"full": True}, {"shard": "full"}], ids=["full", "lora"])
def test_a_run_killed_on_four_ranks_goes_on_with_two(tmp_path, how):
    """And has the losses, sample answers and files of a run of one process."""
    (tmp_path / "model").mkdir()
    config = replace(RUN, model=str(write_tiny_model(tmp_path / "model", **MODEL)), **how)
    four = replace(config, out=tmp_path / "several")
    context = multiprocessing.get_context("forkserver")
    with held_port() as port:
        processes = [context.Process(target=ranks_killed, args=(rank, 4, port, four, tmp_path)) for rank in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, -signal.SIGKILL]
    for rank in range(3):
        said = (tmp_path / f"{rank}.said").read_text()
        assert "rank 3 ended without a word: killed, or its machine is gone" in said, rank
    assert [p.name for p in (four.out / "state").glob("step-*")] == ["step-00000003"]
    start(ranks_train, 2, four, False)
    run_training(replace(config, out=tmp_path / "one"))
    one, several = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "several")
    )
    samples = [(tmp_path / n / "samples.jsonl").read_text() for n in ("one", "several")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) > 8
    for a, b in zip(one, several, strict=True):
        assert {k: v for k, v in b.items() if k not in ("time", "kind")} == pytest.approx(
            {k: v for k, v in a.items() if k not in ("time", "kind")}, rel=1e-5
        )
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.safetensors"))
    assert len(names) >= 8
    for name in names:
        a, b = (load_file(tmp_path / n / name) for n in ("one", "several"))
        assert [(k, t.shape, t.dtype) for k, t in sorted(a.items())] == [
            (k, t.shape, t.dtype) for k, t in sorted(b.items())
        ]
        assert name.name == "random.safetensors" or all(torch.allclose(a[k], b[k], atol=2e-5) for k in a), name


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_run_stopped_on_two_ranks_goes_on_in_one_process(tmp_path, tiny_folder):
    config = replace(RUN, model=str(tiny_folder), full=True, dtype="bfloat16")
    start(ranks_train, 2, replace(config, out=tmp_path / "two"), True)
    assert sorted(p.name for p in (tmp_path / "two" / "state").glob("step-*")) == ["step-00000002"]
    for name in ("two", "one"):
        run_training(replace(config, out=tmp_path / name))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, wanted in one.items():
        assert two[key].dtype == torch.bfloat16 and (two[key] - wanted).norm() <= 5e-3 * wanted.norm(), key


def ranks_killed(rank: int, size: int, port: int, config, out: Path) -> None:
    as_torchrun(rank, size, port)
    try:
        kill_one(rank, config)
    except UserError as error:
        (out / f"{rank}.said").write_text(str(error))


def other_shard(rank, c):
    return replace(c, shard="none" if rank else "full")


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_ranks_that_divide_weights_otherwise_are_told(tiny_folder, tmp_path):
    config = replace(CONFIG, model=str(tiny_folder), out=tmp_path / "run")
    found = told(tmp_path, {"it": Train(config, other_shard)})
    assert found["it"] == 2 * [
        "rank 1 has other settings than rank 0; give every rank the same flags and configuration"
    ]
    assert not (tmp_path / "run").exists()
