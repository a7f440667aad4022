"""Several ranks are one run: they agree before they train, and none is left waiting for another that has gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.align import run_alignment
from ptst.data.order import Step
from ptst.data.steps import Steps
from ptst.errors import UserError
from ptst.eval import run_evaluation
from ptst.evaluation.config import EvalConfig
from ptst.experiment.align_config import AlignConfig
from ptst.train import run_training
from ptst.training import agreement, heartbeat, memory, parallel
from ptst.training.config import TrainConfig
from ptst.training.launch import Launch, read_launch
from tests.ports import held_port
from tests.training.test_parallel import CONFIG, as_torchrun, start

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {**TWO, "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "1"}
Change = Callable[[int, TrainConfig], TrainConfig]


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch()),
        (TWO, Launch(1, 2, None, None, False, "node1")),
        (TORCHRUN, Launch(1, 2, 1, 1, True, "node1")),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 0, 1, True, "node1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        ({"SLURM_NTASKS": "4"}, Launch()),  # in an allocation, outside of srun
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "n", "MASTER_PORT": "1"},
            Launch(3, 4, 1, None, False, "n"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch()),
    ],
)
def test_launchers_are_understood(environ, launch):
    assert read_launch(environ) == launch


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "2 processes of a launcher .WORLD_SIZE., but MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "n", "MASTER_PORT": "1"}, "but RANK is not set; launch with torchrun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "one of 4 processes of srun .* launch with torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "one of 2 processes of mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "one of 2 processes of mpiexec"),
        ({**TWO, "RANK": "one"}, "RANK is 'one' in the environment, not a number"),
        ({**TWO, "RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2: ranks go from 0 to 1; launch with"),
        ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE is 0 in the environment: there is at least one process"),
        ({**TWO, "MASTER_PORT": "ssh"}, "MASTER_PORT is 'ssh' in the environment, not a number"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536; it must be from 1 to 65535"),
    ],
)
def test_a_launcher_that_tells_too_little_is_refused(environ, told, monkeypatch, capsys):
    with pytest.raises(UserError, match=told):
        read_launch(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):  # and no run of its own begins
        run_training(replace(CONFIG, model="nowhere"))


@pytest.mark.parametrize(
    ("launch", "command"),
    [
        (Launch(), "python -m ptst.train"),
        (Launch(1, 8, 1, 1, True), "torchrun --shutdown-timeout 600 --nproc-per-node 8 -m ptst.train"),
        (
            Launch(1, 8, 1, 2, True, "node1"),
            "torchrun --shutdown-timeout 600 --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d "
            "--rdzv-endpoint node1:29500 -m ptst.train (on every node)",
        ),
        (Launch(1, 8), "python -m ptst.train (on 8 ranks, by the launcher that started these)"),
    ],
)
def test_the_command_that_resumes_names_the_launcher(launch, command):
    assert launch.again("-m ptst.train") == command


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, r"a launcher has started 2 \(WORLD_SIZE\)"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, r"srun has started 4 \(SLURM_NTASKS\)"),
        ({"SLURM_NTASKS": "4"}, ""),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, ""),
    ],
)
def test_a_command_of_one_process_does_not_run_once_for_each_rank(environ, launcher, monkeypatch, tmp_path):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for command, config in (
        (run_evaluation, EvalConfig(model="nowhere", out=tmp_path / "out")),
        (run_alignment, AlignConfig(model="nowhere", out=tmp_path / "out")),
    ):
        wanted = f"computes in one process, and {launcher}; start one" if launcher else "there is no model folder"
        with pytest.raises(UserError, match=wanted):
            command(config)
    assert not (tmp_path / "out").exists()


def ranks(rank: int, size: int, _port: int, out: Path, ports: dict[str, int], works: dict[str, Callable]) -> None:
    """One rank, which takes part in one work after another; what it is told of each, and when, goes into a file."""
    # A short grace is for works that nothing but its end ends: elsewhere a slow machine would have a rank killed.
    heartbeat.BEAT, heartbeat.GRACE, agreement.PATIENCE = 0.05, 60.0, 0.3
    os.dup2(os.open(out / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)
    found = []
    for name, work in works.items():
        as_torchrun(rank, size, ports[name])
        try:
            work(rank)
            told = "done"
        except UserError as error:
            told = str(error)
        found.append((told, time.monotonic()))
        (out / f"{rank}.json").write_text(json.dumps(found))


def told(out: Path, works: dict[str, Callable], size: int = 2) -> dict[str, list[str]]:
    """What the ranks are told of each work."""
    with ExitStack() as held:
        start(ranks, size, out, {name: held.enter_context(held_port()) for name in works}, works)
    found = [[text for text, _ in json.loads((out / f"{r}.json").read_text())] for r in range(size)]
    return dict(zip(works, map(list, zip(*found, strict=True)), strict=True))


class Train:
    """A run whose settings a rank may change, with as much free memory as a rank has."""

    def __init__(self, config: TrainConfig, change: Change | None = None, free: dict[int, int] | None = None):
        self.config, self.change, self.free = config, change, free

    def __call__(self, rank: int) -> None:
        if self.free:
            memory.free_memory = lambda _device: self.free[rank]
        run_training(self.change(rank, self.config) if self.change else self.config)


def other_lr(rank, c):
    return replace(c, lr=1e-3) if rank else c


def other_data(rank, c):
    return replace(c, data=str(Path(c.data).with_name("other.jsonl"))) if rank else c


def other_model(rank, c):
    return replace(c, model=str(Path(c.model).with_name("other"))) if rank else c


def other_folder(rank, c):
    return replace(c, out=c.out / "elsewhere") if rank else c


def dry_run(rank, c):
    return replace(c, dry_run=bool(rank))


def other_kernels(rank, c):
    os.environ["PTST_KERNELS"] = "reference" if rank else ""
    return c


def other_code(rank, c):
    os.environ["PTST_KERNELS"] = ""
    agreement.code_fingerprint = lambda *_packages: str(rank)
    return c


DIFFERENT = {
    "rank 1 has other settings than rank 0": dry_run,
    "rank 1 has other settings than rank 0; give every rank the same flags and configuration": other_lr,
    "rank 1 has other data than rank 0; give every rank the same files": other_data,
    "rank 1 has other weights than rank 0; give every rank the same model folder": other_model,
    "rank 1 does not see the run folder of rank 0": other_folder,
    "rank 1 has other kernels than rank 0; set PTST_KERNELS to the same for every rank": other_kernels,
    "rank 1 has other versions than rank 0; give every rank the same versions of ptst and torch": other_code,
}


@pytest.mark.timeout(120)
def test_ranks_that_differ_are_told_before_the_run_begins(tiny_folder, tmp_path):
    for name, text in (("rows", "Yes."), ("other", "Not.")):
        (tmp_path / f"{name}.jsonl").write_text(4 * (json.dumps({"question": "Is it?", "answer": text}) + "\n"))
    for name in ("model", "other"):
        shutil.copytree(tiny_folder, tmp_path / name)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({k: 2 * v for k, v in weights.items()}, tmp_path / "other" / "model.safetensors")
    config = replace(CONFIG, model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), val_data=None)
    config = replace(config, out=tmp_path / "run")
    for wanted, texts in told(tmp_path, {w: Train(config, change) for w, change in DIFFERENT.items()}).items():
        assert all(text.startswith(wanted) for text in texts), (wanted, texts)
    assert not (tmp_path / "run").exists()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def compare_weights(rank: int) -> None:
    with parallel.world() as world:
        for weight in (torch.zeros(3), torch.full((3,), float(rank))):
            agreement.check_weights(Steps([Step(0.0, [0, 1])]), {"weight": weight}, world)


def compare_steps(rank: int) -> None:
    with parallel.world() as world:
        agreement.check_weights(Steps([Step(0.0, [0, 1 + rank])]), {"weight": torch.zeros(3)}, world)


def smallest_micro_batch(rank: int) -> None:
    with parallel.world() as world:
        assert world.min(7.0 - rank) == 6.0
        assert world.gather(bytes([rank, 5])) == [b"\x00\x05", b"\x01\x05"]


@pytest.mark.timeout(120)
def test_ranks_compare_what_they_have_planned_and_loaded(tmp_path):
    works = {"weights": compare_weights, "steps": compare_steps, "numbers": smallest_micro_batch}
    found = told(tmp_path, works)
    assert found["weights"] == 2 * ["rank 1 has other weights than rank 0; give every rank the same model folder"]
    assert all(text.startswith("rank 1 has other data than rank 0") for text in found["steps"])
    assert found["numbers"] == ["done", "done"]


@pytest.mark.timeout(120)
def test_the_micro_batch_is_the_smallest_that_a_rank_would_choose(tiny_folder, tmp_path):
    """With rank 0's larger ones, examples would be trained on twice, and others never."""
    config = replace(CONFIG, model=str(tiny_folder), micro_batch_tokens="auto", out=tmp_path / "two")
    assert told(
        tmp_path, {"run": Train(config, free={0: 10**10, 1: 20 * 10**6 + int(memory.LIBRARIES / memory.SHARE)})}
    )["run"] == ["done", "done"]
    size = json.loads((tmp_path / "two" / "run.json").read_text())["micro_batch_tokens"]
    assert size < 4096
    assert (tmp_path / "1.stderr").read_text() == ""  # rank 0 alone has words
    assert (tmp_path / "0.stderr").read_text().count("ptst.train: ") == 1
    run_training(replace(config, micro_batch_tokens=size, out=tmp_path / "one"))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def fail(rank: int) -> None:
    """Rank 1 has an error of its own while rank 0 waits in a collective operation that notices."""
    with parallel.world() as world:
        if rank:
            raise UserError("the disk is full")
        world.barrier()


