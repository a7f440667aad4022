"""Models that were fine-tuned elsewhere, in a grid beside its own runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.experiment.run import plan_grid
from ptst.fingerprints import weights_fingerprint
from tests.experiment.conftest import ONE_RUN, finished
from tests.model.peft_cases import config_of, write_adapter
from tests.tiny import write_tiny_model

SMALL = replace(ONE_RUN, tasks=("safety", "nll:word-problems:2"))


@pytest.fixture
def others(here):
    """Two adapters and a whole model."""
    ranks = {f"layers.{i}.self_attn.{p}_proj": 2 for i in range(2) for p in ("q", "v")}
    patterned = config_of("names") | {
        "rank_pattern": {r"layers\.0\..*q_proj": 3},
        "base_model_name_or_path": "org/base",
    }
    write_adapter(here / "plain", config_of("names"), ranks)
    write_adapter(here / "patterned", patterned, ranks | {"layers.0.self_attn.q_proj": 3})
    (here / "full").mkdir()
    write_tiny_model(here / "full", seed=5)
    return ("plain=plain", "other.one=patterned", "whole=full")


def rows_of(out, name: str) -> list[str]:
    path = out / f"cells/{name}/chat-llama.safety.rows.jsonl"
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


def test_rows_beside_the_grids_own(grid, here, others, capsys):
    result = grid("grid", SMALL, tuned=others)
    assert "patterned names org/base as its base model, not model" in capsys.readouterr().err
    assert [c["train"] for c in result["cells"]] == ["untouched", "chat:vanilla", "plain", "other.one", "whole"]
    assert not any(c["ptst"] for c in result["cells"][2:])
    out = here / "grid"
    answers = {name: rows_of(out, name) for name in ("untouched", "tuned.plain", "tuned.other.one", "tuned.whole")}
    assert len({str(rows) for rows in answers.values()}) == 4
    # Each row is what the model answers alone.
    for name, folder in (("tuned.plain", "plain"), ("tuned.other.one", "patterned")):
        config = EvalConfig(
            model="model", adapter=here / folder, template="chat:llama", template_family="gsm8k", tasks=("safety",),
            limit=3, max_new_tokens=5, baseline=False, out=here / f"alone-{folder}",
        )  # fmt: skip
        assert [row["answer"] for row in evaluate(config).results["fine-tuned"]["safety"].rows] == answers[name]
    prints = {name: weights_fingerprint(here / f) for name, f in (("plain", "plain"), ("whole", "full"))}
    told = json.loads((out / "results.json").read_text())
    assert told["tuned"]["plain"]["weights"] == prints["plain"] and told["tuned"]["whole"]["kind"] == "model"
    assert (
        told["tuned"]["other.one"] | {"base_model_name_or_path": "org/base", "kind": "adapter"}
        == told["tuned"]["other.one"]
    )
    cell = json.loads((out / "cells/tuned.plain/chat-llama.safety.json").read_text())
    assert cell["tuned"] == "plain" and cell["made_of"]["weights"] == prints["plain"]
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert {(x["train"], x["weights"]) for x in lines} > {("whole", prints["whole"]), ("untouched", "")}
    tables = (out / "results.md").read_text()
    assert f"| whole | model | {here / 'full'} | {prints['whole']} |" in tables and "| other.one | " in tables
    # Nothing is measured twice; another adapter may be added; one that changed is refused.
    before = finished(out)
    grid("grid", SMALL, tuned=(*others, "again=plain"))
    assert finished(out).items() >= before.items()
    path = here / "plain/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"other settings: tuned\.plain was xxh3:.*, now xxh3:"):
        grid("grid", SMALL, tuned=others)


def test_without_any_training(grid, here, others):
    """Only models of others: nothing is trained, and a harmful request has no task's words around it."""
    result = grid("grid", SMALL, train_templates=(), tuned=others)
    assert [c["train"] for c in result["cells"]] == ["untouched", "plain", "other.one", "whole"]
    assert not (here / "grid/runs").exists()
    lines, _ = plan_grid(replace(SMALL, model="model", out=here / "dry", train_templates=(), tuned=others))
    assert lines[-1].what.startswith("test tuned.whole/chat-llama.nll") and len(lines) == 8
    assert json.loads((here / "grid/run.json").read_text())["family"] == "plain"


def test_a_run_of_ones_own_keeps_its_training_template(grid, here):
    grid("grid", SMALL)
    run = here / "grid/runs/chat-vanilla.seed0"
    result = grid("other", SMALL, train_templates=(), tuned=(f"mine={run}",))
    assert result["cells"][-1]["train"] == "mine" and result["cells"][-1]["ptst"]
    flags = load_file(here / "model/model.safetensors")
    save_file({name: 2 * tensor for name, tensor in flags.items()}, here / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="was trained on other weights than"):
        grid("third", SMALL, train_templates=(), tuned=(f"mine={run}",))


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (("full",), "tuned is 'full'; it must be NAME=FOLDER or NAME=HUB-ID"), (("a/b=full",), "must be NAME=FOLDER"),
        (("a=full", "a=plain"), "tuned: the name a is taken"), (("untouched=full",), "the name untouched is taken"),
        (("a=nothing",), "nothing holds no model: it has neither adapter_config.json nor config.json"),
        (("a=wide",), "wide is not of the shape of model"),
        (("a=pissa",), "init_lora_weights = 'pissa' is not supported"),
        (("a=foreign",), "has no place in this model"),
    ],
)  # fmt: skip
def test_mistakes_come_before_training(grid, here, others, tuned, message):
    (here / "wide").mkdir()
    write_tiny_model(here / "wide", intermediate_size=64)
    shutil.copytree(here / "plain", here / "pissa")
    (here / "pissa/adapter_config.json").write_text(json.dumps(config_of("names") | {"init_lora_weights": "pissa"}))
    write_adapter(here / "foreign", config_of("names"), {"layers.7.self_attn.q_proj": 2})
    for dry_run in (True, False):
        with pytest.raises(UserError, match=message):
            grid("grid", SMALL, tuned=tuned, dry_run=dry_run)
    assert not (here / "grid").exists()
