"""Mistakes in `out` are told before a command reads, encodes or loads anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptst.data import sources
from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import align
from ptst.experiment.config import GridConfig
from ptst.experiment.run import run_grid
from ptst.text.prompt_format import PromptFormat
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune

MODEL = {"model": "model"}
COMMANDS = {
    "train": lambda out: fine_tune(TrainConfig(**MODEL, out=out)),
    "eval": lambda out: evaluate(EvalConfig(**MODEL, out=out)),
    "grid": lambda out: run_grid(GridConfig(**MODEL, out=out)),
    "align": lambda out: align(AlignConfig(**MODEL, out=out)),
}


def a_file(out: Path) -> Path:
    out.write_text("mine")
    return out


def below_a_file(out: Path) -> Path:
    return a_file(out) / "a" / "run"


def other_files(out: Path) -> Path:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    return out


def another_commands_run(out: Path) -> Path:
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"version": 2, "kind": "chat"}))
    return out


def not_writable(_out: Path) -> Path:
    return Path("/proc/run")


MISTAKES = [
    (a_file, r"out is not a folder; choose another out"),
    (below_a_file, r"out is not a folder, so .*out/a/run cannot be made; choose another out"),
    (other_files, r"not an empty folder|not a ptst.grid folder and not empty"),
    (another_commands_run, r"not an empty folder|not a ptst.grid folder and not empty"),
    (not_writable, r"nothing can be written in /proc \(.*\), so /proc/run cannot be made; choose another out"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_it_is_told_before_data_are_read(tiny_folder, tmp_path, monkeypatch, command, mistake, message):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_folder)
    for owner, name in ((sources, "load"), (PromptFormat, "encode")):
        monkeypatch.setattr(owner, name, lambda *_args, **_keywords: pytest.fail("data were read first"))
    with pytest.raises(UserError, match=message):
        COMMANDS[command](mistake(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) in (["model"], ["model", "out"])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_finished_run_is_told_before_data_are_read(tiny_folder, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_folder)
    small = {"model": "model", "out": Path("run")}
    if command == "train":
        fine_tune(TrainConfig(**small, data="word-problems:1", val_data="word-problems:1"))
    else:
        evaluate(EvalConfig(**small, tasks=("nll",), limit=1))
    monkeypatch.setattr(sources, "load", lambda *_args, **_keywords: pytest.fail("data were read first"))
    with pytest.raises(UserError, match="run is not an empty folder; choose another out, so that no earlier run is"):
        COMMANDS[command](Path("run"))
