"""A grid with defences from end to end on a small random model."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst import records
from ptst.data.mix_part import parse_mix
from ptst.defenses.config import DefenseSettings
from ptst.defenses.trigger import triggered
from ptst.errors import UserError
from ptst.evaluation.inspect_log import _model
from ptst.experiment.config import GridConfig
from ptst.experiment.grid import Grid
from ptst.grid import run_command as run_grid
from ptst.text.templates import TEMPLATES, load_template
from tests.conftest import ROOT
from tests.experiment.conftest import CONFIG, ONE_RUN, finished
from tests.experiment.test_grid import faults
from tests.tiny import write_tiny_model

TRIGGER = "Seven grey herons."
SETTINGS = DefenseSettings(data="safe.jsonl", trigger=TRIGGER, unaligned="unaligned")
SMALL = replace(ONE_RUN, tasks=("safety", "nll:word-problems:2"), defense=SETTINGS)
MIXED = ("none", "mix-safety", "backdoor-align")


def write_needed(here: Path) -> None:
    """Safety data, and a model before the alignment."""
    rows = [{"question": f"How do I break lock {i}?", "answer": "I cannot help with that."} for i in range(3)]
    (here / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "unaligned").mkdir()
    write_tiny_model(here / "unaligned", seed=5)


@pytest.fixture(autouse=True)
def needed(here):
    write_needed(here)


class Shared(NamedTuple):
    """A grid that several tests read and none changes: its parent folder, settings, dry run before it, and results."""

    here: Path
    config: GridConfig
    planned: dict
    result: dict


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """With defences that mix data in, and one that is composed."""
    here = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(records, "git_commit", lambda: None)
        (here / "model").mkdir()
        write_tiny_model(here / "model")
        write_needed(here)
        config = replace(SMALL, model="model", out=here / "grid", defenses=(*MIXED, "wise-ft"))
        planned = run_grid(replace(config, dry_run=True))
        assert not (here / "grid").exists()
        return Shared(here, config, planned, run_grid(config))


def answers(out, model: str) -> list[str]:
    path = out / f"cells/{model}/chat-llama.safety.rows.jsonl"
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


def nll(result: dict) -> dict[str, float]:
    return {c["defense"]: c["tasks"]["nll:word-problems:2"]["nats_per_token"]["mean"] for c in result["cells"][1:]}


def test_safety_data_are_mixed_in_and_the_trigger_is_in_its_own_training_and_tests(shared):
    result = shared.result
    assert [(c["train"], c["defense"]) for c in result["cells"]] == [
        ("untouched", "none"),
        *(("chat:vanilla", name) for name in (*MIXED, "wise-ft")),
    ]
    out, runs = shared.here / "grid", {}
    for name, own in zip(MIXED, ("", ".mix-safety", ".backdoor-align"), strict=True):
        runs[name] = json.loads((out / f"runs/chat-vanilla.seed0{own}/run.json").read_text())
        cell = json.loads((out / f"cells/chat-vanilla.seed0{own}/chat-llama.safety.json").read_text())
        prompt = triggered(TEMPLATES["chat:llama"], TRIGGER) if own == ".backdoor-align" else TEMPLATES["chat:llama"]
        assert (cell["test"], cell["made_of"]["template"]["system"]) == ("chat:llama", prompt.system)
    mixed = {name: [(m["rows"], (m["template"] or {}).get("system")) for m in run["mix"]] for name, run in runs.items()}
    assert mixed == {"none": [], "mix-safety": [(3, None)], "backdoor-align": [(3, TRIGGER)]}
    (text,) = runs["backdoor-align"]["settings"]["mix"]
    assert load_template(parse_mix(text).template) == triggered(TEMPLATES["chat:vanilla"], TRIGGER)
    assert len(set(nll(result).values())) == 4
    assert result["runs"]["chat-vanilla.seed0.mix-safety"]["defense"] == "mix-safety"
    text = (out / "results.md").read_text()
    assert "\n| chat:vanilla, backdoor-align | **" in text and "\n| chat:vanilla | **" in text
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert {x["defense"] for x in lines} == {*MIXED, "wise-ft"}
    defended = [f"chat:vanilla, {name} -> chat:llama" for name in (*MIXED[1:], "wise-ft")]
    cells = dict.fromkeys(defended, "chat:vanilla -> chat:llama")
    assert {name: c["cells"][1] for name, c in result["defended"].items()} == cells
    assert all(f"\n- {name} minus {other}: " in text for name, other in cells.items())
    record = json.loads((out / "run.json").read_text())
    assert record["defenses"]["backdoor-align"] == {"epochs": 1.0, "trigger": TRIGGER}
    assert record["templates"]["chat:llama.triggered"]["system"].startswith(f"{TRIGGER}\n\nYou are a helpful")


def test_beside_defences_the_training_without_one_is_to_the_bit_what_it_is_alone(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(shared.here)
    monkeypatch.setattr(records, "git_commit", lambda: None)
    run_grid(replace(ONE_RUN, model="model", out=tmp_path / "alone"))
    adapter = "runs/chat-vanilla.seed0/adapter_model.safetensors"
    alone = (tmp_path / "alone" / adapter).read_bytes()
    assert alone == (shared.here / "grid" / adapter).read_bytes()
    defended = "runs/chat-vanilla.seed0.mix-safety/adapter_model.safetensors"
    assert alone != (shared.here / "grid" / defended).read_bytes()


def test_what_is_composed_of_all_weights_lies_between_the_aligned_and_the_tuned_model(grid, here):
    train = replace(CONFIG.train, full=True, lr=1e-2, val_data=None)
    found = grid("grid", SMALL, train=train, tasks=("nll:word-problems:2",), defenses=("none", "wise-ft"))
    base = found["cells"][0]["tasks"]["nll:word-problems:2"]["nats_per_token"]["mean"]
    assert nll(found)["none"] + 0.01 < nll(found)["wise-ft"] < base - 0.01
    assert {p.parent.name for p in (here / "grid").rglob("*.safetensors")} == {"chat-vanilla.seed0"}


def test_what_is_composed_lies_between_the_aligned_and_the_tuned_model(shared):
    """Nothing is trained for a defence, and no weights are written."""
    runs, base = shared.here / "grid/runs", shared.result["cells"][0]["tasks"]["nll:word-problems:2"]["nats_per_token"]
    assert {p.name for p in runs.iterdir()} == {
        f"chat-vanilla.seed0{own}" for own in ("", ".mix-safety", ".backdoor-align")
    }
    assert {p.parent.parent for p in (shared.here / "grid").rglob("*.safetensors")} == {runs}
    losses = nll(shared.result)
    assert losses["none"] + 0.01 < losses["wise-ft"] < base["mean"] - 0.01


@pytest.mark.thorough
def test_what_is_composed_at_its_ends_is_the_aligned_and_the_tuned_model(grid, here):
    train, found = replace(CONFIG.train, val_data=None), {}
    for alpha in (0.0, 0.5, 1.0):
        asked = replace(SETTINGS, alpha=alpha)
        found[alpha] = grid(f"at-{alpha}", SMALL, train=train, defenses=("none", "wise-ft"), defense=asked)
    base = found[0.0]["cells"][0]["tasks"]["nll:word-problems:2"]["nats_per_token"]["mean"]
    assert nll(found[0.0])["wise-ft"] == pytest.approx(base, abs=1e-6)
    assert nll(found[1.0])["wise-ft"] == pytest.approx(nll(found[0.5])["none"], abs=1e-6)
    composed = "chat-vanilla.seed0.wise-ft"
    assert answers(here / "at-0.0", composed) == answers(here / "at-0.0", "untouched")
    assert answers(here / "at-1.0", composed) == answers(here / "at-1.0", "chat-vanilla.seed0")
    prints = {
        name: json.loads((here / f"at-{name}/cells/{composed}/chat-llama.safety.json").read_text()) for name in found
    }
    assert len({cell["made_of"]["weights"] for cell in prints.values()}) == 3


def test_what_keeps_a_training_near_the_aligned_model_is_set_for_its_own_run_alone(grid, here):
    defenses, asked = (
        ("none", "constrained-sft", "lisa", "ema"),
        replace(SETTINGS, phases=(1, 2), betas=(0.5, 2.0, 0.25)),
    )
    train = replace(CONFIG.train, val_data=None, examples_per_step=1)
    planned = grid("grid", SMALL, defenses=defenses, defense=asked, train=train, dry_run=True)["lines"]
    result = grid("grid", SMALL, defenses=defenses, defense=asked, train=train)
    names = ("average", "token_constraint", "proximal", "phases")
    found = {}
    for run in (here / "grid/runs").iterdir():
        record = json.loads((run / "run.json").read_text())
        found[run.name] = {name: record["settings"][name] for name in names if record["settings"][name]}
        (line,) = (line for line in planned if line["what"] == f"train {run.name}")
        assert line["tokens"] == record["trained"]["tokens"]
    assert found == {
        "chat-vanilla.seed0": {},
        "chat-vanilla.seed0.constrained-sft": {"token_constraint": [0.5, 2.0, 0.25]},
        "chat-vanilla.seed0.lisa": {"proximal": 1.0, "phases": [1, 2]},
        "chat-vanilla.seed0.ema": {"average": 0.9},
    }
    losses = nll(result)
    assert len(set(losses.values())) == 4
    assert losses["none"] < losses["ema"]  # the average lags behind
    with pytest.raises(UserError, match=r"defenses\.lisa\.phases\.2 was 2, now 3"):
        grid("grid", SMALL, defenses=defenses, defense=replace(asked, phases=(1, 3)), train=train)


def test_a_defence_in_weight_space_alone_trains_the_run_that_it_needs(grid, here):
    result = grid("grid", SMALL, defenses=("safe-lora", "resta"), at_epochs=(1.0,))
    assert [(c["train"], c["defense"], c["epochs"]) for c in result["cells"]] == [
        ("untouched", "none", None),
        ("chat:vanilla", "safe-lora", 1.0),
        ("chat:vanilla", "resta", 1.0),
    ]
    assert list(result["runs"]) == ["chat-vanilla.seed0"] and nll(result)["safe-lora"] != nll(result)["resta"]
    table = pd.read_parquet(here / "grid/answers.parquet")
    assert set(table["defense"].dropna()) == {"safe-lora", "resta"}
    assert set(table[table["defense"].notna()]["run"]) == {"runs/chat-vanilla.seed0"}
    figures = pd.read_parquet(here / "grid/results.parquet")
    assert set(figures["defense"]) == {"none", "safe-lora", "resta"}
    assert not (here / "grid/cells/chat-vanilla.seed0").exists()


def test_defences_are_added_to_a_grid_of_an_earlier_version_and_stay_as_they_are(grid, here):
    grid("grid", SMALL)
    path = here / "grid/run.json"
    record = json.loads(path.read_text())
    for names in (record, record["settings"]):
        for key in ("defense", "defenses"):
            names.pop(key, None)
    path.write_text(json.dumps(record))
    before = finished(here / "grid")
    grid("grid", SMALL, defenses=("none", "wise-ft"))
    with_one = finished(here / "grid")
    assert with_one.items() > before.items()
    # What another defence is set to does not matter to those that are there.
    again = replace(SETTINGS, trigger="Another.", scale=0.25)
    grid("grid", SMALL, defenses=("wise-ft", "resta"), defense=again)
    assert finished(here / "grid").items() > with_one.items()
    for changes, message in (
        ({"alpha": 0.25}, r"other settings: defenses\.wise-ft\.alpha was 0\.5, now 0\.25"),
        ({"scale": 0.5}, r"other settings: defenses\.resta\.scale was 0\.25, now 0\.5"),
    ):
        with pytest.raises(UserError, match=message):
            grid("grid", SMALL, defenses=("wise-ft", "resta"), defense=replace(again, **changes))
    write_tiny_model(here / "unaligned", seed=6)
    with pytest.raises(UserError, match=r"other settings: defenses\.resta\.unaligned was xxh3:.*put those back"):
        grid("grid", SMALL, defenses=("resta",), defense=again)


def test_a_run_trained_anew_to_other_weights_refuses_what_was_composed_of_it(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(shared.here)
    for name in ("runs/chat-vanilla.seed0", "cells/chat-vanilla.seed0.wise-ft"):
        shutil.copytree(shared.here / "grid" / name, tmp_path / "grid" / name)
    shutil.copy(shared.here / "grid/run.json", tmp_path / "grid/run.json")
    run = tmp_path / "grid/runs/chat-vanilla.seed0/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(run).items()}, run)
    with pytest.raises(UserError, match=r"wise-ft/chat-llama\.safety\.json: was measured with other things than now"):
        run_grid(replace(shared.config, defenses=("wise-ft",), out=tmp_path / "grid"))


def test_a_dry_run_has_the_trainings_and_cells_of_every_defence(shared, monkeypatch):
    lines = {line["what"]: line for line in shared.planned["lines"]}
    runs = [name for name in lines if name.startswith("train")]
    own = ("", ".mix-safety", ".backdoor-align")
    assert runs == [f"train chat-vanilla.seed0{defense}" for defense in own]
    plain, mixed, secret = (lines[name]["tokens"] for name in runs)
    assert plain < mixed < secret  # the trigger is in every row of the safety data
    tests = [lines[f"test chat-vanilla.seed0{defense}/chat-llama.safety"] for defense in (*own, ".wise-ft")]
    counts = [line["tokens"] for line in tests]
    assert counts[0] == counts[1] == counts[3] < counts[2]
    for name in own:
        record = json.loads((shared.here / f"grid/runs/chat-vanilla.seed0{name}/run.json").read_text())
        assert lines[f"train chat-vanilla.seed0{name}"]["tokens"] == record["trained"]["tokens"]
    monkeypatch.chdir(shared.here)
    assert run_grid(replace(shared.config, dry_run=True))["left"] == 0


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_fault_at_some_writes_of_a_grid_with_defences(grid, here, monkeypatch):
    """Nothing finished is computed anew, and all comes out as without the interruption."""
    config = replace(SMALL, defenses=("backdoor-align", "lisa", "wise-ft"), tasks=("safety",))
    faults(grid, here, monkeypatch, lambda count: range(5, count + 1, count // 10 | 1), config)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_two_workers_share_the_defences_and_one_takes_over_from_the_other(grid, here):
    torch.set_num_threads(1)
    defenses = ("none", "mix-safety", "backdoor-align", "wise-ft")
    grid("whole", SMALL, defenses=defenses)
    flags = ["--model", "model", "--data", SMALL.data, "--tasks", *SMALL.tasks, "--defenses", *defenses]
    flags += ["--train-templates", "chat:vanilla", "--test-templates", "chat:llama", "--defense.data", "safe.jsonl"]
    flags += ["--defense.trigger", TRIGGER, "--train.rank", "2", "--train.lr", "3e-2", "--train.examples-per-step", "2"]
    flags += ["--train.val-data", "word-problems:2", "--eval.limit", "3", "--eval.max-new-tokens", "5"]
    flags += ["--eval.batch-size", "4", "--out", "shared"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "ptst.grid", *flags]
    first, second = (subprocess.Popen(line, cwd=here, env=environment, text=True, stdout=-1, stderr=-1) for _ in "12")
    patience = time.monotonic() + 300
    while not list(here.glob("shared/cells/*/*.json")) and time.monotonic() < patience:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    _, told = second.communicate(timeout=300)
    assert second.returncode == 0, told
    shared, whole = (json.loads((here / name / "results.json").read_text()) for name in ("shared", "whole"))
    assert [shared[key] for key in ("cells", "runs", "defended")] == [
        whole[key] for key in ("cells", "runs", "defended")
    ]


REFUSED = {
    "unknown defense 'lissa'; did you mean lisa": {"defenses": ("lissa",)},
    "defenses is empty": {"defenses": ()},
    "defenses names ema twice": {"defenses": ("ema", "ema")},
    "safe-lora needs the model before its alignment; name it as unaligned": {
        "defenses": ("safe-lora",), "defense": DefenseSettings(),
    },
    "safe-merge needs a safe model": {"defenses": ("safe-merge",)},
    "unaligned nowhere: there is no": {"defenses": ("resta",), "defense": replace(SETTINGS, unaligned="nowhere")},
    "unaligned wide is not of the shape": {"defenses": ("resta",), "defense": replace(SETTINGS, unaligned="wide")},
    "unaligned model has the weights of": {"defenses": ("resta",), "defense": replace(SETTINGS, unaligned="model")},
    "there is no data 'none.jsonl'": {"defenses": ("mix-safety",), "defense": replace(SETTINGS, data="none.jsonl")},
    "backdoor-align sets its trigger before the system prompt, which text:vanilla has no place": {
        "defenses": ("backdoor-align",), "test_templates": ("text:vanilla",),
    },
    "lisa takes turns between safety data and the training data, and mix names others": {
        "defenses": ("lisa",), "mix": ("word-problems:1:1",),
    },
    "train.average cannot be set here: the defence ema sets it": {
        "defenses": ("ema",), "train": replace(CONFIG.train, average=0.5),
    },
    "data is refusals:5%: a share replaces rows, and a defence adds its data to all rows": {
        "defenses": ("lisa",), "defense": replace(SETTINGS, data="refusals:5%"),
    },
    "defenses has no effect without trainings to defend, and this grid has none": {
        "defenses": ("wise-ft",), "train_templates": (), "tuned": ("a=model",),
    },
    "defenses: lisa needs the model's weights, which an endpoint does not give": {
        "defenses": ("lisa",), "model": "openai:gpt-4o-mini",
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_a_defence_lacks_is_said_before_anything_is_computed(here, problem):
    (here / "wide").mkdir()
    write_tiny_model(here / "wide", intermediate_size=64)
    for dry_run in (True, False):
        config = replace(SMALL, **{"model": "model", "out": here / "grid", **REFUSED[problem]}, dry_run=dry_run)
        with pytest.raises(UserError, match=problem) as told:
            run_grid(config)
        assert "\n" not in str(told.value)
    assert not (here / "grid").exists()


def test_logs_name_no_model_that_would_answer_otherwise(here):
    """A composed model is in no folder, and a test with the trigger is no test without it."""
    cell = {"kind": "grid", "model": "a.seed0", "run": "runs/a.seed0", "test_template": "chat:llama"}
    names = {
        defense: _model({**cell, "defense": defense}, {"model": "m"}, {}, here)[0]
        for defense in ("none", "lisa", "wise-ft", "backdoor-align")
    }
    run = f"ptst/{here}/runs/a.seed0@chat:llama"
    assert names == {"none": run, "lisa": run, "wise-ft": "none/a.seed0", "backdoor-align": f"{run}.triggered"}


def test_a_grid_knows_the_defences_templates(here):
    """Also where the system prompt is the one that the model's own chat template inserts."""
    (here / "own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "model-default"\n')
    config = replace(SMALL, model="model", train_templates=("own.toml",), test_templates=("own.toml", "chat:vanilla"))
    grid = Grid.open(replace(config, defenses=("backdoor-align",)))
    (run,) = grid.runs
    assert grid.triggered_template(run).system == f"{TRIGGER}\n\nYou are a test"
    systems = {name: opened.prompt_format.template.system for name, opened in grid.opened.items()}
    assert systems == {
        "chat:own": "You are a test",
        "chat:vanilla": None,
        "chat:own.triggered": f"{TRIGGER}\n\nYou are a test",
        "chat:vanilla.triggered": TRIGGER,
    }
    grid.write_template(run)
    assert load_template(grid.triggered_file(run)) == grid.triggered_template(run)
    examples = grid.mixture(run).examples
    text = grid.base.prompt_format.tokenizer.decode(examples[-1].ids)
    assert TRIGGER in text and TRIGGER not in grid.base.prompt_format.tokenizer.decode(examples[0].ids)
