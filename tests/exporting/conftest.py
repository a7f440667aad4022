"""A tiny model, and runs over it: an adapter, and all weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.tiny import write_tiny_model

SMALL = {"data": "word-problems:4", "val_data": "word-problems:2", "examples_per_step": 2, "lr": 0.02}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place") / "tiny-model"
    folder.mkdir()
    return write_tiny_model(folder)


def train(model: Path, out: Path, **settings) -> Path:
    fine_tune(TrainConfig(model=str(model), out=out, **SMALL | settings))
    return out


@pytest.fixture(scope="session")
def run(model, tmp_path_factory) -> Path:
    """An adapter, with checkpoints of both steps."""
    return train(model, tmp_path_factory.mktemp("runs") / "run", rank=2, save_every=1)


@pytest.fixture(scope="session")
def full_run(model, tmp_path_factory) -> Path:
    return train(model, tmp_path_factory.mktemp("runs") / "full-run", full=True)


@pytest.fixture
def copied(tmp_path, run):
    """A run's folder of one's own, to be changed; its files are links, so that nothing is copied."""

    def copy(source: Path = run, name: str = "copy") -> Path:
        for path in source.rglob("*"):
            if path.is_file():
                new = tmp_path / name / path.relative_to(source)
                new.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, new)
        return tmp_path / name

    return copy