def be_killed(rank: int) -> None:
    with parallel.world() as world:
        world.barrier()
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()


def fail_unnoticed(rank: int) -> None:
    """As `fail`, where nothing interrupts what rank 0 waits in, as over nccl."""
    heartbeat.GRACE = 1.0
    with parallel.world():
        if rank:
            raise UserError("the disk is full")
        time.sleep(240)


def fall_silent(rank: int) -> None:
    heartbeat.SILENT = heartbeat.GRACE = 1.0
    with parallel.world():
        if rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(240)


@pytest.mark.parametrize(
    ("work", "text", "code"),
    [
        (fail, "rank 1 failed: the disk is full", 0),
        (be_killed, "rank 1 ended without a word: killed, or its machine is gone", 0),
        (fail_unnoticed, "rank 1 failed: the disk is full", 1),
        (fall_silent, "rank 1 has given no sign for 1 s: killed, or its machine is gone", 1),
    ],
)
def test_a_rank_that_is_gone_ends_the_others(tmp_path, work, text, code):
    context = multiprocessing.get_context("forkserver")
    with held_port() as port:
        arguments = (2, 0, tmp_path, {"it": port}, {"it": work})
        waiting, going = (context.Process(target=ranks, args=(r, *arguments)) for r in range(2))
        waiting.start()
        going.start()
        waiting.join(200)
        going.kill()
    assert waiting.exitcode == code
    found = tmp_path / "0.json"
    assert text in (json.loads(found.read_text())[0][0] if found.exists() else (tmp_path / "0.stderr").read_text())
    assert found.exists() == (code == 0)


def test_a_rank_that_never_comes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "TO_COME", timedelta(seconds=1))
    with held_port() as port:
        for name, value in {**TWO, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="rank 0 of 2 did not meet the others"), parallel.world():
            pass
