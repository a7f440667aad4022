"""Under 1, 2 and 4 ranks the gradient of a step, and what a run writes, are those of one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from ptst.train import run_training
from ptst.training import parallel
from ptst.training.config import TrainConfig
from ptst.training.interrupt import Interrupt
from ptst.training.parallel import ALONE
from tests.conftest import ROOT
from tests.ports import held_port
from tests.training.steps import examples, gradients

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CONFIG = TrainConfig(
    data="word-problems:7",
    val_data="word-problems:5",
    examples_per_step=3,
    rank=2,
    micro_batch_tokens=400,
    max_length=400,
)


def every_gradient(folder, world=ALONE) -> dict[str, torch.Tensor]:
    """Steps of 4, 4 and 3 examples in rows of 24 tokens: with 4 ranks some have no row. Then a step of one example."""
    out = {}
    for dtype in TOLERANCE:
        steps = gradients(folder, examples(11), dtype, world, examples_per_step=4, micro_batch_tokens=24)
        steps += gradients(folder, examples(1), dtype, world)
        out |= {f"{dtype}.{n}": g for n, g in enumerate(steps)}
    return out


def as_torchrun(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")


def ranks_gradients(rank: int, size: int, port: int, folder: Path, out: Path) -> None:
    as_torchrun(rank, size, port)
    with parallel.world() as world:
        assert (world.rank, world.size, world.is_main_process) == (rank, size, rank == 0)
        save_file(every_gradient(folder, world), out / f"{rank}.safetensors")
        assert world.sum(rank + 1) == size * (size + 1) / 2


def ranks_train(rank: int, size: int, port: int, config: TrainConfig, signalled: bool) -> None:
    """A run, or its beginning: the last rank alone may get a signal in its second step."""
    as_torchrun(rank, size, port)
    if not signalled:
        assert (run_training(config) is None) == (rank > 0)
        return
    agreed, asked = Interrupt.agreed, []

    def signal_at_the_second(self):
        asked.append(1)
        if len(asked) == 2 and rank == size - 1:
            signal.raise_signal(signal.SIGTERM)
        return agreed(self)

    Interrupt.agreed = signal_at_the_second
    with pytest.raises(SystemExit) as stopped:
        run_training(config)
    assert stopped.value.code == 143


# What ranks import, once; where another test has started the server, they import it themselves.
multiprocessing.set_forkserver_preload(["ptst.training.fine_tune", "tests.training.test_ranks"])


def start(function, size: int, *args) -> None:
    with held_port() as port:
        torch.multiprocessing.start_processes(function, (size, port, *args), nprocs=size, start_method="forkserver")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_gradient(tiny_folder, tmp_path, size):
    start(ranks_gradients, size, tiny_folder, tmp_path)
    alone = every_gradient(tiny_folder)
    for rank in range(size):
        ranks = load_file(tmp_path / f"{rank}.safetensors")
        assert ranks.keys() == alone.keys()
        for name, wanted in alone.items():
            assert (ranks[name] - wanted).norm() <= TOLERANCE[wanted.dtype] * wanted.norm(), name


@pytest.mark.timeout(120)
def test_a_run_of_two_ranks_is_the_run_of_one(tiny_folder, tmp_path):
    config = replace(CONFIG, model=str(tiny_folder))
    for signalled in (True, False):
        start(ranks_train, 2, replace(config, out=tmp_path / "two"), signalled)
    run_training(replace(config, out=tmp_path / "one"))
    one, two = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")
    )
    assert [m["step"] for m in two] == [0, 1, 2, 3, 3]
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in b.items() if k not in ("time", "kind")} == pytest.approx(
            {k: v for k, v in a.items() if k not in ("time", "kind")}, rel=1e-5
        )
    assert [m["tokens"] for m in one if m["kind"] == "step"] == [m["tokens"] for m in two if m["kind"] == "step"]
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["environment"]["ranks"] == 2


@pytest.mark.thorough
def test_torchrun(tiny_folder, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ptst.train"]
    flags = f"--model {tiny_folder} --data word-problems:7 --rank 2 --json --out {tmp_path / 'run'}".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, *flags], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 1
    assert done.stderr.count("finished in") == done.stderr.count("ptst.train: ") == 1
