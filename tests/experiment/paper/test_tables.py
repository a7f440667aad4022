"""The paper's figures, checked against what does not come from its tables: sizes of test sets, and arithmetic."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import ceil, floor, sqrt

import pytest

from ptst.errors import UserError
from ptst.experiment.paper import reader
from ptst.experiment.paper.cells import PaperCell
from ptst.experiment.paper.reader import load_paper, read_paper

PAPER = load_paper()
# From the sets themselves.
SIZES = {"gsm8k": 1319, "advbench": 520, "directharm4": 400, "jailbreakbench-gcg": 100, "gsm-danger": 100}
SIZES |= {"arc-easy": 2376, "arc-challenge": 1172, "chatdoctor": 1000}


def rounding(cell: PaperCell) -> float:
    """How far a printed figure may be from a count. The GSM8K means of Tables 1 and 2 are of rates that had been
    rounded before."""
    return 0.01001 if cell.metric == "exact-match" and cell.seeds == 3 else 0.00501


def counts(cell: PaperCell) -> range:
    """Numbers of successes over all seeds that the mean may be of."""
    n = cell.seeds * cell.prompts / 100
    low, high = (cell.value - rounding(cell)) * n, (cell.value + rounding(cell)) * n
    return range(max(0, ceil(low)), floor(high) + 1)


def is_possible(cell: PaperCell, ddof: int = 0) -> bool:
    """Whether there are whole numbers of successes, one for each seed, that have this mean and SD."""
    if cell.sd is None:
        return bool(counts(cell))
    scale, width = cell.prompts / 100, (cell.sd + 0.01) * cell.prompts / 100 * sqrt(cell.seeds) + 1
    squares = [max(0.0, cell.sd + by) ** 2 * (cell.seeds - ddof) * scale**2 for by in (-rounding(cell), rounding(cell))]

    def ends(left: int, total: int, least: int, most: int, squared: int, low: float, high: float) -> bool:
        if left == 1:
            return least <= total <= most and low <= squared + total * total <= high
        tried = range(least, min(most, total // left) + 1)
        return any(ends(left - 1, total - k, k, most, squared + k * k, low, high) for k in tried)

    for total in counts(cell):
        mean = total / cell.seeds
        first, last = max(0, floor(mean - width)), min(cell.prompts, ceil(mean + width))
        low, high = (square + total * mean + tiny for square, tiny in zip(squares, (-1e-6, 1e-6), strict=True))
        if ends(cell.seeds, total, first, last, 0, low, high):
            return True
    return False


def test_every_cell_is_a_mean_of_counts_with_its_sd_or_is_flagged():
    rates = [cell for cell in PAPER.cells if cell.metric != "bertscore"]
    impossible = {cell.place for cell in rates if not is_possible(cell)}
    flagged = {cell.place for cell in PAPER.cells if cell.inconsistent}
    disagree = {("6c", train, "", "chat:llama") for train in (None, "chat:vanilla", "chat:alpaca", "chat:llama")}
    assert flagged == impossible | disagree | {("5d", None, "", "chat:llama")}
    assert len(impossible) == 8
    sample = [cell for cell in rates if cell.place in impossible and cell.sd and is_possible(cell, ddof=1)]
    assert {cell.block for cell in sample} == {"4b"}
    assert len(sample) == 4


def test_a_wrong_digit_is_noticed():
    """What the check above is worth: most changes of a digit cannot be."""
    single = [cell for cell in PAPER.cells if cell.seeds == 1 and cell.metric != "bertscore" and not cell.inconsistent]
    changed = [replace(cell, value=round(cell.value + by, 2)) for cell in single for by in (0.03, 0.1, 0.3)]
    assert sum(map(is_possible, changed)) < 0.2 * len(changed)
    assert not is_possible(replace(PAPER.table(1)[35], sd=0.3))


def test_the_tables_have_the_cells_that_the_paper_prints():
    assert Counter(cell.table for cell in PAPER.cells) == {1: 120, 2: 50, 3: 36, 4: 36, 5: 48, 6: 75, 7: 90}
    assert {(cell.set, cell.prompts) for cell in PAPER.cells} == set(SIZES.items())
    assert all(cell.seeds == 1 for cell in PAPER.cells if cell.train is None and cell.table in (1, 3, 5, 6, 7))
    assert {cell.seeds for cell in PAPER.table(4)} == {5}
    assert {cell.table for cell in PAPER.cells if cell.mixed} == {6}
    assert list(PAPER.left_out) == [8]
    with pytest.raises(UserError, match=r"table 8 is not among the tables .*AlpacaEval"):
        PAPER.table(8)


def test_tables_agree_where_they_print_the_same_run_twice():
    known: dict[tuple, float] = {}
    for cell in PAPER.cells:
        if cell.model == "Llama-2-7b-chat" and cell.data == "gsm8k" and not (cell.mixed or cell.inconsistent):
            key = cell.train, cell.test, cell.set
            assert known.setdefault(key, cell.value) == cell.value, cell.place
    assert len([c for c in PAPER.table(2) if (c.train, c.test, c.set) in known]) == 50


def test_figures_begin_and_end_where_tables_have_them():
    first = {(c.model, c.test): c.points[0].asr for c in PAPER.curves if c.points[0].at == 0}
    tables = {(c.model, c.test): c.value for c in PAPER.cells if c.train is None and c.set == "directharm4"}
    assert first == {key: tables[key] for key in first if key[0] != "Llama-2-7b-chat"} | {
        ("Llama-2-7b-chat", test): next(c.value for c in PAPER.table(1) if c.place == ("1c", None, "", test))
        for test in ("chat:vanilla", "chat:llama")
    }
    gpt = {c.place[1:]: c.value for c in PAPER.table(3) if c.set == "directharm4"}
    drawn = {(p.train, "", p.test): p.asr for p in PAPER.points if p.model.startswith("gpt")}
    shared = gpt.keys() & drawn.keys()
    assert len(shared) == 3
    assert all(abs(gpt[key] - drawn[key]) < 0.3 for key in shared)
    assert len(PAPER.points) == 18
    assert [len(curve.points) for curve in PAPER.curves] == [7, 7, 7, 4, 4, 3]


CHANGES = [
    (lambda raw: raw.pop("curves"), "curves is missing"),
    (lambda raw: raw.update(more=1), "has the unknown key more"),
    (lambda raw: raw["blocks"][0].update(colour="red"), r"blocks\[0\]: has the unknown key colour"),
    (lambda raw: raw["blocks"][0].update(unit="F1"), "metric exact-match in F1"),
    (lambda raw: raw["blocks"][0].update(seeds=True), "seeds is True, not a whole number"),
    (lambda raw: raw["blocks"][0].update(sd="sample"), "sd is over 'sample'"),
    (lambda raw: raw["blocks"][0]["tests"].pop(), r"rows\[0\]: 5 values of 4 columns"),
    (lambda raw: raw["blocks"][0]["rows"][1].update(train="chat:lama"), "'chat:lama' is no template"),
    (lambda raw: raw["blocks"][0]["rows"][1]["values"].__setitem__(0, [101]), r"\[101\] is no \[mean\]"),
    (lambda raw: raw["blocks"][0]["rows"][1]["values"].__setitem__(0, [float("nan")]), r"\[nan\] is no \[mean\]"),
    (lambda raw: raw["blocks"].append(raw["blocks"][0]), "has the cell .*1a.* twice"),
    (lambda raw: raw["inconsistent"][0].update(block="9z"), "flags a cell that is not there: .*9z"),
    (lambda raw: raw["points"][0].update(asr=-1), r"points\[0\]: asr is -1"),
    (lambda raw: raw["curves"][0]["points"][0].update(at="0"), r"points\[0\]: at must be a number"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_a_file_of_another_form_is_refused_with_the_key(tmp_path, change, message):
    raw = json.loads(reader._FILE.read_text())
    change(raw)
    (tmp_path / "tables.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as told:
        read_paper(tmp_path / "tables.json")
    assert "tables.json" in str(told.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_paper(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: is not valid JSON"):
        read_paper(tmp_path / "broken.json")
