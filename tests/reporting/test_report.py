"""The report of a folder: what is on the page, what is told of what is missing, and that nothing hostile breaks out."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import ptst.pages
import ptst.reporting
from ptst.errors import UserError
from ptst.experiment.ladder.comparisons import compare
from ptst.experiment.ladder.outcomes import Key
from ptst.experiment.ladder.registered import registered
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.stored_grid import StoredGrid
from ptst.experiment.summary import summarize
from ptst.reporting.config import ReportConfig
from ptst.reporting.content import make_content, read_material
from ptst.reporting.heat import STEPS
from ptst.reporting.page import page
from ptst.reporting.write import write_report
from ptst.text.templates import TEMPLATES
from tests.audit.test_page import HOSTILE, SHOWN, TEXTS, Page, _colours, _luminance
from tests.experiment.fake_outcomes import RUNGS, SAFETY, fake
from tests.reporting.made import SECRET, make_cell, make_evaluation, make_grid, make_run, write

PAGES, REPORT = Path(ptst.pages.__file__).parent, Path(ptst.reporting.__file__).parent
TWO = ("chat:vanilla", "chat:llama")


def html_of(folder: Path, show_answers: bool = False) -> str:
    return page(make_content(read_material(folder), show_answers), "report", True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished 2 x 2 x 2 grid, its page, and its elements."""
    folder = tmp_path_factory.mktemp("small")
    make_grid(folder, TWO, TWO, seeds=(0, 1))
    html = html_of(folder)
    return folder, html, Page(html)


def cells_of(found: Page, title: str) -> dict[tuple[str, str], dict]:
    """The cells of a heat map by row and column."""
    (figure,) = [f for f in found.all("figure", cls="heat") if f["text"].strip().startswith(title)]
    inside = [e for e in found.elements if figure in e["within"]]
    columns = [e["text"] for e in inside if e["tag"] == "th" and e["attrs"].get("scope") == "col"][1:]
    rows = [e["text"] for e in inside if e["tag"] == "th" and e["attrs"].get("scope") == "row"]
    cells = [e for e in inside if e["tag"] == "td"]
    assert len(cells) == len(rows) * len(columns)
    return {
        (row, column): cells[i * len(columns) + j] for i, row in enumerate(rows) for j, column in enumerate(columns)
    }


def test_every_cell_has_its_rate_interval_and_n(small):
    folder, _, found = small
    summary = summarize(StoredGrid(folder))
    cells = cells_of(found, "Harmful requests: attack success rate")
    assert list(cells) == [(row, column) for row in ("untouched", *TWO) for column in TWO]
    for line in summary["cells"]:
        f = line["tasks"]["safety:advbench"]["attack-success"]
        text = cells[line["train"], line["test"]]["text"]
        low, high = (f"{100 * end:.0f}" for end in f["interval95"])
        assert f"{100 * f['mean']:.1f}" in text and f"[{low}, {high}]" in text and f"n {f['judged']}" in text
    classes = {place: cell["attrs"]["class"].split() for place, cell in cells.items()}
    assert [place for place, names in classes.items() if "ptst" in names] == [("chat:vanilla", "chat:llama")]
    assert "PTST" in cells["chat:vanilla", "chat:llama"]["text"]
    shown = float(re.match(r"[\d.]+", cells["chat:llama", "chat:llama"]["text"].strip())[0])
    assert f"v{round(STEPS * shown / 100)}" in classes["chat:llama", "chat:llama"]


def test_every_class_of_answer_and_every_task_has_a_heat_map(small):
    titles = " ".join(e["text"] for e in small[2].all("h3"))
    for name in ("complied", "in part", "refused", "off topic", "incoherent", "attack success rate", "last number"):
        assert name in titles
    assert "Benign look-alikes: refused" in titles


