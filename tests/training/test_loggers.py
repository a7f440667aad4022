"""Experiment loggers: each step once, whatever happens to the run, and no run ends because of one."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from ptst import cli
from ptst.config_file import read_config
from ptst.errors import UserError
from ptst.training import log_backends
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from ptst.training.loggers import LOGGERS, check_loggers
from ptst.training.parallel import ALONE
from tests.conftest import ROOT

SMALL = {"data": "word-problems:6", "val_data": "word-problems:2", "examples_per_step": 1, "rank": 2, "lr": 1e-2}
SMALL |= {"save_every": 3, "eval_every": 3}
STEPS = 6
EXPECTED = {"step": list(range(1, STEPS + 1)), "eval": [0, 3, 6]}
SECRET = "sk-this-key-must-stay-here"


class Recorder:
    """A logger that keeps what it gets, also over the processes of a run. `kept`: rows by run folder."""

    kept: ClassVar[dict[str, list]] = {}

    def __init__(self, run):
        self.run, self.rows = run, self.kept.setdefault(str(run.folder), [])
        self.last: dict[str, int] = {}
        for step, kind, _ in self.rows:
            self.last[kind] = max(step, self.last.get(kind, -1))
        self.ended = ""

    def write(self, rows):
        self.rows += rows

    def close(self, status):
        self.ended = status
        self.run.notes["ended"] = status
        self.run.keep()

    @classmethod
    def steps(cls, folder: Path) -> dict[str, list[int]]:
        rows = cls.kept[str(folder)]
        return {kind: [step for step, k, _ in rows if k == kind] for kind in ("step", "eval")}


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "kept", {})
    monkeypatch.setattr("ptst.training.loggers.check_loggers", lambda names: None)
    monkeypatch.setitem(log_backends.BACKENDS, "trackio", Recorder)
    return Recorder


def config(model: Path, out: Path, *names: str, **changes) -> TrainConfig:
    return TrainConfig(model=str(model), out=out, log=names, **{**SMALL, **changes})


def test_a_logger_gets_the_figures_of_metrics_jsonl_and_the_settings(tiny_folder, tmp_path, recorder):
    run = tmp_path / "run"
    fine_tune(config(tiny_folder, run, "trackio"))
    assert recorder.steps(run) == EXPECTED
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for (step, kind, values), row in zip(recorder.kept[str(run)], rows, strict=True):
        assert (step, kind) == (row["step"], row["kind"])
        if kind == "eval":
            assert values == {"validation_loss": row["validation_loss"]}
        else:
            names = ("loss", "lr", "grad_norm")
            assert [values[name] for name in names] == [row[name] for name in names]
            assert values["tokens_per_second"] == row["time"]["tokens_per_second"]
    assert json.loads((run / "loggers.json").read_text()) == {"trackio": {"ended": "finished"}}
    assert (run / "samples.jsonl").exists()  # what no logger gets


def test_a_failing_logger_is_left_out_and_catches_up(tiny_folder, tmp_path, recorder, monkeypatch, capsys):
    run = tmp_path / "run"

    def fails(self, rows):
        raise RuntimeError("the dashboard is\n on fire")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", fails)
        patch.setattr("ptst.training.fine_tune._Session.evaluate_if_due", stop_after(4))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config(tiny_folder, run, "trackio"))
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("warning: trackio failed (the dashboard is on fire); the run goes on without it") == 1
    assert recorder.steps(run) == {"step": [], "eval": []}
    fine_tune(config(tiny_folder, run, "trackio"))
    assert recorder.steps(run) == EXPECTED


def stop_after(last: int):
    """Ends the run after a step like a kill, where nothing is saved."""
    from ptst.training.fine_tune import _Session

    real = _Session.evaluate_if_due

    def evaluate_if_due(self, report):
        if report.step == last:
            raise KeyboardInterrupt
        return real(self, report)

    return evaluate_if_due


@pytest.mark.parametrize("last", [1, 4, 5])
def test_a_resumed_run_has_each_step_once(tiny_folder, tmp_path, recorder, monkeypatch, last):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ptst.training.fine_tune._Session.evaluate_if_due", stop_after(last))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config(tiny_folder, run, "trackio"))
    assert json.loads((run / "loggers.json").read_text()) == {"trackio": {"ended": "interrupted"}}
    assert recorder.steps(run)["step"] == list(range(1, last + 1))
    recorder.kept[str(run)] = recorder.kept[str(run)][:-1]  # a kill may have taken the end
    fine_tune(TrainConfig(resume=run))  # the logger is among the run's settings
    assert recorder.steps(run) == EXPECTED


def test_a_logger_that_is_asked_for_later_gets_the_whole_run(tiny_folder, tmp_path, recorder, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ptst.training.fine_tune._Session.evaluate_if_due", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config(tiny_folder, run))
    assert not (run / "loggers.json").exists()
    fine_tune(config(tiny_folder, run, "trackio"))
    assert recorder.steps(run) == EXPECTED


def test_only_the_main_process_logs(tiny_folder, tmp_path, recorder):
    second = replace(ALONE, rank=1)
    with pytest.raises(UserError):  # its share of a batch is no example
        fine_tune(config(tiny_folder, tmp_path / "run", "trackio"), second)
    assert not recorder.kept


def test_a_missing_package_is_one_sentence_before_anything_is_read(monkeypatch):
    for name in LOGGERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"log {name} needs the package {name}; pip install 'ptst-lab\[{name}\]'"):
            check_loggers((name,))
        with pytest.raises(UserError, match="needs the package"):
            TrainConfig(log=(name,)).check()


def test_the_earlier_spelling_is_read(tmp_path, capsys):
    assert cli._renamed(["--tensorboard"]) == ["--log", "tensorboard"]
    assert cli._renamed(["--log", "wandb", "--tensorboard", "--lr", "1"]) == [
        "--log",
        "tensorboard",
        "wandb",
        "--lr",
        "1",
    ]
    assert cli._renamed(["--train.tensorboard"]) == ["--train.log", "tensorboard"]
    assert "note: --tensorboard is now --log tensorboard" in capsys.readouterr().err
    (tmp_path / "a.toml").write_text("tensorboard = true\nlr = 1e-3\n")
    assert read_config(tmp_path / "a.toml", TrainConfig(), "train").log == ("tensorboard",)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "train", "settings": {"tensorboard": True, "log": []}}))
    assert read_config(tmp_path / "run.json", TrainConfig(), "train").log == ("tensorboard",)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "train", "settings": {"tensorboard": False}}))
    assert read_config(tmp_path / "run.json", TrainConfig(), "train").log == ()


# The real packages, read with their own means: after an interruption here, and after a kill in a process of its own.


def read_tensorboard(run: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = {"step": "loss", "eval": "validation_loss"}
    return {kind: [event.step for event in events.Scalars(name)] for kind, name in names.items()}


def read_trackio(run: Path) -> dict[str, list[int]]:
    code = """
        import json, sys
        from trackio.sqlite_storage import SQLiteStorage
        (name,) = SQLiteStorage.get_runs("ptst")
        rows = SQLiteStorage.get_logs("ptst", name)
        print(json.dumps({kind: [r["step"] for r in rows if key in r] for kind, key in
              {"step": "loss", "eval": "validation_loss"}.items()}))
    """
    return json.loads(in_process(run, code))


def read_wandb(run: Path) -> dict[str, list[int]]:
    """From all parts, whose format is LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[int]] = {"step": [], "eval": []}
    parts = sorted((run / "wandb").glob("*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert not any(part.parent.is_symlink() for part in parts)
    for part in parts:
        data, place, record = part.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[place : place + 7])
            record += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                parsed = wandb_internal_pb2.Record.FromString(record)
                record = b""
                row = {"/".join(i.nested_key) or i.key: i.value_json for i in parsed.history.item}
                for name, key in (("step", "loss"), ("eval", "validation_loss")):
                    if key in row:
                        found[name].append(int(row["step"]))
    return found


def read_mlflow(run: Path) -> dict[str, list[int]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow/mlflow.db'}")
    (known,) = client.search_runs([client.get_experiment_by_name("ptst").experiment_id])
    assert known.info.status == "FINISHED" and known.data.params["lr"] == "0.01"
    names = {"step": "loss", "eval": "validation_loss"}
    return {k: [m.step for m in client.get_metric_history(known.info.run_id, name)] for k, name in names.items()}


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb, "mlflow": read_mlflow}
TRAIN = """
    import os, sys
    from pathlib import Path
    from tests.training.test_loggers import config, refuse_the_network
    refuse_the_network()
    from ptst.training import fine_tune
    real = fine_tune._Session.evaluate_if_due
    def evaluate_if_due(self, report):
        if report.step == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return real(self, report)
    fine_tune._Session.evaluate_if_due = evaluate_if_due
    out = Path(sys.argv[1])
    fine_tune.fine_tune(config(out.parent / "model", out, *sys.argv[3:]))
"""


def refuse_the_network() -> None:
    """No connection but to this machine."""
    import socket

    connect = socket.socket.connect

    def only_local(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            os.write(2, f"NETWORK {address}\n".encode())
            raise OSError("no network")
        return connect(self, address)

    def no_name(host, *rest, **kwargs):
        if host not in ("127.0.0.1", "::1", "localhost", None):
            os.write(2, f"NETWORK {host}\n".encode())
            raise socket.gaierror("no network")
        return lookup(host, *rest, **kwargs)

    lookup = socket.getaddrinfo
    socket.socket.connect, socket.getaddrinfo = only_local, no_name


def in_process(run: Path, code: str, *arguments: object, killed: bool = False) -> str:
    keys = dict.fromkeys(("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"), SECRET)
    own = {"TRACKIO_DIR": str(run.parent / "trackio"), "HOME": str(run.parent), "PYTHONPATH": str(ROOT)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(run), *map(str, arguments)],
        env={**kept, **own, **keys},
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == (-9 if killed else 0), done.stderr
    assert "NETWORK" not in done.stderr, done.stderr
    assert "warning" not in done.stderr.lower().replace("userwarning", ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("last", [2, 5])
def test_tensorboard_has_each_step_once_after_an_interruption(tiny_folder, tmp_path, monkeypatch, last):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ptst.training.fine_tune._Session.evaluate_if_due", stop_after(last))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config(tiny_folder, run, "tensorboard"))
    assert read_tensorboard(run)["step"] == list(range(1, last + 1))
    fine_tune(config(tiny_folder, run, "tensorboard"))
    assert read_tensorboard(run) == EXPECTED


@pytest.mark.thorough
def test_the_real_packages_have_each_step_once_after_a_kill(tiny_folder, tmp_path):
    """All that are installed, in the same run."""
    names = [name for name in LOGGERS if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("none of the extras tensorboard, trackio, wandb and mlflow is installed")
    (tmp_path / "model").symlink_to(tiny_folder)
    run = tmp_path / "run"
    in_process(run, TRAIN, 5, *names, killed=True)  # the last checkpoint is of step 3
    assert in_process(run, TRAIN, 0, *names) == ""
    for name in names:
        assert READERS[name](run) == EXPECTED, name
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "model")):
        assert SECRET.encode() not in path.read_bytes(), path
