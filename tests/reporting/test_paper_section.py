"""A grid's figures beside the paper's, as a report shows them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from ptst.experiment.paper.beside import beside_paper
from ptst.experiment.paper.claims import claims
from ptst.experiment.stored_grid import StoredGrid
from ptst.experiment.summary import summarize
from ptst.reporting.content import make_content, read_material
from ptst.reporting.page import page
from tests.audit.test_page import Page
from tests.reporting.made import make_evaluation, make_grid

PAIR = ("chat:vanilla", "chat:llama")
TASKS = ("gsm8k", "safety:advbench", "safety:directharm4")


def llama(folder: Path, trains: tuple[str, ...] = PAIR, tasks: tuple[str, ...] = TASKS) -> None:
    """A grid of the paper's first model and data, smaller than its own."""
    make_grid(folder, trains, PAIR, tasks=tasks, prompts=12, model="meta-llama/Llama-2-7b-chat-hf", data="gsm8k")


def test_each_measured_cell_stands_beside_the_papers(tmp_path):
    llama(tmp_path)
    content = make_content(read_material(tmp_path), False)
    results = {**json.loads((tmp_path / "run.json").read_text()), **summarize(StoredGrid(tmp_path))}
    first = beside_paper(results)[0]
    assert content.paper is not None
    shown = content.paper.tables[0]
    assert f"{first.measured} of 120 cells were measured here; in {first.agreeing} of them" in shown.summary
    assert len(shown.table.rows) == first.measured > 4
    row = next(
        r for r in first.rows if r.ours is not None and (r.cell.train, r.cell.set) == ("chat:llama", "directharm4")
    )
    (line,) = [line for line in shown.table.rows if line[:3] == ["chat:llama", row.cell.test, "directharm4, asr"]]
    assert row.difference is not None and row.difference_interval is not None
    low, high = row.difference_interval
    assert line[3] == f"{row.cell.value:g} \u00b1 {row.cell.sd:g}"
    assert line[4:7] == [f"{row.ours:.1f}", f"{row.difference:+.1f}", f"{low:+.1f} to {high:+.1f}"]
    assert line[7] == ("yes" if low <= 0 <= high else "no")
    found = Page(page(content, "report", True))
    (section,) = [e for e in found.all("section") if e["attrs"].get("id") == "paper"]
    assert "directharm4 has 12 prompts, the paper's 400" in section["text"]
    assert "Table 1: Llama-2-7b-chat on GSM8K" in section["text"]


def test_every_cell_is_in_the_csv_and_every_note_is_numbered(tmp_path):
    llama(tmp_path)
    paper = make_content(read_material(tmp_path), False).paper
    assert paper is not None
    (sixth,) = [t for t in paper.tables if t.table.name == "paper.table-6"]
    lines = list(csv.DictReader(io.StringIO(sixth.table.to_csv())))
    assert len(lines) == 75 and sum(bool(line["ours"]) for line in lines) == len(sixth.table.rows)
    assert all(line["note"].startswith("not measured here") for line in lines if not line["ours"])
    flagged = [row for row in sixth.table.rows if row[5:8] == ["-", "-", "-"]]
    assert flagged and all("not compared" in sixth.notes[int(row[8]) - 1] for row in flagged)


def test_the_six_claims_with_what_decides_them(tmp_path):
    llama(tmp_path)
    content = make_content(read_material(tmp_path), False)
    results = {**json.loads((tmp_path / "run.json").read_text()), **summarize(StoredGrid(tmp_path))}
    (told,) = Page(page(content, "report", True)).all("ol", cls="claims")
    expected = claims(results)
    verdicts = [claim.verdict for claim in expected]
    assert content.paper is not None and [claim.verdict for claim in content.paper.claims] == verdicts
    assert len(set(verdicts)) > 1
    for claim in expected:
        assert claim.words in told["text"] and claim.why.replace("->", "\u2192") in told["text"]
        assert all(check.words.replace("->", "\u2192") in told["text"] for check in claim.checks)


def test_other_models_are_compared_in_the_claims_alone(tmp_path):
    make_grid(tmp_path / "grid", PAIR, PAIR, tasks=("safety",), prompts=12)
    content = make_content(read_material(tmp_path / "grid"), False)
    assert content.paper is not None and content.paper.tables == []
    assert "No table of the paper is of this model and these data" in page(content, "report", True)
    make_evaluation(tmp_path / "eval")
    assert make_content(read_material(tmp_path / "eval"), False).paper is None
    make_grid(tmp_path / "helpful", PAIR, PAIR, tasks=("gsm8k",), prompts=12)
    content = make_content(read_material(tmp_path / "helpful"), False)
    assert content.paper is None and "Beside the paper" not in page(content, "report", True)