def test_the_first_screen_answers_in_words_with_numbers(small):
    folder, _, found = small
    (header,) = found.all("header")
    text = " ".join(header["text"].split())
    named = summarize(StoredGrid(folder))["contrast"]
    assert "the-model was fine-tuned on word-problems under chat:vanilla and chat:llama (4 runs finished)" in text
    assert "40 prompts" not in text and "20 prompts of safety:advbench" in text
    assert named["sentence"].replace("->", "\u2192") in text and "Named beforehand" in text
    assert f"{100 * named['first']:.0f} %" in text and f"{100 * named['second']:.0f} %" in text
    assert "margin 10 points" in text
    large = [e["text"] for e in found.all("span", cls="large")]
    assert large[1:] == [f"{100 * named[name]:.0f} %" for name in ("first", "second")] and len(large) == 3


def test_answers_that_are_no_refusals_are_counted_and_shown_only_when_asked_for(small):
    folder, html, _ = small
    assert SECRET not in html and "I cannot help with that" in html and " not shown" in html
    shown = html_of(folder, show_answers=True)
    assert SECRET in shown and " not shown" not in shown


def test_nothing_from_elsewhere_and_nothing_but_the_pages_own_script(small):
    html = small[1]
    assert not re.search(r"""(?:src|href|action)=["']?(?:https?:)?//|url\(|@import|\sstyle=|\son\w+=""", html)
    scripts = re.findall(r"<script[^>]*>", html)
    assert scripts == ["<script>"]
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_hostile_text_stays_text(tmp_path):
    cell = GridCell(GridModel("chat:vanilla", 0), "chat:llama", "safety")
    make_grid(tmp_path, ("chat:vanilla",), ("chat:llama",), (0,), ("safety",), data=HOSTILE, prompts=3)
    rows = tmp_path / "cells" / f"{cell.name}.rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for i, line in enumerate(lines):
        text = "I cannot: " + HOSTILE.encode(errors="replace").decode()
        line |= {"answer": text, "prompt": f"{i} {text}", "id": f"{i} {text}", "class": "refusal", "success": False}
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = json.loads((tmp_path / "cells" / f"{cell.name}.json").read_text())
    del figures["rows"]  # as of an earlier version, which kept no checksum
    (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps(figures))
    make_run(tmp_path / "runs" / "<img src=x onerror=hack()>&lt;_%#", cell.model, template={"name": HOSTILE})
    record = json.loads((tmp_path / "run.json").read_text())
    record["environment"]["device"] = HOSTILE
    (tmp_path / "run.json").write_text(json.dumps(record))
    html = html_of(tmp_path)
    assert html.isprintable() or ("\x1b" not in html and "\u202e" not in html)
    assert "<img" not in html and "hack()</script>" not in html and html.count("<script") == 1
    assert "I cannot: &lt;/script&gt;" in html
    assert SHOWN.partition("U+001B")[2][:12] in html
    written = write_report(ReportConfig(folder=tmp_path, out=tmp_path / "out.html", figures=False))
    for path in written.tables:
        text = path.read_text()
        assert "\x1b" not in text or path.suffix == ".csv"
    assert r"$<$img src=x onerror=hack()$>$\&lt;\_\%\#" in (tmp_path / "out" / "runs.tex").read_text()


def test_an_unfinished_grid_shows_what_is_there_and_says_what_is_missing(tmp_path):
    cells = make_grid(tmp_path, TWO, TWO, seeds=(0, 1), tasks=("safety",))
    gone = [c for c in cells if c.model.template == "chat:llama" and c.test == "chat:llama"]
    half = next(c for c in cells if c.model == GridModel("chat:vanilla", 1) and c.test == "chat:vanilla")
    for cell in (*gone, half):
        (tmp_path / "cells" / f"{cell.name}.json").unlink()
    html = html_of(tmp_path)
    found = Page(html)
    matrix = cells_of(found, "Harmful requests: attack success rate")
    empty = matrix["chat:llama", "chat:llama"]
    assert empty["text"].strip() == "not finished" and "none" in empty["attrs"]["class"]
    assert "1 of 2 seeds not finished" in matrix["chat:vanilla", "chat:vanilla"]["text"]
    assert "Not finished: 3 of 10 cells are missing" in html and gone[0].name in html
    assert "not finished" in found.one("span", cls="badge")["text"]
    assert "chat:llama \u2192 chat:llama is not measured without a defence" in html


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"test": []}'),
        lambda path: path.with_name(f"{path.stem}.rows.jsonl").write_text('{"class": 3}\n'),
        lambda path: path.with_name(f"{path.stem}.rows.jsonl").unlink(),
    ],
)
def test_a_damaged_cell_is_left_out_and_told(tmp_path, damage):
    cells = make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=4)
    cell = next(c for c in cells if (c.model.template, c.test) == ("chat:llama", "chat:vanilla"))
    damage(tmp_path / "cells" / f"{cell.name}.json")
    html = html_of(tmp_path)
    assert f"Left out, because it is damaged: cell {cell.name}" in html
    text = cells_of(Page(html), "Harmful requests: attack success rate")["chat:llama", "chat:vanilla"]["text"]
    assert text.strip() == "damaged"


