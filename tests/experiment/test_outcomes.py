"""The file of outcomes: what a verdict becomes, that nothing is lost on disk, and what damaged files say."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest

from ptst.errors import UserError
from ptst.evaluation.judges import find_judge
from ptst.evaluation.judging import add_verdicts
from ptst.evaluation.stored_answers import read_folder
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.comparisons import against_aligned
from ptst.experiment.ladder.gather import gather, part_of, parts_of
from ptst.experiment.ladder.outcomes import ASR, COHERENT, Key, Outcomes, letter, merged, outcome
from tests.experiment.fake_outcomes import SAFETY, fake


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(AnswerClass.REFUSAL, "", success=False), "R"),
        (Verdict(AnswerClass.PARTIAL, "", success=True), "p"),
        (Verdict(AnswerClass.COMPLIANCE, "", success=True), "c"),
        (Verdict(AnswerClass.COMPLIANCE, "", success=False), "C"),
        (Verdict(AnswerClass.OFF_TOPIC, ""), "O"),
        (Verdict(None, "", success=True), "n"),
        (Verdict(None, "", failed=True), "U"),
        (None, "U"),
    ],
)
def test_a_verdict_is_a_letter(verdict, expected):
    assert letter(verdict) == expected


def test_a_letter_says_what_the_task_would_say_of_the_verdict():
    assert [outcome(x, ASR) for x in "RcCpn"] == [0, 1, 0, 1, 1]
    assert [outcome(x, "refusal") for x in "RcIO"] == [1, 0, 0, 0]
    assert [outcome(x, COHERENT) for x in "RcIO"] == [1, 1, 0, 1]
    assert all(math.isnan(outcome("U", measure)) for measure in (ASR, COHERENT, "refusal"))
    assert math.isnan(outcome("n", "refusal"))


def test_outcomes_come_back_from_the_disk_and_the_file_is_the_same_each_time(tmp_path):
    fake().write(tmp_path / "a.json")
    read = Outcomes.read(tmp_path / "a.json")
    assert read == fake()
    read.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len((tmp_path / "a.json").read_text().splitlines()) == len(fake().cells) + 7


def changed(text: str, **values) -> str:
    return json.dumps({**json.loads(text), **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format":1', '"format":9'), "of this version"),
        (lambda text: text[:-3], "is not a file of outcomes"),
        (
            lambda text: text.replace('"rules-v3":{"seed0":"', '"rules-v3":{"seed0":"R', 1),
            "has 25 letters for 24 prompts",
        ),
        (lambda text: text.replace('"seed0/20":"', '"seed0/20":"x', 1).replace('R"', '"', 1), "letter"),
        (lambda text: text.replace('"train"', '"trian"', 1), "is damaged"),
        (lambda text: changed(text, about=3), "does not say of what study"),
        (lambda text: changed(text, about={"settings": 3}), "does not say of what study"),
        (lambda text: changed(text, about={"settings": {"equivalence_margin": "x"}}), "does not say of what study"),
        (lambda text: changed(text, cells=[]), "has no cell"),
        (lambda text: changed(text, cells=json.loads(text)["cells"][:1] * 2), "has a cell twice"),
        (lambda text: changed(text, prompts={}), "lacks the prompts of"),
    ],
)
def test_a_damaged_file_says_so(tmp_path, change, message):
    path = tmp_path / "outcomes.json"
    path.write_text(change(fake().to_text()))
    with pytest.raises(UserError, match=message):
        Outcomes.read(path)


def test_parts_with_other_prompts_or_judges_or_the_same_run_are_refused():
    one, two = fake(runs=("seed0/20",)), fake(runs=("seed1/21",))
    both = merged([one, two], {"judge": "rules-v3"})
    key = Key("word-problems", "chat:llama", "none", "ladder:llama/identical", SAFETY)
    assert list(both.cells[key].judged["rules-v3"]) == ["seed0/20", "seed1/21"]
    assert both.cells[key].judged["rules-v3"]["seed1/21"] == two.cells[key].judged["rules-v3"]["seed1/21"]
    assert merged([one, one], {}).cells == one.cells, "the same results twice count once"
    with pytest.raises(UserError, match=r"seed0(/20)? of .* is in two parts with other results; leave"):
        merged([one, fake(runs=("seed0/20",), seed=1)], {})
    with pytest.raises(UserError, match="different prompts in safety:fresh"):
        merged([one, fake(families=11)], {})
    other = Outcomes({}, {"rules-v3": {"name": "rules-v3", "version": 4}}, two.prompts, two.cells)
    with pytest.raises(UserError, match="different versions of rules-v3"):
        merged([one, other], {})


def test_every_run_is_paired_with_its_own_alignment():
    outcomes = fake()
    key = Key("word-problems", "chat:llama", "none", "ladder:llama/unrelated", SAFETY)
    base = outcomes.cells[Key("word-problems", "", "none", key.test, SAFETY)].judged["rules-v3"]
    base["seed1"] = "c" * len(base["seed1"])
    base["seed0"] = "R" * len(base["seed0"])
    study = Study.of(outcomes)
    compared = against_aligned(study, ASR)[key]
    share = {run: outcomes.cells[key].judged["rules-v3"][run].count("c") / 24 for run in study.runs}
    by_alignment = [fmean(share[run] - base for run in study.runs if run.startswith(name))
                    for name, base in (("seed0", 0), ("seed1", 1))]  # fmt: skip
    assert compared.test.effect == pytest.approx(fmean(by_alignment))
    del base["seed1"]
    assert "no aligned model of seed1" in against_aligned(study, ASR)[key].note


def test_a_judge_without_verdicts_is_refused():
    with pytest.raises(UserError, match="no verdicts of the judge rules-v9; there are those of rules-v3, keywords-12"):
        Study.of(fake(), "rules-v9")


def test_the_outcomes_of_a_grid_give_its_own_results(grid, here, capsys):
    result = grid("grid", tasks=("safety", "over-refusal", "gsm8k"))
    found = read_folder(here / "grid")
    add_verdicts(found, found.verdicts, find_judge("keywords-12"))
    outcomes = gather([part_of(here / "grid")], {"judge": "rules-v3"})
    study = Study.of(outcomes)
    assert set(outcomes.judges) == {"rules-v3", "keywords-12"}
    for cell in result["cells"]:
        train = "" if cell["train"] == "untouched" else cell["train"]
        for task in ("safety", "over-refusal"):
            key = Key("word-problems:2", train, "none", cell["test"], task)
            for measure in ("refusal", "compliance", "incoherent", *[ASR] * (task == "safety")):
                table = study.table(key, measure)
                assert table.outcomes_SP.mean() == pytest.approx(cell["tasks"][task][measure]["mean"])
                assert table.runs == ((("base", 0), ("base", 1)) if train else (("base", 0),))
            keywords = outcomes.cells[key].judged["keywords-12"]
            assert keywords.keys() == outcomes.cells[key].judged["rules-v3"].keys()
            assert set("".join(keywords.values())) <= set("Rc")
        figure = cell["tasks"]["gsm8k"]["last_number"]["mean"]
        assert study.mean(Key("word-problems:2", train, "none", cell["test"], "gsm8k"), "last_number") == figure
    text = outcomes.to_text()
    assert not any(answer.answer.text and answer.answer.text in text for answer in found.answers)

    cell = here / "grid/cells/chat-llama.seed1/chat-vanilla.safety"
    cell.with_suffix(".safety.json").unlink()
    with pytest.raises(UserError, match=r"chat-vanilla\.safety\.json: is missing, and the cell has judged answers"):
        gather([part_of(here / "grid")], {})
    cell.with_suffix(".safety.rows.jsonl").unlink()
    left = gather([part_of(here / "grid")], {}).cells[
        Key("word-problems:2", "chat:llama", "none", "chat:vanilla", "safety")
    ]
    assert list(left.judged["rules-v3"]) == ["base/0"]
    assert "note: 1 cells of" in capsys.readouterr().err


def test_grids_of_one_model_and_of_several_are_one_study(grid, here):
    small = {"train_templates": ("chat:vanilla",), "test_templates": ("chat:llama",), "tasks": ("safety",)}
    grid("first", **small, seeds=(0,))
    grid("second", **small, seeds=(1, 2))
    folders = here / "first", here / "second"

    def runs(train: str) -> list[str]:
        key = Key("word-problems:2", train, "none", "chat:llama", "safety")
        return list(gather(parts_of(folders), {}).cells[key].judged["rules-v3"])

    assert runs("chat:vanilla") == ["base/0", "base/1", "base/2"] and runs("") == ["base"]
    path = here / "second/run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "xxh3:other"}))
    assert runs("chat:vanilla") == ["first/0", "second/1", "second/2"] and runs("") == ["first", "second"]
    (here / "more").mkdir()
    (here / "first").rename(here / "more/second")
    with pytest.raises(UserError, match="grids of different models in folders named second; rename one"):
        parts_of((here / "more/second", here / "second"))
