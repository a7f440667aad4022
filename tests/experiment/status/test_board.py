"""The display of a grid's workers, and what workers write for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.experiment import workers
from ptst.experiment.board import Board
from ptst.experiment.status.at_work import Note, read_notes
from ptst.experiment.status.items import Item, by_name, read_items
from ptst.experiment.status.observe import Observer
from ptst.experiment.status.report import report
from ptst.experiment.status.watch import Part, Watch
from ptst.progress import ProgressLine
from tests.experiment.conftest import CONFIG, ONE_RUN


def test_a_grid_writes_down_what_there_is_to_do_and_what_its_time_came_of(grid, here):
    grid("grid", ONE_RUN, train=replace(CONFIG.train, full=True, lr=1e-2), tasks=("over-refusal", "nll"))
    items = read_items(here / "grid")
    assert len(items) == 1 + 2 * 2
    run, cell = items["train chat-vanilla.seed0"], items["test chat-vanilla.seed0/chat-llama.over-refusal"]
    record = json.loads((here / "grid/runs/chat-vanilla.seed0/run.json").read_text())
    assert (run.parts, run.tokens) == (record["steps"], record["trained"]["tokens"])
    assert 0 < run.fixed < 3 * run.tokens  # the head is computed for trained tokens alone
    assert (cell.parts, cell.answers, cell.loads, cell.needs) == (3, 3 * 5, "read", "chat-vanilla.seed0")
    assert items["test untouched/chat-llama.nll"].answers == 0
    seen = Observer(here / "grid").look(items).seen
    answered, scored = (seen[f"test chat-vanilla.seed0/chat-llama.{task}"] for task in ("over-refusal", "nll"))
    assert 0 < answered.answered <= 15 and answered.around > 0
    assert scored.answered is None and scored.around is None  # the model was there already
    assert seen["train chat-vanilla.seed0"].around > 0
    found = report(here / "grid")
    assert (found.state, found.done, found.total, read_notes(here / "grid")) == ("finished", 5, 5, [])


def test_what_failed_is_told_until_it_is_tried_again(grid, here, monkeypatch):
    def broken(_config):
        raise UserError("the data are gone", "bring them back")

    with monkeypatch.context() as patch:
        patch.setattr(workers, "fine_tune", broken)
        with pytest.raises(UserError, match="the data are gone"):
            grid("grid", ONE_RUN)
    found = report(here / "grid")
    assert found.state == "stopped" and list(found.failed) == ["train chat-vanilla.seed0"]
    assert found.failed["train chat-vanilla.seed0"] == found.error == "the data are gone; bring them back"
    assert found.done == 2 and "test untouched/chat-llama.safety" not in found.left
    grid("grid", ONE_RUN)
    assert report(here / "grid").failed == {} and report(here / "grid").state == "finished"


def test_a_worker_that_dies_of_a_bug_leaves_its_error(grid, here, monkeypatch):
    def bug(_config):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(workers, "fine_tune", bug)
    with pytest.raises(ZeroDivisionError):
        grid("grid", ONE_RUN)
    assert report(here / "grid").error == "ZeroDivisionError: division by zero"


def test_every_worker_shows_the_others_and_the_time_left(tmp_path, capsys):
    items = by_name(Item("train", name, fixed=100, parts=4) for name in "abc")
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"kind": "train", "status": "finished", "time": {"seconds": 600}}')
    (tmp_path / "workers").mkdir()
    other = Note(host="elsewhere", pid=7, doing=["train b"], told="train 3/4")
    (tmp_path / "workers/elsewhere.7.json").write_text(json.dumps(vars(other)))
    shown = Board("runs and cells", tmp_path, Watch([Part(tmp_path, "", items)]))
    with shown as board, board.busy("train c"), ProgressLine("train", 4, every=0.0) as line:
        line.update(1)
        (own,) = (note for note in read_notes(tmp_path) if note.is_here)
        assert own.doing == ["train c"]
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("runs and cells 1/3  train 1/4")
    assert re.search(r"(10:00|9:5\d) left, until", told)  # two runs, two workers
    assert "1 other worker: process 7 on elsewhere: train b for 0:0" in told and "train 3/4" in told
