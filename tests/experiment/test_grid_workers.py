"""Several workers on one folder, as a launcher starts them: one for each GPU, and nothing is done twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptst import records
from ptst.errors import UserError
from ptst.experiment import workers
from ptst.experiment.status.at_work import Note
from ptst.grid import run_command
from ptst.training.launch import worker_ranks
from ptst.training.parallel import take_gpu
from tests.experiment.conftest import CONFIG, ONE_RUN
from tests.training.test_parallel import as_torchrun, start

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, (0, None)),
        (TORCHRUN, (5, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, None)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, (3, 1)),  # they need not meet
        ({"SLURM_NTASKS": "4"}, (0, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, None)),
    ],
)
def test_a_worker_knows_its_ranks(environ, ranks):
    assert worker_ranks(environ) == ranks


@pytest.mark.parametrize(
    ("count", "local", "taken"), [(0, 1, None), (1, 3, None), (4, None, None), (4, 0, 0), (4, 3, 3)]
)
def test_every_worker_takes_the_gpu_of_its_rank(monkeypatch, count, local, taken):
    """Of one GPU alone the system tells no others: it may be this worker's own."""
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    take_gpu(local)
    assert found == ([] if taken is None else [taken])


def test_a_worker_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 on a node with 2 GPUs; start one process for each GPU"):
        take_gpu(2)


def worker(rank: int, size: int, port: int, folder: Path) -> None:
    """Notes what it trains and measures, and what it prints."""
    as_torchrun(rank, size, port)
    os.chdir(folder)
    os.dup2(os.open(f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(os.open(f"{rank}.printed", os.O_CREAT | os.O_WRONLY), 1)
    records.git_commit = lambda: None
    train, write, done = workers.Worker._train, workers.Worker._write, []

    def _train(self, model):
        done.append(f"train {model.run}")
        return train(self, model)

    def _write(self, cell, *rest):
        done.append(f"test {cell.name}")
        return write(self, cell, *rest)

    workers.Worker._train, workers.Worker._write = _train, _write
    result = run_command(replace(CONFIG, model="model", out=Path("shared")))
    assert (result is None) == (rank > 0)
    Path(f"{rank}.json").write_text(json.dumps(done))


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_four_workers_share_a_grid(grid, here):
    grid("whole")
    start(worker, 4, here)
    done = [json.loads((here / f"{rank}.json").read_text()) for rank in range(4)]
    all_of_it = [name for part in done for name in part]
    whole, shared = (json.loads((here / name / "results.json").read_text()) for name in ("whole", "shared"))
    assert len(all_of_it) == len(set(all_of_it)) == 4 + len(list(here.glob("whole/cells/*/*.json")))
    assert sum(bool(part) for part in done) > 1
    assert [shared[key] for key in ("cells", "runs")] == [whole[key] for key in ("cells", "runs")]
    assert [bool((here / f"{rank}.printed").read_text()) for rank in range(4)] == [True, False, False, False]
    assert [(here / f"{rank}.said").read_text() == "" for rank in range(4)] == [False, True, True, True]


def test_a_worker_killed_after_the_last_cell_leaves_no_trace(grid, here):
    """The one that follows finds all finished, and ends the folder as an undisturbed worker does."""
    grid("grid", ONE_RUN)
    dead = Note(pid=2**22 + 1, started=5)
    (here / "grid" / "workers" / f"{dead.host}.{dead.pid}.json").write_text(json.dumps(vars(dead)))
    grid("grid", ONE_RUN)
    assert list((here / "grid" / "workers").iterdir()) == []
