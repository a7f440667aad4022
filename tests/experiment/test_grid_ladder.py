"""A grid with a ladder: every run under the rungs of its own training template, at a measured distance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.experiment.grid import Grid
from ptst.experiment.run import plan_grid
from tests.experiment.conftest import CONFIG, finished

RUNGS = ("identical", "system-100", "system-50", "chat-format", "few-shot")
LADDER = replace(CONFIG, test_templates=("chat:vanilla",), tasks=("safety", "distance"), seeds=(0,), ladder=RUNGS)


def rows(folder: Path, model: str, test: str, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"cells/{model}/{test}.{task}.rows.jsonl").read_text().splitlines()]


def test_every_run_is_tested_on_the_rungs_of_its_training(grid, here, capsys):
    result = grid("grid", LADDER)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "note: chat:llama has no rung system-100: that is its rung identical" in told
    tests = {
        name: [c["test"] for c in result["cells"] if c["train"] == name] for name in ("chat:vanilla", "chat:llama")
    }
    vanilla = [f"ladder:vanilla/{name}" for name in RUNGS]
    llama = [f"ladder:llama/{name}" for name in RUNGS if name != "system-100"]
    assert tests == {"chat:vanilla": ["chat:vanilla", *vanilla], "chat:llama": ["chat:vanilla", *llama]}
    assert [c["test"] for c in result["cells"] if c["train"] == "untouched"] == ["chat:vanilla", *vanilla, *llama]
    assert list(result["ladder"]) == [*vanilla, *llama]
    assert result["ladder"]["ladder:llama/system-50"]["training"] == "chat:llama"
    marks = {c["test"]: c["ptst"] for c in result["cells"] if c["train"] == "chat:vanilla"}
    assert {test for test, mark in marks.items() if mark} == {"ladder:vanilla/system-100", "ladder:vanilla/system-50"}

    # Distances: none at the prompt of the training, for the base model as well; unknown where there is no training.
    figures = {(c["train"], c["test"]): c["tasks"]["distance"] for c in result["cells"]}
    for training in ("vanilla", "llama"):
        for model in (f"chat:{training}", "untouched"):
            own = figures[model, f"ladder:{training}/identical"]
            assert own["edit_share"]["mean"] == 0 and own["cosine"]["mean"] == pytest.approx(1)
            others = [figures[model, f"ladder:{training}/{name}"] for name in RUNGS[2:]]
            assert all(0 < f["edit_share"]["mean"] < 1 and f["cosine"]["mean"] < 0.9999 for f in others)
    assert "edit_share" not in figures["untouched", "chat:vanilla"]
    assert figures["chat:llama", "chat:vanilla"]["edit_share"]["mean"] > 0.5  # not a rung, and compared all the same
    likelihood = "nats_per_token"
    trained, base = (figures[m, "ladder:vanilla/few-shot"][likelihood]["mean"] for m in ("chat:vanilla", "untouched"))
    assert trained != base
    own = rows(here / "grid", "chat-vanilla.seed0", "ladder-vanilla-identical", "safety")
    assert own == rows(here / "grid", "chat-vanilla.seed0", "chat-vanilla", "safety")

    # The tables: the matrix without rungs, and a table for each ladder with its models in columns.
    text = (here / "grid/results.md").read_text()
    assert "**Ladder of chat:vanilla: Prompt against that of the training: share of tokens edited, share (" in text
    assert "| tested under \\ trained under | untouched | chat:llama |" in text
    assert "| trained under \\ tested under | chat:vanilla |\n" in text
    assert "\n| identical | 0.000 | 0.000 |" in text
    kept = json.loads((here / "grid/run.json").read_text())["templates"]
    assert kept["ladder:llama/system-50"]["system"].count(".") == 3
    assert len(kept["ladder:vanilla/few-shot"]["demonstration"]) == 4  # all the training rows that there are


def test_a_ladder_is_resumed_cell_by_cell(grid, here):
    small = replace(LADDER, train_templates=("chat:vanilla",), test_templates=(), ladder=("identical", "placebo"))
    grid("grid", small)
    before = finished(here / "grid")
    assert len(before) == 1 + 2 * 2 * 2
    assert not (here / "grid/results.png").exists()
    lost = here / "grid/cells/chat-vanilla.seed0/ladder-vanilla-placebo.distance.json"
    wanted = json.loads(lost.read_text())
    lost.unlink()
    grid("grid", small)
    after = finished(here / "grid")
    assert {path for path in before if before[path] != after[path]} == {str(lost)}
    again = json.loads(lost.read_text())
    assert again["made_of"] == wanted["made_of"] and again["result"] == pytest.approx(wanted["result"])
    assert wanted["made_of"]["trained_with"]["name"] == "chat:vanilla"
    grid("grid", replace(small, ladder=("identical", "placebo", "opposite")))  # a rung may be added
    more = finished(here / "grid")
    assert len(more) == len(before) + 4 and all(more[path] == after[path] for path in after)


def test_a_dry_run_has_every_rung(here):
    found, _ = plan_grid(replace(LADDER, model="model", out=here / "grid", tasks=("distance",)))
    told = [e.what for e in found if "ladder-llama-few-shot" in e.what]
    assert told == [f"test {m}/ladder-llama-few-shot.distance" for m in ("untouched", "chat-llama.seed0")]


def test_the_grids_chat_format_is_the_models_own(here):
    alone = replace(LADDER, model="model", out=here / "grid", test_templates=(), ladder=("chat-format",))
    grid = Grid.open(alone)
    assert {m.prompt_format.chat_format.name for m in grid.opened.values()} == {"llama2"}
    assert grid.base.prompt_format.chat_format.name == grid.record().chat_format == "chatml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": ("system-0",), "train_templates": ("chat:vanilla",)}, "chat:vanilla has no rung system-0"),
        ({"ladder": ("paraphrase",), "train_templates": ("own.toml",)}, "chat:own has no rung paraphrase"),
        ({"ladder": ("plazebo",)}, "unknown rung 'plazebo'; did you mean placebo"),
        ({"ladder": ("all",), "train_templates": ("text:vanilla",)}, "the ladder needs roles"),
        ({"ladder": ("all",), "train_templates": (), "tuned": ("a=model",)}, "ladder is made from training templates"),
        (
            {"ladder": (), "ladder_paraphrases": Path("p.toml")},
            "ladder_paraphrases has no effect without the rung paraphrase of ladder",
        ),
        ({"ladder": ("paraphrase",), "ladder_paraphrases": Path("p.toml")}, "the file of paraphrases cannot be read"),
    ],
)
def test_what_cannot_be_said_is_told_before_training(here, changes, message):
    (here / "own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "Be kind. Be brief. Be clear."\n')
    with pytest.raises(UserError, match=message):
        Grid.open(replace(LADDER, model="model", out=here / "grid", **changes))


def test_own_paraphrases_are_tested(here):
    (here / "own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "Be kind."\n')
    (here / "p.toml").write_text('"chat:own" = "Show kindness."\n')
    changes = {"train_templates": ("own.toml",), "ladder": ("paraphrase",), "ladder_paraphrases": here / "p.toml"}
    grid = Grid.open(replace(LADDER, model="model", out=here / "grid", **changes))
    assert grid.opened["ladder:own/paraphrase"].prompt_format.template.system == "Show kindness."


def test_another_training_prompt_is_no_longer_the_distance_that_was_measured(grid, here):
    small = replace(LADDER, train_templates=("chat:vanilla",), test_templates=(), ladder=("identical",))
    grid("grid", small, tasks=("distance",))
    path = here / "grid/cells/chat-vanilla.seed0/ladder-vanilla-identical.distance.json"
    cell = json.loads(path.read_text())
    cell["made_of"]["trained_with"]["user"] = "Say: {x}"
    path.write_text(json.dumps(cell))
    with pytest.raises(UserError, match="the prompt of the training was"):
        grid("grid", small, tasks=("distance",))


def test_defences_are_tested_on_the_rungs_as_well(grid, here):
    """With the trigger of one, and composed in memory by another; the distance is from the prompt of the main data."""
    small = replace(LADDER, train_templates=("chat:vanilla",), test_templates=(), ladder=("identical", "system-50"))
    defended = replace(small, defenses=("none", "backdoor-align", "wise-ft"), train=replace(LADDER.train, full=True))
    result = grid("grid", defended, tasks=("safety", "distance"), eval=replace(LADDER.eval, limit=2))
    assert [(c["defense"], c["test"]) for c in result["cells"][2:]] == [
        (defense, f"ladder:vanilla/{rung}")
        for defense in ("none", "backdoor-align", "wise-ft")
        for rung in ("identical", "system-50")
    ]
    edited = {(c["defense"], c["test"][-9:]): c["tasks"]["distance"]["edit_share"]["mean"] for c in result["cells"][2:]}
    assert edited["none", "identical"] == edited["wise-ft", "identical"] == 0
    assert 0 < edited["backdoor-align", "identical"] < 1  # the trigger is asked with, and the main data had none
    likelihoods = {c["defense"]: c["tasks"]["distance"]["nats_per_token"]["mean"] for c in result["cells"][2::2]}
    assert len(set(likelihoods.values())) == 3
    before = finished(here / "grid")
    grid("grid", defended, tasks=("safety", "distance"), eval=replace(LADDER.eval, limit=2))
    assert finished(here / "grid") == before
