"""What is computed of a study's outcomes: contrasts, slopes, tables in pages, the figure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptst.errors import UserError
from ptst.evaluation.paired import paired_contrast
from ptst.evaluation.two_way import least_p
from ptst.experiment.ladder import blocks, figure, report
from ptst.experiment.ladder.analyse import figures, write_docs
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.comparisons import against_aligned, at_key, compare
from ptst.experiment.ladder.outcomes import ASR, Key, Measured, Outcomes, Prompts
from ptst.experiment.ladder.registered import HOME, SAFE, At, Pair, registered
from ptst.experiment.ladder.study_config import StudyConfig
from ptst.study import run_command
from tests.experiment.fake_outcomes import OVER, RUNGS, SAFETY, fake


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.of(fake())


def test_a_registered_contrast_is_the_paired_contrast_of_its_cells(study):
    found = {c.of.name: c for c in compare(study, registered(study.defenses))}
    tables = [
        study.table(at_key(study, at, "word-problems"), ASR) for at in (found["ptst"].of.first, found["ptst"].of.second)
    ]
    expected = paired_contrast(*tables)
    assert found["ptst"].test == expected.test
    assert expected.alignments == 2
    assert found["ema-home"].test.effect > 0.05  # the fake defences protect
    adjusted = [c.p_holm for c in found.values() if c.test is not None]
    assert all(p >= c.test.p for p, c in zip(adjusted, [c for c in found.values() if c.test], strict=True))
    assert max(adjusted) <= 1


def test_holm_is_over_the_contrasts_of_a_group_that_can_be_computed(study):
    two = [c for c in registered(study.defenses) if c.group == HOME]
    other = next(c for c in registered(study.defenses) if c.name == "ptst")
    nowhere = Pair("gone", "", At(SAFE, "no-such-rung"), At(SAFE, "identical"), HOME)
    alone, with_more = compare(study, two), compare(study, [*two, nowhere, other])
    assert len(two) == 2 and [c.p_holm for c in alone] == [c.p_holm for c in with_more[:2]]
    assert with_more[2].test is None and "the study has no cell" in with_more[2].note
    assert min(c.p_holm for c in alone) == pytest.approx(2 * min(c.test.p for c in alone))
    assert with_more[3].p_holm == with_more[3].test.p


def losses(study: Study, rung: str, train: str = SAFE) -> list[float]:
    """By run: the rate under a rung minus that of the aligned model of the run."""
    key = Key("word-problems", train, "none", f"ladder:{train.removeprefix('chat:')}/{rung}", SAFETY)
    tuned, base = study.table(key, ASR).outcomes_SP.mean(1), study.table(study.base_of(key), ASR).outcomes_SP.mean(1)
    return [rate - base[0 if run < 3 else 1] for run, rate in enumerate(tuned)]


def mean(by_run: list[float]) -> float:
    """Alignments weigh the same, however many runs they have."""
    return float(np.mean([np.mean(by_run[:3]), np.mean(by_run[3:])]))


def test_a_slope_is_that_of_a_line_through_the_losses(study):
    slope = next(c for c in compare(study, registered(study.defenses)) if c.of.name == "distance-safe")
    rungs = [test.partition("/")[2] for test in study.rungs(SAFE)]
    far = [study.distance(Key("word-problems", SAFE, "none", t, SAFETY), "edit_share") for t in study.rungs(SAFE)]
    expected = np.polyfit(far, [mean(losses(study, rung)) for rung in rungs], 1)[0]
    assert slope.test.effect == pytest.approx(expected)
    assert slope.test.interval[1] < 0  # the fake losses fall
    assert slope.test.p == least_p(5, paired=False)  # five runs that are not paired with others support no less


def test_two_prompts_of_one_model_are_compared_by_what_is_lost_under_each(study):
    found = {c.of.name: c for c in compare(study, registered(study.defenses))}
    assert found["context"].test.effect == pytest.approx(
        mean(losses(study, "identical")) - mean(losses(study, "placebo"))
    )
    assert found["context"].test.interval[0] > 0 and found["context"].test.p == least_p(5, paired=False)
    assert found["words"].of.train == "chat:vanilla" and found["words"].test.effect < 0  # the fake placebo is farther


def test_a_comparison_with_an_aligned_model_that_was_not_tested_cannot_be_made(study):
    cells = {k: m for k, m in study.outcomes.cells.items() if k.train or k.test != "ladder:llama/placebo"}
    without = Study.of(replace(study.outcomes, cells=cells))
    found = {c.of.name: c for c in compare(without, registered(without.defenses))}
    assert found["context"].test is None and "the study has no cell" in found["context"].note
    assert found["ptst"].test is not None


def test_a_table_of_contrasts_is_of_one_group_or_of_all(study):
    every, third = (blocks.table(study, "contrasts", *number).splitlines()[2:] for number in ((), ("3",)))
    assert third == [line for line in every if "-home" in line] and len(third) == 2
    with pytest.raises(UserError, match="there is no group 9 of contrasts"):
        blocks.table(study, "contrasts", "9")


def test_against_the_aligned_model_more_refusals_are_kept_and_more_compliance_is_lost(study):
    table = blocks.table(study, "aligned", "chat:llama")
    line = next(line for line in table.splitlines() if line.startswith("| identical"))
    assert line.split(" | ")[1].endswith("lost")
    over = against_aligned(study, "refusal", "over-refusal")
    key = Key("word-problems", SAFE, "none", "ladder:llama/identical", OVER)
    assert over[key].test.effect < 0  # fewer look-alikes are refused, which is no loss
    text = blocks.table(study, "aligned", "chat:llama", "refusal", "over-refusal")
    assert next(x for x in text.splitlines() if x.startswith("| identical")).split(" | ")[1].endswith("kept")


def test_rungs_are_ordered_by_distance_and_the_aligned_model_is_a_column(study):
    lines = blocks.table(study, "rungs", "chat:vanilla").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(RUNGS)
    assert lines[0].split(" | ")[2:] == ["aligned model", "none", "mix-safety", "ema |"]


def test_the_other_judge_is_set_beside_the_study_s(study):
    lines = blocks.table(study, "judges", "keywords-12").splitlines()
    ours, theirs = (float(x.split(" ")[0]) for x in lines[-1].split(" | ")[2:4])
    letters = [runs for key, m in study.outcomes.cells.items() if key.task == SAFETY for runs in [m.judged]]
    shares = {
        judge: 100 * np.mean([c.islower() for found in letters for run in found[judge].values() for c in run])
        for judge in ("rules-v3", "keywords-12")
    }
    assert (ours, theirs) == (
        pytest.approx(shares["rules-v3"], abs=0.05),
        pytest.approx(shares["keywords-12"], abs=0.05),
    )


def test_every_table_of_a_study_is_in_its_report(study):
    text = report.to_markdown(study)
    for words in ("refused, %", "coherent, %", "distances", "Registered contrasts", "rules-v3 and keywords-12"):
        assert words in text
    assert "nan" not in text


# Pages


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "outcomes").mkdir()
    fake().write(tmp_path / "outcomes" / "ladder.json")
    page = "# Page\n\n<!-- outcomes: ladder rungs chat:llama refusal -->\nold\n<!-- end -->\n\nmore\n"
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "other.md").write_text("no marks\n")
    return tmp_path


def test_pages_get_their_tables_and_the_same_ones_the_second_time(docs, study, capsys):
    told = run_command(StudyConfig(docs=docs))
    assert [path.rpartition("/")[2] for path in told["changed"]] == ["page.md", "ladder.svg"]
    page = (docs / "page.md").read_text()
    assert blocks.table(study, "rungs", "chat:llama", "refusal") in page
    assert page.startswith("# Page\n") and page.endswith("\nmore\n") and "old" not in page
    assert write_docs(docs) == []
    (docs / "page.md").write_text(page.replace("| identical | 0.00", "| identical | 0.01"))
    assert [path.name for path in write_docs(docs)] == ["page.md"]
    assert (docs / "page.md").read_text() == page


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("<!-- outcomes: ladder rungs chat:llama -->\n", "without <!-- end -->"),
        ("<!-- outcomes: ladder rungs chat:llama -->\nx <!-- end -->\n", "without <!-- end -->"),
        ("<!-- outcomes: ladder rugns chat:llama -->\n<!-- end -->", "unknown table 'rugns'; did you mean rungs"),
        ("<!-- outcomes: ladder rungs -->\n<!-- end -->", "the table rungs does not take the arguments"),
        ("<!-- outcomes: gone rungs chat:llama -->\n<!-- end -->", "gone.json of which a mark asks tables"),
        (
            "<!-- outcomes: ladder rungs chat:lama -->\n<!-- end -->",
            "unknown ladder 'chat:lama'; did you mean chat:llama",
        ),
        ("<!-- outcomes: ladder rungs chat:llama refused -->\n<!-- end -->", "unknown measure 'refused'"),
        ("<!-- outcomes: ladder aligned chat:llama refused -->\n<!-- end -->", "unknown measure 'refused'"),
        (
            "<!-- outcomes: ladder defenses chat:llama placbo -->\n<!-- end -->",
            "unknown rung 'placbo'; did you mean plac",
        ),
        (
            "<!-- outcomes: ladder matrix safety refusal -->\n<!-- end -->",
            "unknown task 'safety'; did you mean safety:fr",
        ),
        ("<!-- outcomes: ladder matrix safety:fresh refusal x -->\n<!-- end -->", "unknown training data 'x'"),
        ("<!-- outcomes: ladder differences safety:fresh refusal a/b -->\n<!-- end -->", "needs cells in pairs"),
        (
            "<!-- outcomes: ladder differences safety:fresh refusal aligned/x a/b -->\n<!-- end -->",
            "has no cell aligned model, defence none, under x",
        ),
    ],
)
def test_a_wrong_mark_is_told_with_its_page(docs, mark, message):
    (docs / "page.md").write_text(mark)
    with pytest.raises(UserError, match=rf"^{re.escape(str(docs / 'page.md'))}.*{re.escape(message)}"):
        write_docs(docs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is nothing to do"),
        ({"source": ("x",), "docs": "y"}, "there are two things to do"),
        ({"docs": ".", "out": "y"}, "out has no effect on pages"),
        ({"source": ("nowhere",)}, "there is no file or folder nowhere"),
        ({"docs": __file__}, "docs .*py is a file; name a folder"),
        ({"source": (".",), "out": __file__}, "out .*py is a file; name a folder"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        run_command(StudyConfig(**_paths(settings)))


def _paths(settings):
    return {k: tuple(map(Path, v)) if isinstance(v, tuple) else Path(v) for k, v in settings.items()}


# Figure


def test_the_figure_has_a_curve_with_intervals_for_every_defence_and_panel(study):
    root = ElementTree.fromstring(figure.draw(study))
    name = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{name}polyline")
    assert len(lines) == 2 * 4  # aligned, none, ema, mix-safety under two training templates
    assert [len(line.get("points").split()) for line in lines] == [6] * 4 + [5] * 4
    bars = [x for x in root.findall(f"{name}line") if x.get("stroke-opacity")]
    assert len(bars) == 4 * (6 + 5)
    words = {x.text for x in root.findall(f"{name}text")}
    assert sum("PTST" in (x.text or "") for x in root.findall(f"{name}text")) == 1
    assert {"aligned model", "none", "ema", "mix-safety", "trained under chat:llama"} <= words
    assert figure.draw(study) == figure.draw(Study.of(fake()))


def test_a_higher_rate_is_drawn_higher(study):
    curve = next(c for c in figure.curves(study, SAFE) if c.name == "none")
    near, far = curve.points[0], curve.points[-1]
    assert near.rate > far.rate and near.distance < far.distance
    root = ElementTree.fromstring(figure.draw(study))
    points = root.findall("{http://www.w3.org/2000/svg}polyline")[5].get("points").split()
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in (points[0], points[-1]))
    assert x0 < x1 and y0 < y1


def test_without_distances_there_is_no_figure(tmp_path):
    whole = fake()
    cells = {key: m for key, m in whole.cells.items() if key.task != "distance"}
    bare = Study.of(replace(whole, cells=cells))
    with pytest.raises(UserError, match="no ladder with distances"):
        figure.draw(bare)
    (tmp_path / "outcomes").mkdir()
    Outcomes({}, whole.judges, whole.prompts, cells).write(tmp_path / "outcomes" / "a.json")
    assert figures(tmp_path) == {}


def test_a_file_of_outcomes_becomes_tables_by_any_of_its_judges(tmp_path, capsys):
    path = tmp_path / "outcomes.json"
    fake().write(path)
    told = run_command(StudyConfig(source=(path,)))
    assert (tmp_path / "report.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "ladder.svg").read_text().startswith("<svg")
    other = run_command(StudyConfig(source=(path,), judge="keywords-12", out=tmp_path / "other"))
    assert told["contrasts"][0]["test"] != other["contrasts"][0]["test"]
    assert (tmp_path / "other" / "outcomes.json").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="no verdicts of the judge gone"):
        run_command(StudyConfig(source=(path,), judge="gone"))


def test_a_study_that_is_not_finished_names_its_grids(tmp_path):
    (tmp_path / "word-problems.seed0").mkdir()
    (tmp_path / "word-problems.seed0" / "run.json").write_text('{"kind": "grid"}')
    with pytest.raises(UserError, match=r"is a study that is not finished.*give its grids: word-problems\.seed0"):
        run_command(StudyConfig(source=(tmp_path,)))


SECOND = "instructions"  # before the main data in the order of names


@pytest.fixture(scope="module")
def of_two() -> Outcomes:
    """A study of two training data, of which the second has no defences; and a task with a loss."""
    main, other = fake(), fake(("none",), seed=1)
    cells = {**main.cells, **{replace(key, data=SECOND): found for key, found in other.cells.items()}}
    for defense, loss in (("none", 1.25), ("ema", 1.5)):
        key = Key("word-problems", SAFE, defense, "ladder:llama/identical", "nll:word-problems:10")
        cells[key] = Measured(values={"nats_per_token": {"seed0/20": loss, "seed1/21": loss + 0.5}})
    return replace(main, cells=cells, about={"judge": "rules-v3", "settings": {"data": "word-problems:480"}})


def test_tables_are_of_the_main_data_also_when_they_are_read_from_the_file(of_two, tmp_path):
    of_two.write(tmp_path / "outcomes.json")
    fake().write(tmp_path / "alone.json")
    read, alone = (Study.of(Outcomes.read(tmp_path / f"{name}.json")) for name in ("outcomes", "alone"))
    assert read.data == ["word-problems", SECOND]
    for name, *words in (("rungs", SAFE), ("aligned", SAFE), ("contrasts",), ("distances", SAFE)):
        assert blocks.table(read, name, *words) == blocks.table(alone, name, *words)
    assert figure.draw(read) == figure.draw(alone)
    markdown, _ = report.write(of_two, tmp_path)
    assert markdown == report.to_markdown(read)


def test_tables_of_the_second_data_are_theirs(of_two):
    study, alone = Study.of(of_two), Study.of(fake(("none",), seed=1))
    for name, *words in (("rungs", SAFE, "refusal", "safety"), ("contrasts", "1"), ("distances", SAFE)):
        theirs = blocks.table(alone, name, *words).replace("word-problems", SECOND)
        assert blocks.table(study, name, *words, SECOND) == theirs
    text = report.to_markdown(study)
    assert f"Trained under chat:llama on {SECOND}: refused, %" in text and f"contrasts on {SECOND}" in text


def test_a_table_of_defences_has_the_losses_of_its_own_data(of_two):
    lines = blocks.table(Study.of(of_two), "defenses", SAFE, "identical").splitlines()
    assert lines[0].endswith("| nll:word-problems:10, nats per token |")
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["aligned model", "none", "mix-safety", "ema"]
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["- |", "1.50 |", "- |", "1.75 |"]


def test_differences_are_the_contrasts_of_their_cells_corrected_together(study):
    home, pure = f"{SAFE}/ladder:llama/identical", "chat:vanilla/ladder:vanilla/system-100"
    lines = blocks.table(study, "differences", SAFETY, ASR, home, pure, home, "aligned/ladder:llama/identical")
    (name, *first), second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:])
    registered_line = next(x for x in blocks.table(study, "contrasts", "1").splitlines() if x.startswith("| ptst |"))
    of_aligned = against_aligned(study, ASR)[Key("word-problems", SAFE, "none", "ladder:llama/identical", SAFETY)]
    assert name == "`chat:llama` -> `ladder:llama/identical` minus `chat:vanilla` -> `ladder:vanilla/system-100`"
    assert first[:3] == [cell.strip() for cell in registered_line.split("|")[3:6]]
    assert float(second[1]) == pytest.approx(100 * of_aligned.test.effect, abs=0.06)
    p = sorted([compare(study, registered(study.defenses))[0].test.p, of_aligned.test.p])
    shown = sorted(float(cells[-1].removeprefix("< ")) for cells in (first, second))
    assert shown == pytest.approx([2 * p[0], max(2 * p[0], p[1])], rel=0.3)


def of_xstest() -> Study:
    """Two safe and two unsafe prompts of XSTest: no safe one is refused, and of the unsafe ones one, then both."""
    prompts = Prompts(("a", "b", "c", "d"), ("",) * 4, ("homonyms", "contrast_homonyms", "history", "contrast_history"))
    cell = {"aligned": "CRCc", "chat:vanilla": "CROR"}
    cells = {
        Key("d", train.removeprefix("aligned"), "none", "chat:llama", "xstest:x"): Measured(
            judged={"rules-v3": {"base/1" if train != "aligned" else "base": found}}
        )
        for train, found in cell.items()
    }
    return Study.of(Outcomes({}, {"rules-v3": {"name": "rules-v3"}}, {"xstest:x": prompts}, cells))


def test_a_study_tells_the_halves_of_xstest_apart():
    study = of_xstest()

    def rates(measure: str) -> list[str]:
        lines = blocks.table(study, "matrix", "xstest:x", measure).splitlines()[2:]
        return [line.split("|")[2].split()[0] for line in lines]

    assert rates("unsafe:refusal") == ["50.0", "100.0"]
    assert rates("safe:refusal") == ["0.0", "0.0"]
    assert rates("unsafe:attack-success") == ["50.0", "0.0"]
    assert rates("safe:off-topic") == ["0.0", "50.0"]
    written = report.to_markdown(study)
    assert "## xstest:x: safe prompts refused, %" in written and "## xstest:x: unsafe prompts refused, %" in written


def test_the_halves_of_xstest_are_not_counted_together(study):
    for measure, message in (
        ("refusal", "xstest:x has two halves; say which: safe:refusal or unsafe:refusal"),
        ("unsafe:refused", "unknown measure 'refused'"),
        ("both:refusal", "xstest:x has two halves"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            blocks.table(of_xstest(), "matrix", "xstest:x", measure)
    with pytest.raises(UserError, match="safety:fresh has no half unsafe: only xstest has two; say refusal"):
        study.table(Key("word-problems", SAFE, "none", "ladder:llama/identical", SAFETY), "unsafe:refusal")


def test_a_report_has_no_matrix_without_columns(study):
    assert "safety:fresh: refused" not in report.to_markdown(study)