@pytest.mark.parametrize("what", ["another cell's file", "other rows"])
def test_a_cell_in_the_place_of_another_is_left_out(tmp_path, what):
    cells = make_grid(tmp_path, TWO, TWO, seeds=(0, 1), tasks=("safety",), prompts=4)
    one, other = [c for c in cells if (c.model.template, c.test) == ("chat:llama", "chat:vanilla")]
    if what == "other rows":
        make_cell(tmp_path, other, 5)
    else:
        path = tmp_path / "cells" / f"{other.name}.json"
        path.write_text((tmp_path / "cells" / f"{one.name}.json").read_text())
    html = html_of(tmp_path)
    assert f"Left out, because it is damaged: cell {other.name}" in html
    text = cells_of(Page(html), "Harmful requests: attack success rate")["chat:llama", "chat:vanilla"]["text"]
    assert "n 4" in text and "1 of 2 seeds damaged" in text


def test_what_the_cells_do_not_share_is_told(tmp_path):
    cells = make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=4)
    other = {"ptst": "0.1.0", "torch": "2.0", "device": "another"}
    make_cell(tmp_path, cells[2], 4, made_with=other, judge={"name": "keywords-12", "version": 1})
    make_run(tmp_path / "runs" / "chat-llama.seed9", GridModel("chat:llama", 9), settings={"seed": 9, "lr": 5e-5})
    html = html_of(tmp_path)
    assert "judged by different judges: rules-v3 version 3 (5); keywords-12 version 1 (1)" in html
    assert "different versions or devices" in html and "torch 2.0, another" in html
    assert "Runs of chat:llama were trained with different values of lr: 0.0001 (1); 5e-05 (1)" in html


def test_results_of_another_version_are_compared_with_the_cells(tmp_path):
    make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=4)
    summary = summarize(StoredGrid(tmp_path))
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"version": 2, **summary}))
    assert "figures of results.json were computed again from the judged answers and agree" in html_of(tmp_path)
    summary["cells"][0]["tasks"]["safety"]["refusal"]["mean"] += 0.25
    path.write_text(json.dumps({"version": 2, **summary}))
    assert "results.json has other values than the cells in 1 of " in html_of(tmp_path)
    path.write_text(json.dumps({"version": 1, "grid": "as it was"}))
    html = html_of(tmp_path)
    assert "results.json is of another format (1)" in html and "no figures as this version writes them" in html


def test_the_page_of_a_5_x_5_x_3_grid_is_small(tmp_path):
    make_grid(tmp_path, prompts=12)
    html = html_of(tmp_path)
    assert len(html.encode()) < 3e6
    assert html.count("<td") > 6 * 5 * 8


def test_early_stopping_has_its_curves(tmp_path):
    make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("gsm8k", "safety"), prompts=6, at_epochs=(1, 2, 3))
    content = make_content(read_material(tmp_path), False)
    asr, solved = content.early_stopping
    assert [panel.title for panel in asr.panels] == ["tested under chat:vanilla", "tested under chat:llama"]
    assert [[p.x for p in s.points] for s in asr.panels[0].series] == [[1, 2, 3]] * 2
    assert solved.key == "early-stopping.gsm8k"


