"""`ptst status` on folders of every kind: finished, unfinished, killed and damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.experiment.status.items import Item, add_items, by_name
from ptst.experiment.status.report import report
from ptst.experiment.status.study_plan import StudyPlan
from ptst.records import VERSION

ROOT = Path(__file__).resolve().parents[3]
STEP = {"kind": "step", "total": 4, "loss": 1.5, "tokens": 100, "time": {"seconds": 2.0}}


def record(folder: Path, kind: str, status: str = "running", **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"version": VERSION, "kind": kind, "status": status, **more}))
    return folder


def trained(folder: Path, steps: int, status: str = "running") -> Path:
    record(folder, "train", status, time={"seconds": 10.0} if status == "finished" else None, finished_at=100.0)
    rows = [json.dumps({**STEP, "step": n + 1}) + "\n" for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(rows) + '{"kind": "st')  # the last line is being written
    return folder


def measured(folder: Path, name: str, seconds: float = 3.0) -> None:
    path = folder / "cells" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"result": {}, "time": {"seconds": seconds}}))


PLAN = by_name(
    [
        Item("train", "a", fixed=80, parts=4),
        Item("train", "b", fixed=80, parts=4),
        *(Item("test", f"{model}/{n}.safety", "safety", fixed=30, model=model) for model in "ab" for n in (1, 2)),
    ]
)


@pytest.fixture
def grid(tmp_path) -> Path:
    """Run a and a cell of it are done; b was killed after its first of four steps."""
    folder = record(tmp_path / "grid", "grid")
    trained(folder / "runs/a", 4, "finished")
    trained(folder / "runs/b", 1)
    measured(folder, "a/1.safety")
    add_items(folder, PLAN)
    return folder


def test_a_grid_that_was_killed(grid):
    found = report(grid)
    assert (found.kind, found.state, found.done, found.total) == ("grid", "stopped", 2, 6)
    assert found.left == ["train b", "test a/2.safety", "test b/1.safety", "test b/2.safety"]
    assert found.seconds == pytest.approx(3 * 2.0 + 3 * 3.0)  # three steps, three cells
    words = "\n".join(found.words())
    assert "runs: 1 of 2 done" in words and "train b" in words and "nobody is at work" in words
    assert "about 0:15 left, until" in words


def test_a_finished_grid(grid):
    trained(grid / "runs/b", 4, "finished")
    for name in ("a/2", "b/1", "b/2"):
        measured(grid, f"{name}.safety")
    record(grid, "grid", "finished")
    found = report(grid)
    assert (found.state, found.done, found.left, found.seconds) == ("finished", 6, [], None)


def test_a_grid_of_an_earlier_version_shows_what_is_there(grid):
    (grid / "plan.json").unlink()
    found = report(grid)
    assert (found.done, found.total, found.seconds) == (2, None, None)
    assert "not written down" in "\n".join(found.words())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cells/a/1.safety.json", '{"result": ', "1.safety.json: is not valid JSON"),
        ("cells/a/1.safety.json", "[]", "1.safety.json: is damaged: it has no result, or no time"),
        ("runs/a/run.json", "{}", "run.json: is not the record of a run"),
        ("runs/a/metrics.jsonl", "\x00\n[]\n", ""),
        ("plan.json", '{"items": [{"kind": "dance"}]}', "plan.json: is not a plan"),
        ("plan.json", "[]", "plan.json: is not a plan"),
        ("run.json", "nothing", "run.json: is not valid JSON"),
        ("run.json", '{"kind": "dance"}', "run.json: is not the record of a run"),
    ],
)
def test_damaged_files_are_told_in_a_sentence(grid, name, content, told):
    (grid / name).write_text(content)
    found = report(grid)
    assert told in "\n".join(found.damaged) and bool(told) == bool(found.damaged)
    assert json.dumps(found.to_json()) and found.words()


def test_what_holds_nothing_of_ours(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        report(tmp_path / "none")
    with pytest.raises(UserError, match="holds nothing of ptst's"):
        report(tmp_path)


def test_a_training_run(tmp_path):
    folder = trained(tmp_path / "run", 1)
    (folder / "stopped.json").write_text('{"error": "the disk is full", "at": 1.0}')
    found = report(folder)
    assert (found.state, found.done, found.total, found.seconds) == ("stopped", 1, 4, 6.0)
    assert "last error: the disk is full" in "\n".join(found.words()) and "50 tokens/s" in "\n".join(found.words())
    finished = report(trained(folder, 4, "finished"))
    assert (finished.state, finished.seconds, finished.error) == ("finished", None, "")


def test_an_evaluation_an_alignment_and_a_job(tmp_path):
    data = {"safety": {"items": 3}, "nll": {"items": 2}}
    folder = record(tmp_path / "eval", "eval", run="run", data=data, settings={"baseline": True, "decode_seeds": 1})
    (folder / "answers").mkdir()
    (folder / "answers/untouched.safety.jsonl").write_text("{}\n{}\n")
    (folder / ".lock").touch()
    found = report(folder)
    assert found.done == 2 and found.left == ["safety", "nll"]
    assert "safety: 2 answers to 3 items; 0 of 2 models measured" in found.lines
    folder = record(tmp_path / "align", "align", settings={"max_steps": 80})
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "loss": 2.0}\n')
    assert report(folder).done == 7 and "80 steps at most" in "\n".join(report(folder).words())
    job = record(tmp_path / "job", "hosted-train", job={"id": "j1", "status": "running"}, endpoint="http://127.0.0.1")
    assert "job j1 at http://127.0.0.1: running" in "\n".join(report(job).words())
    several = report(tmp_path)
    assert (several.kind, several.done, several.total) == ("folder of runs", 0, 3)


def test_a_study_adds_up_its_parts(grid, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    grid.rename(study / "data.seed0")
    align = Item("align", "aligned", fixed=100)
    plan = StudyPlan(study, {"data.seed0": PLAN, "data.seed2": PLAN}, {align.what: (align, tmp_path / "aligned")})
    plan.write()
    found = report(study)
    assert (found.kind, found.state, found.done, found.total) == ("study", "stopped", 2, 13)
    assert [(part.folder.name, part.done, part.total) for part in found.parts] == [
        ("data.seed0", 2, 6),
        ("data.seed2", 0, 6),
    ]
    assert "alignments: 0 of 1 done" in found.lines and found.seconds > 0
    record(tmp_path / "aligned", "align", "finished", time={"seconds": 9.0})
    assert report(study).done == 3
    (study / "plan.json").unlink()  # of an earlier version
    assert (report(study).kind, report(study).done, report(study).total) == ("study", 2, None)
    (study / "plan.json").write_text('{"kind": "study"}')
    with pytest.raises(UserError, match="it has no parts"):
        report(study)


def test_the_command_loads_no_torch_and_prints_json(grid):
    code = "import sys\nfrom ptst.status import main\nmain()\nassert 'torch' not in sys.modules, 'torch was loaded'"
    line = [sys.executable, "-c", f"import sys; sys.argv[1:] = [{str(grid)!r}, '--json']\n{code}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["left"][0] == "train b" and told["state"] == "stopped" and told["seconds_left"] == pytest.approx(15.0)
