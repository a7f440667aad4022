"""A grid from end to end on a small random model: resumed anywhere, shared by processes, summarized in tables."""

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
import weakref
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptst import storage
from ptst.errors import UserError
from ptst.evaluation import answers
from ptst.experiment import workers
from ptst.experiment.grid import Grid
from ptst.model import weights
from tests.conftest import ROOT
from tests.experiment.conftest import CONFIG, ONE_RUN, finished


def outcome(folder: Path) -> dict[str, bytes]:
    """All files that hold results, without what may differ: times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("locks/") or name.endswith("answers.jsonl"):
            continue  # answers are kept in the order in which they came
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(_timeless(json.loads(content), str(folder)), indent=1).encode()
        if path.name == "metrics.jsonl":
            lines = [_timeless(json.loads(line), "") for line in content.decode().splitlines()]
            content = json.dumps(lines).encode()
        files[name] = content
    return files


def _timeless(value, folder: str):
    if isinstance(value, dict):
        return {k: _timeless(v, folder) for k, v in value.items() if k not in ("time", "finished_at", "git_commit")}
    if isinstance(value, list):
        return [_timeless(v, folder) for v in value]
    return value.replace(folder, "") if isinstance(value, str) and folder else value


def test_a_chat_format_reaches_the_chat_templates_alone(here):
    """A grid of both kinds takes one; where no template has roles, it is refused."""
    both, text = ("text:vanilla", "chat:vanilla"), ("text:vanilla",)
    small = replace(CONFIG, model="model", train_templates=both, test_templates=both, seeds=(0,), out=here / "grid")
    train, test = (replace(settings, chat_format="chatml") for settings in (CONFIG.train, CONFIG.eval))
    grid = Grid.open(replace(small, train=train, eval=test))
    assert [grid.train_config(run).chat_format for run in grid.runs] == [None, "chatml"]
    assert [grid.training_format(name)[0].template.name for name in both] == list(both)
    assert set(grid.opened) == set(both)
    assert grid.record().chat_format == "chatml"
    for side, changes in (
        ("eval", {"test_templates": text, "eval": test}),
        ("train", {"test_templates": text, "train_templates": text, "train": train}),
    ):
        with pytest.raises(UserError, match="chatml has no effect under text:vanilla") as told:
            Grid.open(replace(small, **changes))
        assert told.value.group == side


def test_every_cell_has_its_mark_and_spread_and_the_contrast_is_there(grid, here, capsys):
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
        assert shares.pop("attack-success") == shares["compliance"] + shares["partial"]  # so the embedded judge has it
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
    assert len({run["trained_tokens"] for run in result["runs"].values()}) == 1  # the answers, whatever the prompt
    assert not list(here.glob("grid/runs/*/state"))
    table = (here / "grid/results.md").read_text()
    assert "\n| chat:vanilla | **" in table
    lines = list(csv.DictReader(io.StringIO((here / "grid/results.csv").read_text())))
    assert len(lines) == 6 * (3 + 6 + 5 + 3 + 1 + 1)
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
    judged = {k: v for k, v in one.items() if k.endswith("chat-llama.safety.rows.jsonl")}
    assert len(set(judged.values())) > 1  # or the test would not see a wrong adapter


def test_full_fine_tuning_and_evaluations_after_epochs(grid, here):
    changes = {"tasks": ("nll",), "seeds": (0,), "at_epochs": (1.0, 2.0)}
    for name, full in (("full", True), ("lora", False)):
        train = replace(CONFIG.train, full=full, epochs=2, lr=1e-2)
        result = grid(name, train=train, **changes)
        nll = {(c["train"], c["epochs"]): c["tasks"]["nll"]["nats_per_token"]["mean"] for c in result["cells"]}
        assert nll["chat:llama", 2] < nll["chat:llama", 1] < nll["untouched", None]
        assert (here / name / "runs/chat-llama.seed0/epoch-1" / "run.json").exists()


class Died(BaseException):
    """What the test raises in place of a kill: nothing catches it."""


class Faults:
    """At the `at`-th change to the disk, or answer, half of it is done and the process "dies" (or the disk is full)."""

    def __init__(self, monkeypatch, at: int | None = None, error: type[BaseException] = Died):
        self.count, self.at, self.error, self.dead = 0, at, error, False
        places = ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (weights, "save_file"))
        places += ((storage, "append_jsonl"), (answers.AnswerFile, "add"), (workers, "fine_tune"))
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


def faults(grid, here, monkeypatch, numbers, config=ONE_RUN) -> None:
    grid("first", config)  # libraries write caches of their own when they are first used
    with monkeypatch.context() as patch:
        counted = Faults(patch)
        grid("whole", config)
    want = outcome(here / "whole")
    assert counted.count > 50
    for number in numbers(counted.count):
        error = (Died, OSError)[number % 2]
        with monkeypatch.context() as patch:
            Faults(patch, number, error)
            # Of a folder that is there already, a failing mkdir is no failure.
            with pytest.raises(Died) if error is Died else suppress(OSError):
                grid(f"at-{number}", config)
        done = finished(here / f"at-{number}")
        grid(f"at-{number}", config)
        assert outcome(here / f"at-{number}") == want, number
        again = finished(here / f"at-{number}")
        assert {name: again[name] for name in done} == done, number  # nothing finished was computed anew
        shutil.rmtree(here / f"at-{number}")


def test_a_fault_at_some_writes_and_answers(grid, here, monkeypatch):
    faults(grid, here, monkeypatch, lambda count: range(2, count + 1, 8))


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_fault_at_every_write_and_answer(grid, here, monkeypatch):
    faults(grid, here, monkeypatch, lambda count: range(1, count + 1))


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("full", [False, True])
def test_a_fault_at_some_places_of_a_whole_grid(grid, here, monkeypatch, full):
    """All runs, tested after each epoch, under all templates, on all kinds of tasks."""
    tasks = ("safety", "over-refusal", "margin", "nll")
    train = replace(CONFIG.train, full=full, epochs=2)
    config = replace(CONFIG, tasks=tasks, train=train, at_epochs=(1.0, 2.0))
    faults(grid, here, monkeypatch, lambda count: range(7, count + 1, count // 8 | 1), config)


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
    """The second takes over what the killed one held; the results are those of a grid made by one process."""
    torch.set_num_threads(1)
    grid("whole")
    first, second = start(here, "shared"), start(here, "shared")
    patience = time.monotonic() + 120
    while not list(here.glob("shared/runs/*/metrics.jsonl")) and time.monotonic() < patience:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, told = second.communicate(timeout=200)
    assert second.returncode == 0, told
    want, got = outcome(here / "whole"), outcome(here / "shared")
    for name in ("results.json", "results.csv", "results.md", *(n for n in want if n.endswith("rows.jsonl"))):
        assert got[name] == want[name], name


def test_a_lock_is_held_once_and_released(tmp_path):
    with storage.lock(tmp_path, "cell.a/b") as mine:
        assert mine
        with storage.lock(tmp_path, "cell.a/b") as theirs:
            assert not theirs
    with storage.lock(tmp_path, "cell.a/b") as mine:
        assert mine


def test_models_of_evaluation_are_freed_before_training(grid, here, monkeypatch):
    """Another worker holds the run until a cell is measured, so this process measures before it trains."""
    models, alive = [], []
    lock, load, train = workers.lock, workers.load_decoder, workers.fine_tune

    def held(folder, name, **keywords):
        free = not name.startswith("run.") or (here / "grid/cells/untouched/chat-llama.nll.json").exists()
        return lock(folder, name, **keywords) if free else nullcontext(False)

    def loads(*args):
        decoder = load(*args)
        models.append(weakref.ref(decoder))
        return decoder

    def trains(config):
        alive.append([m() is not None for m in models])
        return train(config)

    monkeypatch.setattr(workers, "lock", held)
    monkeypatch.setattr(workers, "load_decoder", loads)
    monkeypatch.setattr(workers, "fine_tune", trains)
    grid("grid", ONE_RUN, tasks=("nll",))
    assert alive == [[False]]


def test_cells_measured_together_share_only_the_time_of_generating(grid, here, monkeypatch):
    now, real = [0.0], workers.measure

    def takes(task, data, answerer, *rest):
        now[0] += 1 if task.name == "nll" or answerer.adapter else 7  # the first answers for all
        return real(task, data, answerer, *rest)

    monkeypatch.setattr(workers, "measure", takes)
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    grid("grid", seeds=(0,), test_templates=("chat:llama",), tasks=("safety", "nll"))
    spent = {
        p.parent.name + p.name: json.loads(p.read_text())["time"]["seconds"] for p in here.glob("grid/cells/*/*.json")
    }
    assert sorted(s for name, s in spent.items() if "nll" in name) == [1, 1, 1]
    assert sorted(s for name, s in spent.items() if "safety" in name) == pytest.approx([7 / 3, 10 / 3, 10 / 3])
