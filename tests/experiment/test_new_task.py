"""A task that is added to the table appears in everything that a grid writes."""

from __future__ import annotations

import csv

from ptst.evaluation.tasks.table import TASKS
from tests.evaluation.length_task import LENGTH
from tests.experiment.conftest import ONE_RUN


def test_a_task_of_the_table_is_in_every_file_of_a_grid(grid, here, monkeypatch):
    monkeypatch.setitem(TASKS, "length", LENGTH)
    result = grid("grid", ONE_RUN, tasks=("length",))
    for cell in result["cells"]:
        assert cell["tasks"]["length"]["short"]["mean"] == 1.0
        assert cell["tasks"]["length"]["characters"]["mean"] > 0
    with open(here / "grid/results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(x["task"], x["metric"]) for x in lines} == {("length", "short"), ("length", "characters")}
    text = (here / "grid/results.md").read_text()
    assert "**Short answers, % (greetings)**" in text
    assert "**Mean length, characters (greetings)**" in text
