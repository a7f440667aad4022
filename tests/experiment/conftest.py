"""A small grid on a small random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptst import records
from ptst.evaluation.config import EvalSettings
from ptst.experiment.config import GridConfig
from ptst.grid import run_command as run_grid
from ptst.training.config import TrainSettings
from tests.tiny import write_tiny_model

CONFIG = GridConfig(
    train_templates=("chat:vanilla", "chat:llama"),
    test_templates=("chat:llama", "chat:vanilla"),
    tasks=("safety", "over-refusal"),
    seeds=(0, 1),
    data="word-problems:2",
    train=TrainSettings(rank=2, lr=3e-2, val_data="word-problems:2", examples_per_step=2),
    eval=EvalSettings(limit=3, max_new_tokens=5, batch_size=4),
)

ONE_RUN = replace(CONFIG, train_templates=("chat:vanilla",), test_templates=("chat:llama",), seeds=(0,))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "git_commit", lambda: None)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def grid(here, capsys):
    def go(name: str, config: GridConfig = CONFIG, **changes) -> dict:
        return run_grid(replace(config, model="model", out=here / name, **changes))

    return go


def finished(folder: Path) -> dict[str, int]:
    """When each finished cell and run was written."""
    cells = list(folder.glob("cells/**/*.json"))
    runs = [p for p in folder.glob("runs/*/run.json") if json.loads(p.read_text())["status"] == "finished"]
    return {str(p): p.stat().st_mtime_ns for p in cells + runs}