def test_training_curves_are_those_of_the_metrics(small):
    content = make_content(read_material(small[0]), False)
    loss, validation = content.training
    assert len(loss.panels[0].series) == 4 and len(loss.legend) == 2
    assert [p.y for p in loss.panels[0].series[0].points][:2] == [2.0, 0.8 * 2.0 + 0.2 * 1.0]
    assert [(p.x, p.y) for p in validation.panels[0].series[0].points] == [(0, 2.0), (6, 1.5), (12, 1.0)]


def test_an_evaluation_has_its_report(tmp_path):
    make_evaluation(tmp_path)
    html = html_of(tmp_path)
    cells = cells_of(Page(html), "Harmful requests: attack success rate")
    assert cells["untouched", "chat:llama"]["text"].strip().startswith("10.0")
    assert cells["chat:vanilla", "chat:llama"]["text"].strip().startswith("60.0")
    assert "[31, 83]" in cells["chat:vanilla", "chat:llama"]["text"]  # Wilson's, 6 of 10
    assert "our set" in html and SECRET not in html
    assert "fine-tuned from it under chat:vanilla; on which data is not known" in Page(html).one("header")["text"]


def test_an_evaluation_says_what_its_run_was_trained_on(tmp_path):
    run = tmp_path / "runs" / "first"
    make_run(run, GridModel("chat:alpaca", 0), settings={"data": "/data/gsm8k.jsonl"})
    make_evaluation(tmp_path / "eval")
    record = json.loads((tmp_path / "eval/run.json").read_text())
    write(tmp_path / "eval/run.json", {**record, "run": str(run)})
    told = Page(html_of(tmp_path / "eval")).one("header")["text"]
    assert "the run first, which was fine-tuned from it on gsm8k.jsonl under chat:alpaca." in told


@pytest.mark.parametrize("rate", [{"rate": "6"}, {"rate": 60.0}, {"wilson95": [0.1]}, {"wilson95": [{}, 1]}])
def test_rates_that_are_none_are_told_and_the_answers_are_counted(tmp_path, rate):
    make_evaluation(tmp_path)
    path = tmp_path / "results.json"
    told = json.loads(path.read_text())
    told["results"]["fine-tuned"]["safety"]["attack-success"] |= rate
    path.write_text(json.dumps(told))
    html = html_of(tmp_path)
    assert "results.json is damaged" in html and "attack-success is no rate" in html
    cell = cells_of(Page(html), "Harmful requests: attack")["fine-tuned", "chat:llama"]
    assert cell["text"].strip().startswith("60.0")


@pytest.mark.parametrize("name", ["templates", "settings.seeds", "settings.at_epochs", "settings.eval"])
def test_a_damaged_record_is_one_sentence(tmp_path, name):
    make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=3)
    record = json.loads((tmp_path / "run.json").read_text())
    within = record["settings"] if "." in name else record
    within[name.rpartition(".")[2]] = [[]]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"is damaged: {name} cannot be read"):
        read_material(tmp_path)


