"""Every figure of a grid's results is recomputed from its long table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.evaluation.test_long_table import recomputed
from tests.experiment.conftest import CONFIG


def test_the_long_table_has_every_cell_and_seed(grid, here):
    tasks = ("gsm8k", "safety", "nll")
    settings = replace(CONFIG.train, val_data=None)
    small = {"train_templates": ("chat:vanilla",), "train": settings, "tasks": tasks, "at_epochs": (1.0,)}
    result = grid("grid", data="word-problems:2", **small)
    table = pd.read_parquet(here / "grid/answers.parquet")
    assert set(table["kind"]) == {"grid"} and set(table["base_model"]) == {"model"}
    compared = 0
    for cell in result["cells"]:
        base = cell["train"] == "untouched"
        mine = table[table["test_template"] == cell["test"]]
        epochs = mine["epochs"].isna() if base else mine["epochs"] == cell["epochs"]
        mine = mine[epochs & (mine["model"] == "untouched" if base else mine["train_template"] == cell["train"])]
        for task, expected in cell["tasks"].items():
            if task == "harmful_minus_benign_refusal":
                continue
            lines = mine[mine["task"] == task]
            seeds = [recomputed(part, task) for _, part in lines.groupby(lines["train_seed"].fillna(0))]
            assert len(seeds) == (1 if base else 2)
            for metric, found in expected.items():
                mean = sum(each[metric] for each in seeds) / len(seeds)
                assert mean == pytest.approx(found["mean"]), (cell["train"], cell["test"], task, metric)
                compared += 1
    assert compared >= 2 * 2 * 10
    figures, lines = pd.read_parquet(here / "grid/results.parquet"), pd.read_csv(here / "grid/results.csv")
    shared = [name for name in lines if name in figures]
    assert len(shared) == 15
    pd.testing.assert_frame_equal(figures[shared], lines[shared], check_dtype=False)
    trained = table[table["train_template"].notna()]
    assert {(r, s) for r, s in zip(trained["run"], trained["train_seed"], strict=True)} == {
        (f"runs/chat-vanilla.seed{seed}", seed) for seed in (0, 1)
    }
    assert all((here / "grid" / run / "run.json").exists() for run in set(trained["run"]))
    assert set(table[table["task"] == "safety"]["judge"]) == {"rules-v3"}
    data = json.loads((here / "grid/results.json").read_text())["sets"]
    assert dict(zip(table["task"], table["data"], strict=True)) == data
    assert str(Path(here)) not in (here / "grid/answers.csv").read_text()
