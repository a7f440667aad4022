"""Killed at any instant, a run ends as if it had not been: same weights to the bit, same metrics but for time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptst import records, storage
from ptst.errors import UserError
from ptst.generation.request import Answer
from ptst.model import weights
from ptst.storage import exclusive_lock
from ptst.train import run_training, start
from ptst.training import checkpoint, evaluate, metrics
from ptst.training.config import TrainConfig
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

CONFIG = TrainConfig(
    data="word-problems:4",
    val_data="word-problems:2",
    examples_per_step=2,
    rank=2,
    seed=3,
    eval_every=2,
    save_every=1,
    keep=1,
)


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nothing catches it."""


class Faults:
    """Counts every change to the disk and every step; at number `at`, half of it is done and the process "dies":
    whatever is tried afterwards, clean-up included, dies too."""

    def __init__(self, monkeypatch, at: int | None = None, error: type[BaseException] = Killed):
        self.count, self.at, self.error, self.dead = 0, at, error, False
        for owner, name in (
            (os, "replace"),
            (os, "rename"),
            (os, "fsync"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (weights, "save_file"),
            (storage, "append_jsonl"),
            (metrics.Metrics, "step"),
        ):
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))
        unlink = Path.unlink

        def removed(path, missing_ok=False):
            if self.dead:
                raise self.error()
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", removed)

    def _wrap(self, name, real):
        def call(*args, **kwargs):
            self.count += 1
            if self.dead:
                raise self.error()
            if self.count == self.at:
                self.dead = self.error is Killed
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half a file")
                if name == "append_jsonl":
                    with open(args[0], "a") as file:
                        file.write('{"kind": "step", "st')
                if name == "rmtree":
                    next(iter(Path(args[0]).iterdir())).unlink()
                raise self.error(28, "No space left on device")
            return None if name == "fsync" else real(*args, **kwargs)  # the disk's own time is not what is tested

        return call


def quick(_decoder, prompts, *_) -> list[Answer]:
    """In place of sampling, which takes most of so small a run's time."""
    return [Answer([70 + len(p) % 9], "", "stop") for p in prompts]


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """Runs CONFIG with changes into a folder of tmp_path."""
    monkeypatch.setattr(evaluate, "generate", quick)
    monkeypatch.setattr(records, "git_commit", lambda: None)

    def run(name: str, **changes):
        return run_training(replace(CONFIG, model=str(tiny_folder), out=tmp_path / name, **changes))

    return run