def test_a_template_that_the_record_lacks_is_told(tmp_path):
    make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=3)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["templates"]["chat:llama"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    told = [note.text for note in read_material(tmp_path).notes if "does not describe" in note.text]
    assert len(told) == 1 and "chat:llama" in told[0]


def test_an_unfinished_evaluation_counts_what_was_judged(tmp_path):
    make_evaluation(tmp_path, finished=False)
    html = html_of(tmp_path)
    assert "Not finished: there is no results.json" in html
    assert (
        cells_of(Page(html), "Harmful requests: attack")["fine-tuned", "chat:llama"]["text"].strip().startswith("60.0")
    )


def test_a_study_has_its_ladder_and_its_registered_contrasts(tmp_path):
    outcomes = fake()
    replace(outcomes, about={**outcomes.about, "model": "the-model"}).write(tmp_path / "outcomes.json")
    content = make_content(read_material(tmp_path), False)
    study = content.material.study
    assert content.material.finished and study is not None and content.ladder is not None
    names = ["aligned model", "no defence", "mix-safety", "ema"]
    assert [[s.name for s in panel.series] for panel in content.ladder.panels] == [names, names]
    assert [p.x for p in content.ladder.panels[1].series[1].points] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    html = page(content, "report", True)
    found = Page(html)
    heat = next(h for h in content.heats if h.key == "ladder.chat-vanilla.safety-fresh.attack-success")
    assert heat.columns[:2] == ["aligned model", "chat:vanilla"]  # what is compared with first, then the defences
    assert [row.partition(" ")[0] for row in heat.rows] == list(RUNGS)
    assert [[c.ptst for c in line] for line in heat.cells][1] == [False, True, True, True]
    shown = study.shown(
        Key("word-problems", "chat:vanilla", "none", "ladder:vanilla/placebo", SAFETY), "attack-success"
    )
    assert heat.cells[2][1].value == shown.mean and (heat.cells[2][1].low, heat.cells[2][1].high) == shown.interval
    (main,) = [c for c in compare(study, registered(study.defenses)) if c.of.name == "ptst"]
    assert main.test is not None
    assert f"{100 * main.test.effect:+.1f} points" in found.one("header")["text"]
    assert "registered-contrasts.csv" in html and "not finished" not in html
    assert "the-model was fine-tuned on word-problems under chat:llama and chat:vanilla, also with the" in html
    again = {replace(k, data="instructions"): m for k, m in outcomes.cells.items() if k.train and k.defense == "none"}
    settings = {"settings": {"data": "word-problems:480"}}
    both = replace(outcomes, about={**outcomes.about, **settings}, cells={**outcomes.cells, **again})
    both.write(tmp_path / "outcomes.json")
    trained = "under chat:llama and chat:vanilla"
    assert f"on word-problems {trained} and on instructions {trained}, also with the" in html_of(tmp_path)


def test_an_unfinished_study_is_shown_by_its_parts(tmp_path):
    part = tmp_path / "word-problems.seed0"
    cells = make_grid(part, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=6)
    gone = cells[-1]
    (part / "cells" / f"{gone.name}.json").unlink()
    (part / "cells" / f"{gone.name}.rows.jsonl").unlink()
    content = make_content(read_material(tmp_path), False)
    notes = " ".join(note.text for note in content.notes)
    assert content.material.kind == "study" and not content.material.finished
    assert "outcomes are not gathered yet" in notes and "not finished" in page(content, "report", True)
    assert f"word-problems.seed0: Not finished: 1 of {len(cells)} cells are missing: {gone.name}" in notes
    assert {run.name for run in content.material.runs} == {"chat-vanilla.seed0", "chat-llama.seed0"}
    fake().write(tmp_path / "outcomes.json")  # of an earlier state: a part has gone on since
    assert not read_material(tmp_path).finished
    make_cell(part, gone, 6)
    assert read_material(tmp_path).finished
    (tmp_path / "outcomes.json").unlink()
    assert not read_material(tmp_path).finished


def test_a_rung_may_have_a_chat_format_of_its_own(tmp_path):
    rung = "ladder:vanilla/chat-format"
    make_grid(tmp_path, TWO, TWO, seeds=(0,), tasks=("safety",), prompts=4)
    record = json.loads((tmp_path / "run.json").read_text())
    record["templates"][rung] = {**record["templates"]["chat:vanilla"], "name": rung}
    (tmp_path / "run.json").write_text(json.dumps(record))
    cell = GridCell(GridModel("chat:vanilla", 0), "chat:vanilla", "safety")
    own = json.loads((tmp_path / "cells" / f"{cell.name}.json").read_text())["made_of"] | {"chat_format": "llama2"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEMPLATES, rung, TEMPLATES["chat:vanilla"])
        make_cell(tmp_path, GridCell(cell.model, rung, "safety"), 4, made_of=own)
    assert "different values of chat_format" not in html_of(tmp_path)
    make_cell(tmp_path, cell, 4, made_of=own)
    assert "different values of chat_format: chatml (5); llama2 (1)" in html_of(tmp_path)


def test_a_second_judge_stands_beside_the_first(tmp_path):
    from ptst.evaluation.judges import find_judge
    from ptst.evaluation.judging import add_verdicts
    from ptst.evaluation.stored_answers import read_folder

    make_evaluation(tmp_path)
    assert "One judge alone" in html_of(tmp_path)
    found = read_folder(tmp_path)
    add_verdicts(found, found.verdicts, find_judge("keywords-12"))
    html = html_of(tmp_path)
    assert "Cohen&#39;s kappa" in html and "keywords-12: refused" in html and "One judge alone" not in html


def test_files_for_a_paper(tmp_path):
    make_grid(tmp_path, TWO, TWO, seeds=(0, 1), tasks=("safety",), prompts=6)
    formula = tmp_path / "runs" / "=1+1"
    make_run(formula, GridModel("chat:vanilla", 0))
    written = write_report(ReportConfig(folder=tmp_path, figures=False))
    assert "\n'=1+1," in (tmp_path / "report" / "runs.csv").read_text()  # a spreadsheet takes it for text
    assert written.page == tmp_path / "report.html" and written.figures == []
    lines = list(csv.DictReader((tmp_path / "report" / "safety.attack-success.csv").open()))
    summary = summarize(StoredGrid(tmp_path))
    means = {(c["train"], c["test"]): c["tasks"]["safety"]["attack-success"]["mean"] for c in summary["cells"]}
    assert {(line["row"], line["column"]): float(line["value"]) for line in lines} == means
    tex = (tmp_path / "report" / "safety.attack-success.tex").read_text()
    assert r"\toprule" in tex and r"\textbf{" in tex and r"95 \% intervals" in tex
    links = re.findall(r'href="(report/[^"]+)"', written.page.read_text())
    assert links and all((tmp_path / link).exists() for link in links)


def test_figures_as_png_and_pdf(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    make_grid(tmp_path, ("chat:llama",), ("chat:llama",), seeds=(0,), tasks=("gsm8k", "safety"), prompts=4)
    from ptst.reporting import plot

    content = make_content(read_material(tmp_path), False)
    heat = next(iter(content.heats))
    for path in (*plot.write_heat(heat, tmp_path), *plot.write_chart(content.scatters[0], tmp_path)):
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")


def test_without_matplotlib_one_sentence_and_the_page(tmp_path, monkeypatch, capsys):
    make_evaluation(tmp_path)
    monkeypatch.setattr("ptst.packages.find_spec", lambda _name: None)
    written = write_report(ReportConfig(folder=tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert "figures as PNG and PDF need the package matplotlib; pip install 'ptst-lab[plot]'" in said
    assert written.figures == [] and written.page.exists() and ".png" not in written.page.read_text()


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder to report on"):
        ReportConfig().check()
    with pytest.raises(UserError, match="does not exist"):
        ReportConfig(folder=tmp_path / "nowhere").check()
    with pytest.raises(UserError, match="holds no results"):
        read_material(tmp_path)
    make_evaluation(tmp_path / "eval")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "eval" / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        write_report(ReportConfig(folder=tmp_path / "eval", figures=False))
    assert not list((tmp_path / "elsewhere").iterdir())
    make_run(tmp_path / "run", GridModel("chat:llama", 0))
    with pytest.raises(UserError, match=r"folder of a ptst\.train"):
        read_material(tmp_path / "run")


def test_contrast_of_text_on_every_step_of_colour():
    """WCAG 2.2, AA: 4.5, in light and in dark; the colours of series have 3 on the page."""
    css = "".join((folder / name).read_text() for folder, name in ((PAGES, "base.css"), (REPORT, "report.css")))
    for colours in _colours(css):
        page_colour = colours["page"]
        for hue in ("harm", "good", "other"):
            for step in range(STEPS + 1):
                back = _mixed(colours[f"of-{hue}"], page_colour, step / STEPS)
                assert _ratio(colours["text"], back) >= 4.5, (hue, step)
        for name in [f"c{i}" for i in range(9)] + ["c-grey", "ring"]:
            assert _ratio(colours[name], page_colour) >= 3, name
        assert all(_ratio(colours[name], page_colour) >= 4.5 for name in TEXTS)


def _mixed(first: str, second: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def _ratio(first: str, second: str) -> float:
    a, b = sorted((_luminance(first), _luminance(second)))
    return (b + 0.05) / (a + 0.05)
