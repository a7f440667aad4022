"""Dry runs of the paper's tables, with nothing here and with everything, and a small grid of such a recipe."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from ptst.experiment.config import GridConfig
from ptst.experiment.grid import Grid
from ptst.experiment.paper.beside import beside_paper
from ptst.experiment.paper.claims import claims
from ptst.experiment.paper.dry_run import plan_table
from ptst.experiment.paper.reader import load_paper
from ptst.experiment.paper.recipes import RECIPES
from ptst.experiment.run import plan_grid
from ptst.grid import run_command
from tests.experiment.conftest import CONFIG


@pytest.mark.parametrize("name", RECIPES)
def test_every_table_plans_without_model_and_data(name, capsys):
    done = run_command(GridConfig(recipe=name, dry_run=True, threads=1))
    printed = capsys.readouterr().out
    kinds = Counter(need["kind"] for need in done["paper"]["missing"])
    assert done["tokens"] is None
    assert done["seconds"] is None
    assert kinds["key"] == 1
    assert kinds["weights"] == {3: 0, 4: 2}.get(done["paper"]["table"], 1)
    assert done["left"] == done["paper"]["cells"] + sum(line["what"].startswith("train") for line in done["lines"])
    assert done["paper"]["paper_cells"] == len(load_paper().table(done["paper"]["table"]))
    assert "time on this machine" in printed
    assert "unknown, without" in printed
    assert "https://huggingface.co/datasets/" in printed
    assert "name another as --eval.judge" in printed
    assert "assumed, since the paper does not say: " in printed


def small(here, **changes) -> GridConfig:
    """Table 6 on a tiny model and built-in data."""
    config = GridConfig(recipe="paper-table-6", model="model", data="word-problems:2", out=here / "grid", seeds=(0,))
    config = replace(config, tasks=("gsm8k", "safety", "safety:fresh"), threads=1, **changes)
    defense = replace(config.defense, data="refusals:2")
    train = replace(CONFIG.train, val_data=None)
    return replace(config, train=train, eval=replace(CONFIG.eval, judge="rules-v3"), defense=defense)


def test_with_model_and_data_the_plan_counts_tokens_and_hours(here, capsys):
    plan = plan_table(small(here))
    assert plan.missing == []
    assert all(line.tokens and line.seconds for line in plan.lines)
    lines, _ = plan_grid(small(here))
    assert [(line.what, line.tokens) for line in plan.lines] == [(line.what, line.tokens) for line in lines]
    assert f"roughly {sum(line.seconds for line in plan.lines) / 3600:.1f} hours" in "\n".join(plan.told())
    assert plan.cells == len(Grid.open(small(here)).cells) == 3 * (1 + 3 + 3) * 2 + 3 * (1 + 3)


def test_a_grid_without_some_of_its_cells_has_results_and_tables(here, capsys):
    result = run_command(replace(small(here, train_templates=("chat:vanilla",), test_templates=("chat:llama",))))
    tasks = {(cell["train"], cell["defense"]): list(cell["tasks"]) for cell in result["cells"]}
    assert tasks["chat:vanilla", "none"] == ["safety", "safety:fresh"]
    assert tasks["chat:vanilla", "mix-safety"] == tasks["untouched", "none"] == ["gsm8k", "safety", "safety:fresh"]
    written = (here / "grid/results.md").read_text()
    assert "| chat:vanilla |  |" in written
    results = json.loads((here / "grid/results.json").read_text())
    plan = plan_table(small(here, train_templates=("chat:vanilla",), test_templates=("chat:llama",)))
    assert all(line.finished for line in plan.lines)
    (found,) = beside_paper(results)
    assert found.table == 6
    assert found.measured == 0  # problems and requests are our own
    assert "the model is model, the paper's Llama-2-7b-chat" in found.departures
    assert [claim.number for claim in claims(results)] == [1, 2, 3, 4, 5, 6]
    assert [c.lower.found is None for c in claims(results)[1].checks] == [False, False, False, True]