def outcome(run: Path) -> tuple:
    """What must not depend on interruptions."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stripped = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    samples = run / "samples.jsonl"
    return (run / "adapter_model.safetensors").read_bytes(), stripped, samples.read_bytes() if samples.exists() else b""


def finished(run: Path) -> bool:
    path = run / "run.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def test_a_fault_at_every_write_and_step(train, tmp_path, monkeypatch, capsys):
    train("whole")
    wanted = outcome(tmp_path / "whole")
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        train("counted")
    assert outcome(tmp_path / "counted") == wanted
    assert faults.count > 40
    for at in range(1, faults.count + 1):
        run = tmp_path / f"killed-{at}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Faults(patch, at)
            train(run.name)
        if not finished(run):
            train(run.name)
        assert outcome(run) == wanted, at
        assert list(run.rglob(".*")) == [run / ".lock"], at
        shutil.rmtree(run)


def test_a_full_disk_leaves_the_last_state_whole(train, tmp_path, monkeypatch, capsys):
    train("first")  # what is imported late makes folders of its own
    with monkeypatch.context() as patch:
        number = (counted := Faults(patch)) and train("whole") and counted.count
    saving = removing = 0
    for at in range(1, number + 1):
        run = tmp_path / f"full-{at}"
        with monkeypatch.context() as patch:
            Faults(patch, at, OSError)
            try:
                train(run.name)
            except OSError as error:
                told = str(error)
                assert "No space left" in told
            else:  # an old checkpoint that cannot be removed ends nothing
                assert "cannot be removed ([Errno 28] No space left on device)" in capsys.readouterr().err
                assert outcome(run) == outcome(tmp_path / "whole")
                removing += 1
                continue
        if "failed" not in told:
            continue
        saving += 1
        assert f"make room, then resume the run in {run}" in told
        assert all(checkpoint.read_checkpoint(p) for p in checkpoint.list_checkpoints(run / "state"))
        assert not list(run.glob("state/.*.partial"))
        if saving % 9 == 0:
            train(run.name)
            assert outcome(run) == outcome(tmp_path / "whole")
    assert saving > 20 and removing > 1


def test_a_damaged_state_gives_way_to_the_one_before(train, tmp_path, monkeypatch, capsys):
    long = {"epochs": 1.5, "keep": 3}
    train("whole", **long)
    for damage in ("flip", "cut", "missing", "torn json", "altered json"):
        shutil.copytree(tmp_path / "whole", tmp_path / damage)
        run = tmp_path / damage
        record = json.loads((run / "run.json").read_text()) | {"status": "running"}
        (run / "run.json").write_text(json.dumps(record))
        state = run / "state" / "step-00000003"
        path = state / ("state.json" if "json" in damage else "weights.safetensors")
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif damage == "altered json":
            path.write_bytes(data.replace(b'"step": 3', b'"step": 2'))
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2])
        capsys.readouterr()
        train(damage, **long)
        said = " ".join(capsys.readouterr().err.split())
        assert f"the checkpoint {state} is damaged: {path.name}" in said
        assert "resuming after step 2" in said
        assert outcome(run) == outcome(tmp_path / "whole")
    for state in (run / "state").glob("step-*"):
        (state / "optimizer.safetensors").write_bytes(b"")
    (run / "run.json").write_text(json.dumps(record))
    message = rf"none of the checkpoints in {run}/state is whole.*; remove the folder {run}/state to begin the run anew"
    with pytest.raises(UserError, match=message):
        train("altered json", **long)
    shutil.rmtree(run / "state")
    train("altered json", **long | {"keep": 1})
    assert outcome(run) == outcome(tmp_path / "whole")


def test_the_last_states_and_the_best_are_kept(train, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 8.5])
    monkeypatch.setattr("ptst.training.fine_tune.validation_loss", lambda *_: next(losses))
    result = train("run", epochs=3, keep=2, eval_every=1)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path / "run" / "state")]
    assert names == ["step-00000002", "step-00000005", "step-00000006"]
    assert result["validation_loss"] | {"examples": 0} == {
        "before": 9.0, "after": 8.5, "best": 4.0, "best_step": 2, "examples": 0
    }  # fmt: skip
    best = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "run" / "best" / "run.json").read_text())["steps"] == 2
    kept = load_file(tmp_path / "run" / "state" / "step-00000002" / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(best.values(), kept.values(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"lr was 0.0005, now 0.001;"),
        ({"template": "chat:llama"}, r"template.name was chat:vanilla, now chat:llama"),
        ({"data": "word-problems:7"}, r"data.encoding was .*; data was word-problems:4, now word-problems:7"),
        ({"mix": ("word-problems:4:1",)}, r"mix was \[\], now"),
        ({"seed": 4, "epochs": 2.0}, r"epochs was 1.0, now 2.0.*seed was 3, now 4"),
        ({"max_steps": 9}, r"max_steps was None, now 9 \(a run is as long as it was begun: the learning rate of each"),
    ],
)
def test_other_settings_are_refused_and_listed(train, tmp_path, monkeypatch, changes, message):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Faults(patch, 20)
        train("run")
    with pytest.raises(ValueError, match=rf"holds an unfinished ptst.train run of other settings: .*{message}"):
        train("run", **changes)
    train("run", micro_batch_tokens=1024)  # what is in memory at once may change


def test_another_model_is_refused(train, tmp_path, tmp_path_factory, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Faults(patch, 20)
        train("run")
    other = write_tiny_model(tmp_path_factory.mktemp("other"), seed=5)
    with pytest.raises(ValueError, match=r"weights was .*; model was .*"):
        run_training(replace(CONFIG, model=str(other), out=tmp_path / "run"))


def test_a_finished_run_is_not_run_over(train, tmp_path, capsys):
    result = train("run")
    with pytest.raises(ValueError, match="is not an empty folder"):
        train("run")
    again = run_training(TrainConfig(resume=tmp_path / "run"))
    assert json.loads(json.dumps(result)) == again
    assert "has finished already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no run.json"):
        run_training(TrainConfig(resume=tmp_path))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "--epochs",
            "2",
            r"epochs was 1.0, now 2.0 \(a run is as long as it was begun: the learning rate of each step",
        ),
        ("--max-steps", "9", r"max_steps was None, now 9 \(a run is as long"),
        ("--data", "word-problems:5", r"data was word-problems:4, now word-problems:5"),
    ],
)
def test_a_finished_run_does_not_go_on_with_other_settings_and_says_why(train, tmp_path, flag, value, message):
    train("run")
    resumed = start(["--resume", str(tmp_path / "run")])[0]
    run_training(replace(resumed, keep=5))  # what has no effect on a run may change
    name = flag.removeprefix("--").replace("-", "_")
    changed = replace(resumed, **{name: type(getattr(resumed, name) or 0)(value)})
    with pytest.raises(UserError, match=rf"run has finished, with other settings: {message}.*; leave those out, or"):
        run_training(changed)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_logs_that_are_shorter_than_the_checkpoint_says(train, tmp_path, monkeypatch, capsys, damage):
    """They are only logs: the weights are the same, and the run ends."""
    train("whole", epochs=2.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Faults(patch, 60)
        train("run", epochs=2.0)
    log = tmp_path / "run" / "metrics.jsonl"
    newest = checkpoint.read_checkpoint(checkpoint.list_checkpoints(log.parent / "state")[-1])
    known = log.read_bytes()[: newest["notes"]["sizes"]["metrics.jsonl"]]
    if damage == "cut":
        log.write_bytes(known[:-1])
    else:
        log.unlink()
    capsys.readouterr()
    train("run", epochs=2.0)
    told = " ".join(capsys.readouterr().err.split())
    assert "fewer than the" in told and "the run goes on, and so does the log" in told
    weights, rows, samples = outcome(tmp_path / "run")
    expected, all_rows, all_samples = outcome(tmp_path / "whole")
    assert (weights, samples) == (expected, all_samples)
    lost = {"cut": 1, "gone": known.count(b"\n")}[damage]
    assert 0 < len(rows) == len(all_rows) - lost and rows[-1] == all_rows[-1]


def test_full_fine_tuning_goes_on_too(train, tmp_path, monkeypatch):
    train("whole", full=True, epochs=2.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Faults(patch, 70)
        train("run", full=True, epochs=2.0)
    assert checkpoint.list_checkpoints(tmp_path / "run" / "state")
    train("run", full=True, epochs=2.0)
    whole, run = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "run"))
    assert whole == run


def test_one_process_at_a_time(train, tmp_path):
    (tmp_path / "run").mkdir()
    with exclusive_lock(tmp_path / "run"), pytest.raises(ValueError, match="in use by another process"):
        train("run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(train, tmp_path, monkeypatch, capfd, number, code):
    """save_every is far off: what is saved is saved because of the signal."""
    before = signal.getsignal(number)
    train("whole", save_every=100)
    step = metrics.Metrics.step
    with monkeypatch.context() as patch:
        patch.setattr(
            metrics.Metrics, "step", lambda self, r: (step(self, r), r.step == 1 and signal.raise_signal(number))
        )
        with pytest.raises(SystemExit) as stopped:
            train("run", save_every=100)
    run = tmp_path / "run"
    assert stopped.value.code == code
    said = " ".join(capfd.readouterr().err.split())
    assert "stopping after this step, which is saved first; press Ctrl-C again to stop now" in said
    assert f"stopped after step 1, which is saved; resume with: python -m ptst.train --resume {run}" in said
    assert [p.name for p in checkpoint.list_checkpoints(run / "state")] == ["step-00000001"]
    config = start(["--resume", str(run)])[0]
    assert (config.lr, config.resume, config.target_modules) == (CONFIG.lr, run, CONFIG.target_modules)
    run_training(config if number == signal.SIGINT else TrainConfig(resume=run))  # in Python as by command
    assert outcome(run) == outcome(tmp_path / "whole")
    assert signal.getsignal(number) == before


def test_a_real_sigkill(train, tiny_folder, tmp_path):
    settings = {"data": "word-problems:40", "epochs": 4.0, "save_every": 3, "eval_every": None}
    flags = "--data word-problems:40 --val-data word-problems:2 --examples-per-step 2 --rank 2 --seed 3 --keep 1"
    line = [sys.executable, "-m", "ptst.train", "--model", str(tiny_folder), "--out", str(tmp_path / "run")]
    line += [*flags.split(), "--epochs", "4", "--save-every", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(p.name > "step-00000007" for p in (tmp_path / "run" / "state").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not finished(tmp_path / "run")
    train("run", **settings)
    train("whole", **settings)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
