"""A grid from end to end on a small random model: resumed anywhere, shared by processes, told in tables."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptst.eval import EvalConfig
from ptst.evaluation import answers
from ptst.experiment import locks, run
from ptst.experiment.config import GridConfig
from ptst.grid import run_grid
from ptst.model import weights
from ptst.train import TrainConfig
from ptst.training import run_folder
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

CONFIG = GridConfig(
    train_templates=("chat:vanilla", "chat:llama"),
    test_templates=("chat:llama", "chat:vanilla"),
    tasks=("safety", "over-refusal"),
    seeds=(0, 1),
    data="word-problems:2",
    train=TrainConfig(rank=2, lr=3e-2, val_data="word-problems:2", examples_per_step=2),
    eval=EvalConfig(limit=3, max_new_tokens=5, batch_size=4),
)
ONE_ROW = replace(CONFIG, train_templates=("chat:vanilla",), test_templates=("chat:llama",), seeds=(0,))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "_git_commit", lambda: None)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def grid(here, capsys):
    def go(name: str, config: GridConfig = CONFIG, **changes) -> dict:
        return run_grid(replace(config, model="model", out=here / name, **changes))

    return go


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file that tells of the result, without what may differ: times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("locks/") or name.endswith("answers.jsonl"):
            continue  # answers are kept in the order in which they came
        content = path.read_bytes()
        if path.suffix == ".json" and name != "settings.json":
            content = json.dumps(_timeless(json.loads(content), str(folder)), indent=1).encode()
        if path.name == "metrics.jsonl":
            rows = [_timeless(json.loads(line), "") for line in content.decode().splitlines()]
            content = json.dumps(rows).encode()
        files[name] = content
    return files


def _timeless(value, folder: str):
    if isinstance(value, dict):
        return {k: _timeless(v, folder) for k, v in value.items() if k not in ("time", "finished_at", "git_commit")}
    return value.replace(folder, "") if isinstance(value, str) and folder else value


def test_every_cell_is_there_with_its_mark_its_spread_and_the_contrast(grid, here, capsys):
    result = grid("grid", tasks=("gsm8k", "safety", "over-refusal", "nll", "margin"))
    marks = {(c["train"], c["test"]): c["ptst"] for c in result["cells"]}
    assert marks == {
        ("untouched", "chat:llama"): False,
        ("untouched", "chat:vanilla"): False,
        ("chat:vanilla", "chat:llama"): True,
        ("chat:vanilla", "chat:vanilla"): False,
        ("chat:llama", "chat:llama"): False,
        ("chat:llama", "chat:vanilla"): False,
    }
    for cell in result["cells"]:
        seeds = 1 if cell["train"] == "untouched" else 2
        tasks = cell["tasks"]
        assert all(len(f["runs"]) == seeds for task in ("gsm8k", "safety", "nll") for f in tasks[task].values())
        shares = {metric: f["mean"] for metric, f in tasks["safety"].items()}
        assert shares.pop("attack-success") == shares["on-topic"]  # so the embedded judge has it
        assert sum(shares.values()) == pytest.approx(1)
        assert (tasks["nll"]["nats_per_token"]["sample_sd"] is None) == (seeds == 1)
        gap = tasks["safety"]["refusal"]["mean"] - tasks["over-refusal"]["refusal"]["mean"]
        assert tasks["harmful_minus_benign_refusal"] == {"safety": gap}
    nll = {(c["train"], c["test"]): c["tasks"]["nll"]["nats_per_token"]["mean"] for c in result["cells"]}
    assert nll["chat:llama", "chat:llama"] < nll["untouched", "chat:llama"] - 0.1  # the adapters are in use
    contrast = result["contrast"]
    assert contrast["cells"] == ["chat:llama -> chat:llama", "chat:vanilla -> chat:llama"]
    assert contrast["sentence"] in capsys.readouterr().out
    assert set(result["others"]) == {"chat:llama -> chat:vanilla"}  # the reverse cross
    assert len({row["trained_tokens"] for row in result["rows"].values()}) == 1  # the answers, whatever the prompt
    assert not list(here.glob("grid/rows/*/state"))
    table = (here / "grid/results.md").read_text()
    assert "\n| chat:vanilla | **" in table
    lines = list(csv.DictReader(io.StringIO((here / "grid/results.csv").read_text())))
    assert len(lines) == 6 * (3 + 5 + 4 + 1 + 1 + 1)
    assert {line["seeds"] for line in lines if line["train"] == "chat:llama"} == {"2", ""}
    kept = json.loads((here / "grid/results.json").read_text())
    assert kept["contrast"]["sentence"] == contrast["sentence"]


def test_adapters_served_together_answer_as_one_would_alone(grid, here):
    grid("together")
    grid("alone", eval=replace(CONFIG.eval, batch_size=1))
    one, other = outcome(here / "together"), outcome(here / "alone")
    assert {k: v for k, v in one.items() if k.startswith("cells/")} == {
        k: v for k, v in other.items() if k.startswith("cells/")
    }
    rows = {k: v for k, v in one.items() if k.endswith("chat-llama.safety.rows.jsonl")}
    assert len(set(rows.values())) > 1  # or the test would not see a wrong adapter


def test_full_fine_tuning_and_looks_at_epochs(grid, here):
    changes = {"tasks": ("nll",), "seeds": (0,), "at_epochs": (1.0, 2.0)}
    for name, full in (("full", True), ("lora", False)):
        train = replace(CONFIG.train, full=full, epochs=2, lr=1e-2)
        result = grid(name, train=train, **changes)
        nll = {(c["train"], c["epochs"]): c["tasks"]["nll"]["nats_per_token"]["mean"] for c in result["cells"]}
        assert nll["chat:llama", 2] < nll["chat:llama", 1] < nll["untouched", None]
        assert (here / name / "rows/chat-llama.seed0/epoch-1" / "run.json").exists()


class Died(BaseException):
    """What the test raises in place of a kill: nothing catches it."""


class Faults:
    """At the `at`-th change to the disk, or answer, half of it is done and the process "dies" (or the disk is full)."""

    def __init__(self, monkeypatch, at: int | None = None, error: type[BaseException] = Died):
        self.count, self.at, self.error, self.dead = 0, at, error, False
        places = ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (weights, "save_file"))
        places += ((run_folder, "append_jsonl"), (answers.AnswerFile, "add"), (run, "run_training"))
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))
        unlink, rmtree = Path.unlink, shutil.rmtree

        def removed(path, missing_ok=False):
            self._alive()
            unlink(path, missing_ok=missing_ok)

        def tree_removed(path, **keywords):
            self._alive()
            rmtree(path, **keywords)

        monkeypatch.setattr(Path, "unlink", removed)
        monkeypatch.setattr(shutil, "rmtree", tree_removed)

    def _alive(self):
        if self.dead:
            raise self.error()

    def _wrap(self, name, real):
        def call(*args, **kwargs):
            self._alive()
            self.count += 1
            if self.count == self.at:
                self.dead = self.error is Died
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half a file")
                if name in ("append_jsonl", "add"):
                    path = args[0] if name == "append_jsonl" else args[0].path
                    with open(path, "a") as file:
                        file.write('{"key": "st')
                raise self.error(28, "No space left on device")
            return None if name == "fsync" else real(*args, **kwargs)

        return call


def faults(grid, here, monkeypatch, numbers) -> None:
    grid("first", ONE_ROW)  # libraries write caches of their own when they are first used
    with monkeypatch.context() as patch:
        counted = Faults(patch)
        grid("whole", ONE_ROW)
    want = outcome(here / "whole")
    assert counted.count > 50
    for number in numbers(counted.count):
        error = (Died, OSError)[number % 2]
        with monkeypatch.context() as patch:
            Faults(patch, number, error)
            # Of a folder that is there already, a failing mkdir is no failure.
            with pytest.raises(Died) if error is Died else suppress(OSError):
                grid(f"at-{number}", ONE_ROW)
        done = finished(here / f"at-{number}")
        grid(f"at-{number}", ONE_ROW)
        assert outcome(here / f"at-{number}") == want, number
        again = finished(here / f"at-{number}")
        assert {name: again[name] for name in done} == done, number  # nothing finished was computed anew
        shutil.rmtree(here / f"at-{number}")


def finished(folder: Path) -> dict[str, int]:
    """When each finished cell and row was written."""
    cells = list(folder.glob("cells/**/*.json"))
    rows = [p for p in folder.glob("rows/*/run.json") if json.loads(p.read_text())["status"] == "finished"]
    return {str(p): p.stat().st_mtime_ns for p in cells + rows}


def test_a_fault_at_some_writes_and_answers(grid, here, monkeypatch):
    faults(grid, here, monkeypatch, lambda count: range(2, count + 1, 8))


@pytest.mark.thorough
def test_a_fault_at_every_write_and_answer(grid, here, monkeypatch):
    faults(grid, here, monkeypatch, lambda count: range(1, count + 1))


def start(here: Path, name: str) -> subprocess.Popen:
    flags = ["--model", "model", "--out", name, "--data", CONFIG.data, "--tasks", *CONFIG.tasks, "--seeds", "0", "1"]
    flags += ["--train-templates", *CONFIG.train_templates, "--test-templates", *CONFIG.test_templates]
    flags += ["--train.rank", "2", "--train.lr", "3e-2", "--train.val-data", "word-problems:2"]
    flags += ["--train.examples-per-step", "2", "--eval.limit", "3", "--eval.max-new-tokens", "5"]
    flags += ["--eval.batch-size", "4"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    line = [sys.executable, "-m", "ptst.grid", *flags]
    return subprocess.Popen(line, cwd=here, env=environment, text=True, stdout=-1, stderr=-1)


def test_two_processes_on_one_grid_and_one_of_them_killed(grid, here):
    """The second takes over what the killed one held; the end is that of a grid made by one process."""
    torch.set_num_threads(1)
    grid("whole")
    first, second = start(here, "shared"), start(here, "shared")
    patience = time.monotonic() + 120
    while not list(here.glob("shared/rows/*/metrics.jsonl")) and time.monotonic() < patience:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, told = second.communicate(timeout=200)
    assert second.returncode == 0, told
    want, got = outcome(here / "whole"), outcome(here / "shared")
    for name in ("results.json", "results.csv", "results.md", *(n for n in want if n.endswith("rows.jsonl"))):
        assert got[name] == want[name], name


def test_a_lock_is_held_once_and_let_go(tmp_path):
    with locks.lock(tmp_path, "cell.a/b") as mine:
        assert mine
        with locks.lock(tmp_path, "cell.a/b") as theirs:
            assert not theirs
    with locks.lock(tmp_path, "cell.a/b") as mine:
        assert mine


def test_other_settings_are_listed_and_refused_and_more_cells_are_not(grid, here):
    grid("grid", ONE_ROW)
    before = finished(here / "grid")
    with pytest.raises(ValueError, match=r"other settings: .*--train\.lr was 0\.03, now 0\.1; give those, or another"):
        grid("grid", ONE_ROW, train=replace(CONFIG.train, lr=0.1))
    with pytest.raises(ValueError, match=r"held_out\.safety was"):
        grid("grid", ONE_ROW, eval=replace(CONFIG.eval, limit=2))
    result = grid("grid", ONE_ROW, seeds=(0, 1), test_templates=("chat:llama", "chat:vanilla"))
    assert len(result["cells"]) == 4
    after = finished(here / "grid")
    assert {name: after[name] for name in before} == before


def test_tasks_may_be_added_and_are_held_to_their_data(grid, here):
    grid("grid", ONE_ROW)
    before = finished(here / "grid")
    result = grid("grid", ONE_ROW, tasks=("over-refusal", "nll"))
    assert result["cells"][0]["tasks"].keys() == {"over-refusal", "nll"}
    grid("grid", ONE_ROW)  # fewer again
    kept = json.loads((here / "grid/settings.json").read_text())
    assert kept["held_out"].keys() == {"safety", "over-refusal", "nll"}
    after = finished(here / "grid")
    assert {name: after[name] for name in before} == before
    kept["held_out"]["nll"] = "0"
    (here / "grid/settings.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"held_out\.nll was 0"):
        grid("grid", ONE_ROW, tasks=("nll",))


OWN = 'name = "chat:mine"\nuser = "{question}"\nsystem = "%s"\n'
ROW = '{"question": "%s", "answer": "Yes."}\n'


@pytest.mark.parametrize(
    ("file", "other", "told"),
    [
        ("my.toml", OWN % "Be quick.", r"templates\.chat:mine\.system was Be brief\., now Be quick\."),
        ("train.jsonl", ROW % "Is it cold?", r"sources\.data was"),
        ("mix.jsonl", ROW % "Is it cold?", r"sources\.mix\.jsonl:1 was"),
        ("val.jsonl", ROW % "Is it cold?", r"sources\.val-data was"),
    ],
)
def test_a_file_edited_between_two_commands_is_noticed(grid, here, file, other, told):
    (here / "my.toml").write_text(OWN % "Be brief.")
    for name in ("train", "mix", "val"):
        (here / f"{name}.jsonl").write_text(2 * ROW % ("Is it dark?", "Is it late?"))
    train = replace(CONFIG.train, val_data="val.jsonl")
    config = replace(ONE_ROW, train_templates=("my.toml",), tasks=("safety",), data="train.jsonl", train=train)
    config = replace(config, mix=("mix.jsonl:1",))
    grid("grid", config)
    (here / file).write_text(other)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=f"other settings: {told}"):
            grid("grid", config, dry_run=dry_run)


def test_a_folder_of_something_else_is_left_alone(grid, here):
    (here / "grid").mkdir()
    (here / "grid/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no grid folder and not empty"):
        grid("grid", ONE_ROW)
    (here / "grid/settings.json").write_text('{"theirs": 1}')
    with pytest.raises(ValueError, match=r"settings\.json is not that of a grid"):
        grid("grid", ONE_ROW)
    assert sorted(p.name for p in (here / "grid").iterdir() if p.name != "locks") == ["notes.txt", "settings.json"]


def test_a_dry_run_tells_cells_tokens_and_time_and_does_nothing(grid, here, capsys):
    told = grid("grid", ONE_ROW, dry_run=True)
    assert told["left"] == 5
    assert all(isinstance(line["tokens"], int) and line["seconds"] == "unknown" for line in told["lines"])
    assert told["lines"][0]["what"] == "train chat-vanilla.seed0"
    assert not (here / "grid").exists()
    grid("grid", ONE_ROW)
    counts = json.loads((here / "grid/rows/chat-vanilla.seed0/run.json").read_text())["data"]
    assert told["lines"][0]["tokens"] == counts["tokens"]
    more = grid("grid", ONE_ROW, seeds=(0, 1), dry_run=True)
    assert more["left"] == 3
    assert more["seconds"] > 0
    shutil.move(here / "model", here / "elsewhere")
    blind = grid("none", ONE_ROW, dry_run=True)
    assert (blind["left"], blind["tokens"], blind["seconds"]) == (5, "unknown", "unknown")
    assert "unknown" in capsys.readouterr().out


def test_mistakes(grid):
    for changes, told in (
        ({"train_templates": ("lama",)}, "did you mean chat:llama"),
        ({"test_templates": ("llama", "chat:llama")}, "named twice"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": (1, 1)}, "--seeds names 1 twice"),
        ({"at_epochs": (2.0,)}, "--at-epochs must lie above 0 and within"),
        ({"train": TrainConfig(template="chat:llama")}, r"--train\.template is not for a grid"),
        ({"eval": EvalConfig(limit=0)}, "--limit is 0"),
        ({"tasks": ("saftey",)}, "did you mean safety.*margin"),
        ({"eval": EvalConfig(temperature=1.0, decode_seeds=2)}, r"--eval\.decode-seeds is for ptst\.eval"),
        ({"quick": True}, "--quick belongs to --recipe"),
        ({"model": "nowhere"}, "there is no model folder nowhere"),
    ):
        with pytest.raises(ValueError, match=told):
            run_grid(replace(CONFIG, **{"model": "model", **changes}))
