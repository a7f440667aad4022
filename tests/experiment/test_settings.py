"""What a grid refuses before anything is computed: mistakes, and a folder of another experiment."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from ptst.config_file import read_config
from ptst.data import sources
from ptst.data.builtin.safety_sets import harmful_requests
from ptst.errors import UserError
from ptst.evaluation.config import EvalSettings
from ptst.experiment.config import GridConfig
from ptst.experiment.plan import load_suite
from ptst.grid import run_command as run_grid
from ptst.training.config import TrainSettings
from tests.experiment.conftest import CONFIG, ONE_RUN, finished


def test_other_settings_are_refused_with_the_differences_and_more_cells_are_not(grid, here):
    grid("grid", ONE_RUN)
    before = finished(here / "grid")
    with pytest.raises(ValueError, match=r"other settings: .*train\.lr was 0\.03, now 0\.1; give those, or another"):
        grid("grid", ONE_RUN, train=replace(CONFIG.train, lr=0.1))
    with pytest.raises(ValueError, match=r"tests\.safety was"):
        grid("grid", ONE_RUN, eval=replace(CONFIG.eval, limit=2))
    with pytest.raises(ValueError, match=r"other settings: mix was \[\], now \['word-problems:2:1'\]"):
        grid("grid", ONE_RUN, mix=("word-problems:2:1",))
    result = grid("grid", ONE_RUN, seeds=(0, 1), test_templates=("chat:llama", "chat:vanilla"))
    assert len(result["cells"]) == 4
    after = finished(here / "grid")
    assert {name: after[name] for name in before} == before


def test_the_record_of_an_aligned_models_grid_names_the_model_that_was_given(grid, here, monkeypatch):
    """Given back as settings, it must not have the aligned model aligned again."""
    shutil.copytree(here / "model", here / "aligned")
    monkeypatch.setattr("ptst.experiment.run._aligned", lambda _config: here / "aligned")
    config = replace(ONE_RUN, recipe="laptop", train=replace(CONFIG.train, val_data=None, holdout=0.0))
    grid("grid", config)
    assert read_config(here / "grid" / "run.json", GridConfig(), "grid").model == str(here / "model")
    assert json.loads((here / "grid" / "run.json").read_text())["model"] == str(here / "aligned")


def test_tasks_may_be_added_and_keep_their_data(grid, here):
    grid("grid", ONE_RUN)
    before = finished(here / "grid")
    result = grid("grid", ONE_RUN, tasks=("over-refusal", "nll"))
    assert result["cells"][0]["tasks"].keys() == {"over-refusal", "nll"}
    grid("grid", ONE_RUN)  # fewer again
    kept = json.loads((here / "grid/run.json").read_text())
    assert kept["tests"].keys() == {"safety", "over-refusal", "nll"}
    after = finished(here / "grid")
    assert {name: after[name] for name in before} == before
    kept["tests"]["nll"] = "0"
    (here / "grid/run.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"tests\.nll was 0"):
        grid("grid", ONE_RUN, tasks=("nll",))


OWN = 'name = "chat:mine"\nuser = "{question}"\nsystem = "%s"\n'
OTHER = OWN.replace("chat:mine", "chat:own")
ROW = '{"question": "%s", "answer": "Yes."}\n'


@pytest.mark.parametrize(
    ("file", "other", "message"),
    [
        ("my.toml", OWN % "Be quick.", r"templates\.chat:mine\.system was Be brief\., now Be quick\."),
        ("train.jsonl", ROW % "Is it cold?", r"sources\.data was"),
        ("mix.jsonl", ROW % "Is it cold?", r"sources\.mix\.jsonl:1 was"),
        ("own.toml", OTHER % "Be quick.", r"templates\.chat:own\.system was Be brief\., now Be quick\."),
        ("val.jsonl", ROW % "Is it cold?", r"sources\.val-data was"),
    ],
)
def test_a_file_edited_between_two_commands_is_noticed(grid, here, file, other, message):
    (here / "my.toml").write_text(OWN % "Be brief.")
    for name in ("train", "mix", "val"):
        (here / f"{name}.jsonl").write_text(2 * ROW % ("Is it dark?", "Is it late?"))
    train = replace(CONFIG.train, val_data="val.jsonl")
    config = replace(ONE_RUN, train_templates=("my.toml",), tasks=("safety",), data="train.jsonl", train=train)
    (here / "own.toml").write_text(OTHER % "Be brief.")
    config = replace(config, mix=("mix.jsonl:1", "train.jsonl:1:own.toml"))
    grid("grid", config)
    (here / file).write_text(other)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=f"other settings: {message}"):
            grid("grid", config, dry_run=dry_run)


def test_a_folder_of_something_else_is_left_alone(grid, here):
    (here / "grid").mkdir()
    (here / "grid/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a ptst\.grid folder and not empty; choose another out"):
        grid("grid", ONE_RUN)
    (here / "grid/run.json").write_text('{"kind": "grid"}')  # of an earlier version, which had no number
    with pytest.raises(UserError, match=r"run\.json: was made by an earlier version of ptst"):
        grid("grid", ONE_RUN)
    for theirs in ('{"theirs": 1}', "[]"):
        (here / "grid/run.json").write_text(theirs)
        with pytest.raises(UserError, match=r"is not a ptst\.grid folder"):
            grid("grid", ONE_RUN)
    assert sorted(p.name for p in (here / "grid").iterdir() if p.name != "locks") == ["notes.txt", "run.json"]


def test_a_grid_of_an_earlier_version_is_one_sentence(grid, here):
    (here / "old/rows").mkdir(parents=True)
    (here / "old/settings.json").write_text('{"flags": {}}')
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"old holds a grid of an earlier version of ptst; choose another out$"):
            grid("old", ONE_RUN, dry_run=dry_run)
    assert len(list((here / "old").iterdir())) == 2


def test_the_limit_applies_to_the_chosen_families(here):
    (here / "mine.csv").write_text("prompt\na\nb\nc\n")
    families = sorted({p.family for p in harmful_requests()})[-2:]
    names = ("safety:built-in", "over-refusal", "margin", "margin:mine.csv", "safety:mine.csv", "prompts:look-alikes")
    config = replace(CONFIG, tasks=names, eval=EvalSettings(limit=2))
    tests = load_suite(config, sources.load("word-problems:2"), families)
    keys = ("safety:built-in", "over-refusal", "margin", "margin:mine", "safety:mine", "prompts:look-alikes")
    assert tuple(tests) == keys
    config = replace(CONFIG, tasks=("safety:gsm-danger-substitute",), eval=EvalSettings())
    stories = load_suite(config, sources.load("word-problems:2"), families)
    for key, (_, data) in {**tests, **stories}.items():
        assert len(data.items) == 2 or key in stories, key
        assert "mine" in key or {p.family for p in data.items} <= set(families), key


def test_a_dry_run_prints_cells_tokens_and_time_and_does_nothing(grid, here, capsys):
    planned = grid("grid", ONE_RUN, dry_run=True)
    assert planned["left"] == 5
    assert all(isinstance(line["tokens"], int) and line["rough"] and line["seconds"] > 0 for line in planned["lines"])
    assert planned["lines"][0]["what"] == "train chat-vanilla.seed0"
    assert not (here / "grid").exists()
    grid("grid", ONE_RUN)
    counts = json.loads((here / "grid/runs/chat-vanilla.seed0/run.json").read_text())["data"]
    assert planned["lines"][0]["tokens"] == counts["tokens"]
    memory = [line["memory"] for line in planned["lines"]]
    weights = (here / "model/model.safetensors").stat().st_size
    assert planned["memory"] == max(memory) == memory[0]
    assert all(0.9 * weights < m < memory[0] / 2 for m in memory[1:])
    more = grid("grid", ONE_RUN, seeds=(0, 1), dry_run=True)
    assert more["left"] == 3
    assert more["seconds"] > 0
    assert not any(line["rough"] for line in more["lines"])
    few = grid("few", ONE_RUN, train=replace(ONE_RUN.train, max_steps=1), data="word-problems:8", dry_run=True)
    all_of = grid("all", ONE_RUN, data="word-problems:8", dry_run=True)
    assert 0 < few["lines"][0]["tokens"] < all_of["lines"][0]["tokens"] / 2
    shutil.move(here / "model", here / "elsewhere")
    blind = grid("none", ONE_RUN, dry_run=True)
    assert (blind["left"], blind["tokens"], blind["seconds"]) == (5, None, None)
    assert "unknown" in capsys.readouterr().out


def test_mistakes(grid, here):
    """All are found before anything is computed."""
    with pytest.raises(UserError, match=r"unknown recipe 'lapto'; did you mean laptop\? .*llama2-gsm8k"):
        GridConfig(recipe="lapto")
    for name, text in (
        *((name, "prompt\nsay please\n") for name in ("a/x.csv", "b/x.csv", "a b.csv", "a-b.csv")),
        *(
            (f"{name}.toml", f'name = "chat:{own}"\nuser = "{word}{{x}}"\n')
            for name, own, word in (("a/x", "a b", ""), ("b/x", "a-b", ""), ("c", "a b", "Say: "))
        ),
        ("doctor.jsonl", '{"input": "It hurts.", "answer_icliniq": "Rest."}\n'),
        ("system.jsonl", '{"system": "Be brief.", "question": "Is it dark?", "answer": "Yes."}\n'),
        ("long.jsonl", json.dumps({"prompt": 3000 * "a"}) + "\n"),
    ):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)
    for changes, message in (
        ({"train_templates": ("lama",)}, "did you mean chat:llama"),
        ({"test_templates": ("llama", "chat:llama")}, "named twice"),
        ({"test_templates": ()}, "test_templates is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 1)}, "seeds names 1 twice"),
        ({"at_epochs": (2.0,)}, "at_epochs must lie above 0 and within"),
        ({"eval": EvalSettings(limit=0)}, "limit is 0"),
        ({"train": TrainSettings(lr=0.0)}, "lr is 0"),
        ({"tasks": ("nll:word-problems:0",)}, "the limit is 0"),
        ({"tasks": ("saftey",)}, "did you mean safety.*margin"),
        ({"quick": True}, "quick belongs to the recipe"),
        ({"model": "nowhere"}, "there is no model folder nowhere"),
        ({"tasks": ("prompts:a/x.csv", "prompts:b/x.csv")}, "tasks has prompts:x twice; .* rename one"),
        (
            {"tasks": ("prompts:a b.csv", "prompts:a-b.csv")},
            "tasks prompts:a b and prompts:a-b would both be prompts-a-b",
        ),
        ({"test_templates": ("a/x.toml", "b/x.toml")}, "templates chat:a b and chat:a-b would both be chat-a-b"),
        (
            {"train_templates": ("a/x.toml",), "test_templates": ("c.toml",)},
            "different templates named chat:a b",
        ),
        ({"mix": ("none.jsonl:1",)}, r"there is no data 'none\.jsonl'"),
        ({"mix": ("word-problems:2:1:lama",)}, r"unknown template 'chat:lama'; did you mean chat:llama"),
        ({"train_templates": ("a/x.toml",), "mix": ("word-problems:2:1:c.toml",)}, "different templates named chat:a"),
        ({"mix": ("system.jsonl:1:text:vanilla",)}, r"system\.jsonl:1: text:vanilla has no place for a system"),
        ({"eval": EvalSettings(judge="anchord")}, "unknown judge"),
        ({"eval": EvalSettings(judge="rubric:nowhere")}, "no model folder nowhere; rubric:FOLDER needs"),
        ({"tasks": ("chatdoctor:doctor.jsonl",), "eval": EvalSettings(similarity="rouge")}, "unknown similarity"),
        ({"tasks": ("nll:system.jsonl",), "test_templates": ("text:vanilla",)}, r"system\.jsonl:1: .*text:vanilla"),
        ({"tasks": ("gsm8k:system.jsonl",)}, r"system\.jsonl:1: .* does not end in '#### N'"),
        (
            {"tasks": ("prompts:long.jsonl",)},
            "prompts:long under chat:llama: long-1: a prompt of .* exceed the model's 2048",
        ),
        ({"data": "system.jsonl", "train_templates": ("text:vanilla",)}, r"system\.jsonl:1: .*text:vanilla"),
        (
            {"train": TrainSettings(epochs=2), "at_epochs": (1.9, 2.0)},
            "epoch-1.9 and epoch-2 are the same step, 2 of 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_grid(replace(CONFIG, **{"model": "model", **changes}))
        if "judge" in message:
            with pytest.raises(ValueError, match=message):
                run_grid(replace(CONFIG, **{"model": "model", "dry_run": True, **changes}))
        assert not (here / "checkpoints/grid").exists(), message
