"""The study runner on small random models: parts, passes, sharing, resuming, outcomes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ptst.defenses.config import DefenseSettings
from ptst.errors import Setting, UserError, settings_group
from ptst.evaluation.config import EvalSettings
from ptst.experiment.config import GridConfig
from ptst.experiment.ladder import study
from ptst.experiment.ladder.analyse import study_parts
from ptst.experiment.ladder.gather import gather
from ptst.experiment.ladder.outcomes import Key, Outcomes
from ptst.experiment.ladder.parts import plan_parts
from ptst.experiment.ladder.recipe import DEFENSES, REFUSED, placebo_file
from ptst.experiment.ladder.rungs import rungs
from ptst.experiment.ladder.study_config import StudyConfig
from ptst.grid import run_command as run_grid
from ptst.grid import start
from ptst.study import run_command as run_study_command
from ptst.text.templates import find_family, find_template, load_template
from ptst.training.config import TrainSettings
from tests.conftest import ROOT
from tests.experiment.conftest import finished
from tests.tiny import write_tiny_model

SMALL = {
    "ladder": ("identical", "system-100", "placebo", "unrelated"),
    "defenses": ("none", "resta"),
    "tasks": ("safety:fresh", "over-refusal:fresh", "distance"),
    "data": "word-problems:2",
    "second_data": None,
    "control_templates": (),
    "train": TrainSettings(rank=2, lr=3e-2, examples_per_step=2),
    "eval": EvalSettings(limit=2, max_new_tokens=2, batch_size=8),
}


@pytest.fixture
def aligned(here, monkeypatch):
    """Alignments that take no time: other random weights for each seed."""
    made = []

    def fake(config, out, seed, wait, refused):
        assert refused == REFUSED
        if not out.exists():
            out.mkdir(parents=True)
            write_tiny_model(out, seed=seed + 1)
            made.append(seed)
        return out

    monkeypatch.setattr(study, "aligned_model", fake)
    return made


MERGED = {"defenses": ("none", "safe-merge")}


def config(here: Path, **changes) -> GridConfig:
    small = {**SMALL, "alignments": (0, 2), "seeds": (20, 21, 22), **changes}
    return GridConfig(recipe="ladder", model="model", out=here / "study", **small)


def test_a_control_is_trained_without_a_defence_under_the_words_of_the_placebo_rung(here):
    *_, control, ladder = plan_parts(config(here, control_templates=(placebo_file(),)))[0].passes
    assert (control.train_templates, control.defenses) == ((placebo_file(),), ("none",))
    assert (control.test_templates, control.ladder, control.tasks) == (
        ("chat:llama",), ("identical", "system-0"), ("safety:fresh",)
    )  # fmt: skip
    assert ladder.train_templates == ("chat:vanilla", "chat:llama") and not ladder.test_templates
    (rung,), _ = rungs(find_template("chat:vanilla"), find_family("gsm8k"), ["placebo"])
    assert load_template(placebo_file()).system == rung.template.system
    assert load_template(placebo_file()).user == rung.template.user


def test_seeds_are_dealt_to_alignments_and_passes_keep_costly_tasks_to_few_rungs(here):
    tasks = ("safety:fresh", "nll:word-problems:1", "distance")
    parts = plan_parts(config(here, second_data="instructions:2", tasks=tasks))
    assert [(p.name, p.passes[0].seeds) for p in parts] == [
        ("word-problems.seed0", (20, 22)),
        ("word-problems.seed2", (21,)),
        ("instructions.seed0", (20, 22)),
        ("instructions.seed2", (21,)),
    ]
    home, far, ladder = parts[0].passes
    assert (home.tasks, home.ladder, home.defenses) == (
        ("nll:word-problems:1",), ("identical", "system-100"), ("none", "resta")
    )  # fmt: skip
    assert (far.tasks, far.ladder, far.defenses) == (("distance",), SMALL["ladder"], ("none",))
    assert (ladder.tasks, ladder.ladder, ladder.defenses) == (("safety:fresh",), SMALL["ladder"], ("none", "resta"))
    second = parts[2].passes
    assert second[0].tasks == ("nll:instructions:1",) and {p.defenses for p in second} == {("none",)}
    assert second[2].ladder == ("identical", "system-100", "placebo")
    tuned = parts[1].of_model(here / "aligned-model-seed2")
    assert {(p.model, p.defense.unaligned) for p in tuned} == {(str(here / "aligned-model-seed2"), "model")}


def test_the_recipe_and_its_quick_form(here):
    whole, quick = GridConfig(recipe="ladder"), GridConfig(recipe="ladder", quick=True)
    assert whole.defenses == DEFENSES and len(whole.seeds) >= 5 and len(whole.alignments) >= 2
    assert len(set(whole.defenses) - {"none"}) >= 6 and len(whole.train_templates) == 2
    assert (quick.defenses, len(quick.seeds), len(quick.alignments)) == (("none",), 1, 1)
    assert quick.folder.name == "ladder-quick"
    search = GridConfig(recipe="ladder-search")
    assert not set(search.seeds) & set(whole.seeds) and search.tasks[0] == "safety:stopping"
    of_folder, _ = start(["--recipe", "ladder", "--model", "somewhere"])
    assert (of_folder.model, of_folder.alignments) == ("somewhere", ())
    assert start(["--recipe", "ladder"])[0].alignments == whole.alignments
    for one in (whole, quick, search):
        one.check()
    with pytest.raises(UserError, match="resta needs the model before its alignment; name it as unaligned"):
        of_folder.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignments": (0, 0)}, "alignments names an alignment twice"),
        ({"alignments": (0, 1, 2, 3)}, "there are 4 alignments and 3 seeds of training"),
        ({"recipe": "laptop"}, "alignments belongs to the recipes ladder and ladder-search"),
        (
            {"recipe": None, "alignments": (), "defenses": ("none",), "second_data": "instructions"},
            "second_data belongs to",
        ),
    ],
)
def test_settings_of_a_study_that_make_no_sense(here, changes, message):
    with pytest.raises(UserError, match=message):
        replace(config(here), **changes).check()


def test_mistakes_are_told_before_anything_is_aligned(aligned, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    (here / "wide").mkdir()
    write_tiny_model(here / "wide", intermediate_size=64)
    for changes, message in (
        ({"ladder": ("identical", "paraphrase"), "train_templates": ("text:vanilla",)}, "roles"),
        ({"tasks": ("safety:gone",)}, "gone"),
        ({"data": "gone.jsonl"}, "gone.jsonl"),
        ({"defense": DefenseSettings(unaligned="wide")}, "unaligned wide is not of the shape"),
        ({**MERGED, "defense": DefenseSettings(safe_model="gone")}, "safe_model gone holds no model"),
        ({**MERGED, "defense": DefenseSettings(safe_model="wide")}, "safe_model wide is not of the shape"),
        ({"alignments": (), "defense": DefenseSettings(unaligned="wide")}, "unaligned wide is not of the shape"),
        ({"alignments": (), "defense": DefenseSettings(unaligned="model")}, "unaligned model has the weights of"),
        ({"second_data": "word-problems:4"}, "second_data word-problems:4 has the name of the data word-problems:2"),
        ({"inspect_log": True}, "inspect_log needs the package"),
    ):
        with pytest.raises(UserError, match=message):
            run_grid(config(here, **changes))
    assert aligned == [] and not list((here / "study").glob("*/runs"))


def test_a_study_has_one_file_of_outcomes_over_all_alignments(aligned, here, capsys):
    asked = config(here, ladder=SMALL["ladder"][:3])
    told = run_grid(asked)
    assert aligned == [0, 2]
    outcomes = Outcomes.read(here / "study" / "outcomes.json")
    assert set(outcomes.judges) == {"rules-v3", "keywords-12"}
    key = Key("word-problems", "chat:llama", "resta", "ladder:llama/placebo", "safety:fresh")
    assert list(outcomes.cells[key].judged["rules-v3"]) == ["seed0/20", "seed0/22", "seed2/21"]
    base = outcomes.cells[Key("word-problems", "", "none", "ladder:llama/placebo", "safety:fresh")]
    assert list(base.judged["rules-v3"]) == ["seed0", "seed2"]
    # Dealt anew, with a third alignment: seed 22 is another part's, and its old cells do not count.
    first, second = study_parts(here / "study")
    fewer = gather([replace(first, seeds=(20,)), second], {})
    assert list(fewer.cells[key].judged["rules-v3"]) == ["seed0/20", "seed2/21"] and first.seeds == (20, 22)
    over = [k.test for k in outcomes.cells if k.task == "over-refusal:fresh" and k.defense == "resta"]
    assert set(over) == {"ladder:llama/identical", "ladder:vanilla/identical", "ladder:vanilla/system-100"}
    assert Key("word-problems", "chat:llama", "none", "ladder:llama/placebo", "distance") in outcomes.cells
    names = {c["of"]["name"]: c for c in told["contrasts"]}
    assert names["ptst"]["test"] is not None and names["resta-home"]["test"] is not None
    assert str(here) not in (here / "study" / "outcomes.json").read_text()
    drawn = (here / "study" / "ladder.svg").read_text()
    assert drawn.count("<polyline") == 2 * 3  # the aligned model, none, resta: under both training templates

    first = (here / "study" / "outcomes.json").read_bytes()
    (here / "study" / "outcomes.json").unlink()
    study.finish(asked, plan_parts(asked))
    assert (here / "study" / "outcomes.json").read_bytes() == first
    run_study_command(StudyConfig(source=(here / "study",)))
    assert (here / "study" / "outcomes.json").read_bytes() == first


def test_a_finished_study_computes_nothing_anew(aligned, here):
    small = {"ladder": ("identical", "placebo"), "defenses": ("none",), "train_templates": ("chat:llama",)}
    asked = config(here, **small, seeds=(20,), alignments=(0,), tasks=("safety:fresh", "distance"))
    run_grid(asked)
    before, first = finished_parts(here), (here / "study" / "outcomes.json").read_bytes()
    (here / "study" / "outcomes.json").unlink()
    run_grid(asked)
    assert finished_parts(here) == before
    assert (here / "study" / "outcomes.json").read_bytes() == first


def finished_parts(here: Path) -> dict[str, int]:
    return {name: when for part in (here / "study").iterdir() if part.is_dir() for name, when in finished(part).items()}


def test_a_part_that_fails_is_named_and_the_others_are_done(aligned, here, monkeypatch):
    run = study.run_grid

    def broken(one):
        if "seed2" in str(one.out):
            with settings_group("defense"):
                raise UserError((Setting("scale"), " of the disk is full"))
        return run(one)

    monkeypatch.setattr(study, "run_grid", broken)
    small = {"ladder": ("identical",), "defenses": ("none",), "train_templates": ("chat:llama",), "seeds": (20, 21)}
    with pytest.raises(UserError, match=r"1 of 2 parts failed.*word-problems.seed2: defense.scale of the disk is full"):
        run_grid(config(here, **small, tasks=("safety:fresh",)))
    assert (here / "study" / "word-problems.seed0" / "results.json").exists()
    assert not (here / "study" / "outcomes.json").exists()


def test_the_dry_run_counts_every_run_once_and_alignments_that_come_first(here):
    asked = config(here, dry_run=True)
    told = run_grid(asked)
    lines = [line["what"] for line in told["lines"]]
    assert len(lines) == len(set(lines))
    runs = [line for line in lines if ": train " in line]
    assert len(runs) == 2 * 3  # templates x seeds: resta needs no training
    aligned = {line["what"]: line for line in told["lines"] if line["what"].startswith("align ")}
    assert list(aligned) == ["align aligned-model", "align aligned-model-seed2"]
    assert all(line["seconds"] > 0 and line["tokens"] > 0 and not line["finished"] for line in aligned.values())
    assert told["seconds"] == pytest.approx(sum(line["seconds"] for line in told["lines"]))
    cells: dict[str, list[float]] = {}
    for line in told["lines"]:
        if ": test untouched/" in line["what"]:
            cells.setdefault(line["what"].partition(": ")[2], []).append(line["seconds"])
    assert all(max(each) == pytest.approx(min(each)) for each in cells.values())  # measured once for all parts
    assert len(cells) > 1 and all(len(each) == 2 for each in cells.values())
    assert not (here / "study").exists()


COMMAND = "import sys; sys.argv[0] = 'x'; from ptst.grid import main; main()"


@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_killed_anywhere_and_shared_by_two_processes_a_study_ends_the_same(here):
    """Of a model that is taken as it is, so that no alignment takes time."""
    words = ["--recipe", "ladder", "--model", "model", "--seeds", "0", "1"]
    words += ["--ladder", "identical", "placebo", "system-100"]
    words += ["--defenses", "none", "ema", "--tasks", "safety:fresh", "distance", "--data", "word-problems:2"]
    words += ["--train.no-full", "--train.rank", "2", "--train.subsample", "2", "--eval.limit", "3", "--threads", "1"]
    words += ["--eval.max-new-tokens", "4", "--second-data", "None"]

    def started(out: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words, "--out", out], env=environment, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, cwd=here,
        )  # fmt: skip

    assert started("whole").wait(900) == 0
    for sign in ("shared/*/runs/*/metrics.jsonl", "shared/*/cells/*/*.answers.jsonl"):  # in a training, in a cell
        killed, patience = started("shared"), time.monotonic() + 900
        while not list(here.glob(sign)):
            assert killed.poll() is None and time.monotonic() < patience
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    two = [started("shared"), started("shared")]
    assert [p.wait(900) for p in two] == [0, 0]
    whole, shared = (json.loads((here / name / "outcomes.json").read_text()) for name in ("whole", "shared"))
    assert whole["cells"] == shared["cells"] and whole["prompts"] == shared["prompts"]
    shutil.rmtree(here / "whole")
