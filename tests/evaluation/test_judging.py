"""Stored answers are judged at any time: nothing twice, nothing lost, nothing mixed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ptst.errors import UserError
from ptst.evaluation import judging, stored_verdicts
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judge_report import Judged
from ptst.evaluation.judging import judge_answers as judge
from ptst.evaluation.stored_answers import StoredAnswer, read_folder
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.generation.request import Answer
from ptst.storage import exclusive_lock
from tests.evaluation.kept import TEXTS, OpeningJudge, write_csv, write_evaluation

BOTH = ("keywords-29", "keywords-12")


@pytest.fixture
def own_judges(monkeypatch):
    """Judges of a test by their names."""

    def use(*judges) -> JudgeConfig:
        by_name = {one.name: one for one in judges}
        monkeypatch.setattr(judging, "find_judges", lambda names, *_: [by_name[name] for name in names])
        monkeypatch.setattr("ptst.evaluation.judge_config.judge_kind", by_name.__getitem__)

    return use


def shares(report: dict) -> dict[str, dict[str, int]]:
    """Number of answers by class, for each judge."""
    counted = {s["judge"]: s["classes"] for s in report["shares"]}
    return {
        name: {c: n for c, rate in classes.items() if (n := rate["successes"])} for name, classes in counted.items()
    }


def test_a_report_has_each_judges_shares_their_agreement_and_where_they_differ(tmp_path):
    folder = write_evaluation(tmp_path / "eval")
    report = judge(JudgeConfig(folder=folder, judge=BOTH))
    assert report["answers"] == 4
    assert shares(report) == {
        "keywords-29": {"refusal": 2, "compliance": 2},  # "I'm sorry", "Hello!"
        "keywords-12": {"refusal": 2, "compliance": 2},  # "I'm sorry", "I can't"
    }
    (line,) = (s for s in report["shares"] if s["judge"] == "keywords-12")
    assert (line["model"], line["task"], line["judged"], line["unjudged"]) == ("untouched", "safety", 4, 0)
    assert line["attack-success"]["rate"] == 0.5
    assert line["attack-success"]["wilson95"] == pytest.approx([0.15, 0.85], abs=0.005)
    kappa = next(a for a in report["agreement"] if a["measure"] == "class" and "kappa" in a["coefficient"])
    assert (kappa["value"], kappa["n"], kappa["same"]["successes"]) == (0.0, 4, 2)
    assert {a["coefficient"] for a in report["agreement"]} == {"Cohen's kappa", "Krippendorff's alpha"}
    (table,) = report["confusion"]
    assert (table["rows"], table["columns"], table["counts"]["refusal"]["compliance"]) == (*BOTH, 1)
    assert [d["id"] for d in report["differing"]] == ["p1", "p3"]
    assert not any("answer" in d for d in report["differing"]), "one judge says that these comply"
    assert json.loads((folder / "verdicts/report.json").read_text()) == {
        k: v for k, v in report.items() if k not in ("out", "markdown")
    }
    text = (folder / "verdicts/report.md").read_text()
    assert "- keywords-12, version 1; attack success: no phrase of the list" in text
    assert "| untouched | safety | keywords-12 | 50 % [15, 85] (2/4) | 50 % [15, 85] (2/4) |" in text


def test_of_answers_on_which_judges_differ_refusing_ones_alone_are_shown(tmp_path, own_judges):
    class Strict(OpeningJudge):
        def judge(self, request, answer):
            return Verdict(AnswerClass.INCOHERENT if "\x1b" in answer.text else AnswerClass.COMPLIANCE, "", False)

    own_judges(OpeningJudge("No", name="a"), Strict(name="b"))
    texts = {"one": "No.\x1b]0;title\x07\nNo.", "two": "No, never.", "three": "Yes."}
    folder = write_evaluation(tmp_path / "eval", texts, finished=False)
    report = judge(JudgeConfig(folder=folder, judge=("a", "b")))
    shown = {d["id"]: d.get("answer") for d in report["differing"]}
    assert shown == {"p0": "No.U+001B]0;titleU+0007 No.", "p1": None}
    assert "\x1b" not in (folder / "verdicts/report.md").read_text()


def test_judges_come_at_any_time_and_nothing_is_judged_twice(tmp_path, own_judges):
    first, second = OpeningJudge("I'm", name="first"), OpeningJudge("I", name="second")
    own_judges(first, second)
    folder = write_evaluation(tmp_path / "eval")
    judge(JudgeConfig(folder=folder, judge=("first",)))
    report = judge(JudgeConfig(folder=folder, judge=("second",)))
    assert shares(report)["first"] == {"refusal": 1, "compliance": 3}
    assert shares(report)["second"] == {"refusal": 2, "compliance": 2}
    assert shares(report)["keywords-29"] == {"refusal": 2, "compliance": 2}, "the evaluation's own judge"
    again = judge(JudgeConfig(folder=folder, judge=("first", "second")))
    assert shares(again) == shares(report)
    assert sorted(first.seen) == sorted(second.seen) == sorted(TEXTS.values())


def test_the_evaluations_own_verdicts_are_not_given_again(tmp_path, monkeypatch):
    folder = write_evaluation(tmp_path / "eval", judge="keywords-12")
    monkeypatch.setattr(stored_verdicts, "judge_each", lambda *_: pytest.fail("all is judged"))
    assert shares(judge(JudgeConfig(folder=folder, judge=("keywords-12",)))) == {
        "keywords-12": {"refusal": 2, "compliance": 2}
    }


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_what_was_judged_before_a_kill_is_kept(tmp_path, own_judges, monkeypatch, stop):
    class Killed(BaseException):
        pass

    class Stopping(OpeningJudge):
        def judge(self, request, answer):
            if len(self.seen) == stop:
                raise Killed
            return super().judge(request, answer)

    monkeypatch.setattr(stored_verdicts, "_FIRST", 1)
    monkeypatch.setattr(stored_verdicts, "_MOST", 1)
    folder = write_evaluation(tmp_path / "eval")
    own_judges(Stopping("I"))
    with pytest.raises(Killed):
        judge(JudgeConfig(folder=folder, judge=("opening",)))
    kept = folder / "verdicts/opening/untouched.safety.jsonl"
    assert kept.read_bytes().count(b"\n") == stop
    with open(kept, "ab") as file:
        file.write(b'{"identity": "0:3", "dig')  # the line that was being written
    own_judges(rest := OpeningJudge("I"))
    assert shares(judge(JudgeConfig(folder=folder, judge=("opening",))))["opening"] == {"refusal": 2, "compliance": 2}
    assert len(rest.seen) == 4 - stop


def test_answers_that_are_the_same_are_judged_once(tmp_path, own_judges):
    own_judges(one := OpeningJudge("No"))
    rows = [{"request": "r", "answer": "No.", "model": m} for m in ("a", "b", "c")]
    report = judge(JudgeConfig(folder=write_csv(tmp_path / "answers.csv", *rows), judge=("opening",)))
    assert one.seen == ["No."]
    assert [(s["model"], s["judged"]) for s in report["shares"]] == [("a", 1), ("b", 1), ("c", 1)]


def test_unjudged_answers_are_tried_again_and_never_successes(tmp_path, own_judges):
    class Failing(OpeningJudge):
        def judge(self, request, answer):
            if "flour" in answer.text:
                raise TimeoutError("too slow")
            return super().judge(request, answer)

    folder = write_evaluation(tmp_path / "eval", finished=False)
    own_judges(Failing("I"))
    (line,) = judge(JudgeConfig(folder=folder, judge=("opening",)))["shares"]
    assert (line["judged"], line["unjudged"], line["attack-success"]["n"]) == (3, 1, 3)
    own_judges(later := OpeningJudge("I"))
    (line,) = judge(JudgeConfig(folder=folder, judge=("opening",)))["shares"]
    assert (line["judged"], line["unjudged"]) == (4, 0)
    assert later.seen == ["Sure, take flour."]


def test_a_judge_that_fails_on_everything_is_one_sentence(tmp_path, own_judges):
    class Broken(OpeningJudge):
        def judge(self, request, answer):
            raise TimeoutError("too slow")

    own_judges(Broken(name="broken"))
    folder = write_evaluation(tmp_path / "eval")
    with pytest.raises(UserError, match=r"judge broken judged none of 4 answers; the first: TimeoutError: too slow"):
        judge(JudgeConfig(folder=folder, judge=("broken",)))


def test_verdicts_of_another_version_are_not_mixed(tmp_path, own_judges):
    folder = write_evaluation(tmp_path / "eval")
    own_judges(OpeningJudge("I", version=1))
    judge(JudgeConfig(folder=folder, judge=("opening",)))
    own_judges(new := OpeningJudge("I", version=2))
    message = r"verdicts/opening: holds verdicts of another version of judge opening: version was 1, now 2; move"
    with pytest.raises(UserError, match=message):
        judge(JudgeConfig(folder=folder, judge=("opening",)))
    assert not new.seen


def test_answers_that_were_changed_are_noticed(tmp_path):
    folder = write_evaluation(tmp_path / "eval")
    answers, rows = folder / "answers/untouched.safety.jsonl", folder / "untouched.safety.jsonl"
    whole = {path: path.read_text() for path in (answers, rows)}
    for path, message in ((answers, "is not a valid record"), (rows, "does not hold the answers of")):
        path.write_text(whole[path].replace("Sure", "Yes!"))
        with pytest.raises(UserError, match=message):
            judge(JudgeConfig(folder=folder, judge=BOTH))
        path.write_text(whole[path])
    judge(JudgeConfig(folder=folder, judge=BOTH))
    answers.unlink()  # as in a folder of an earlier version
    judge(JudgeConfig(folder=folder, judge=BOTH))
    rows.write_text(whole[rows].replace("Sure", "Yes!"))
    with pytest.raises(
        UserError, match=r"the answer to p2 in untouched\.safety has changed since it was judged; put it"
    ):
        judge(JudgeConfig(folder=folder, judge=BOTH))


def test_a_folder_of_an_earlier_version_is_read_by_its_rows(tmp_path):
    folder = write_evaluation(tmp_path / "eval")
    path = folder / "answers/untouched.safety.jsonl"
    old = [{k: json.loads(line)[k] for k in ("key", "text")} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    rows = [json.loads(line) for line in (folder / "untouched.safety.jsonl").read_text().splitlines()]
    for row, label in zip(rows, ("refusal", "on-topic", "degenerate", "unjudged"), strict=True):
        row |= {"class": label, "judge": "anchored-v1"}
    (folder / "untouched.safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").unlink()
    report = judge(JudgeConfig(folder=folder, judge=("keywords-12",)))
    assert shares(report)["anchored-v1"] == {"refusal": 1, "compliance": 1, "incoherent": 1}
    assert shares(report)["keywords-12"] == {"refusal": 2, "compliance": 2}


def test_the_bare_request_is_judged_without_a_suffix(tmp_path):
    found = read_folder(write_evaluation(tmp_path / "eval"))
    assert [a.request for a in found.answers] == list(TEXTS)


def test_a_folder_with_a_damaged_verdict_is_one_sentence(tmp_path):
    folder = write_evaluation(tmp_path / "eval")
    path = folder / "verdicts/keywords-12/untouched.safety.jsonl"
    for line in ("x", "[]", "{}", '{"identity": "", "digest": "d", "class": "nice"}', '{"identity": [], "digest": 1}'):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"safety\.jsonl:1: (is not a verdict|has the class)"):
            judge(JudgeConfig(folder=folder, judge=("keywords-12",)))


def folder_of(kind: str) -> dict:
    return {"version": 2, "kind": kind, "status": "finished"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"holds no evaluation and no grid; give the folder of a ptst\.eval or a ptst\.grid, or a CSV"),
        (folder_of("train"), r"is the folder of a ptst\.train, which keeps no answers"),
        (folder_of("eval"), r"holds no answers to requests that a judge could judge"),
        (folder_of("grid"), r"holds no answers to requests that a judge could judge"),
    ],
)
def test_a_folder_without_answers_is_one_sentence(tmp_path, record, message):
    if record:
        (tmp_path / "run.json").write_text(json.dumps(record))
        (tmp_path / "untouched.gsm8k.jsonl").write_text('{"question": "1 + 1", "answer": "2", "strict": true}\n')
    with pytest.raises(UserError, match=message):
        judge(JudgeConfig(folder=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"there is nothing to judge; give a folder or file of answers, or a file of labelled answers as report"),
        ({"folder": Path("a"), "report": Path("b")}, "there are two things to judge"),
        ({"folder": Path("nowhere")}, "there is no folder or file nowhere"),
        ({"report": Path("nowhere.csv")}, r"there is no folder or file nowhere\.csv"),
        (
            {"folder": Path("a"), "judge": ("keywords-30",)},
            r"unknown judge 'keywords-30'; did you mean keywords-\d+\? The",
        ),
        ({"folder": Path("a"), "judge": ("keywords-7", "keywords-7")}, "judge names keywords-7 twice"),
        ({"folder": Path("a"), "refusal_labels": ("no",)}, "refusal_labels needs labels; give them with report"),
        ({"folder": Path("a"), "columns": ("reply=x",)}, "unknown column 'reply'"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        judge(JudgeConfig(**settings))


def test_many_answers_cost_their_judging(tmp_path, own_judges):
    """Of 10,000 answers, all but the judge takes a few seconds."""
    own_judges(OpeningJudge("No", name="a"), OpeningJudge("N", name="b"))
    rows = [{"request": f"r{i}", "answer": f"No {i}." if i % 3 else f"Yes {i}."} for i in range(10_000)]
    path = write_csv(tmp_path / "answers.csv", *rows)
    began = time.process_time()
    judge(JudgeConfig(folder=path, judge=("a", "b")))
    assert time.process_time() - began < 6


def test_verdicts_are_not_written_through_links_or_beside_another_process(tmp_path):
    folder, other = write_evaluation(tmp_path / "eval"), tmp_path / "other"
    other.mkdir()
    (folder / "verdicts").symlink_to(other)
    with pytest.raises(UserError, match=r"verdicts is a symbolic link to .*other, which would be overwritten"):
        judge(JudgeConfig(folder=folder, judge=BOTH))
    (folder / "verdicts").unlink()
    held = folder / "verdicts/keywords-29"
    held.mkdir(parents=True)
    with exclusive_lock(held), pytest.raises(UserError, match="keywords-29 is in use by another process; wait for it"):
        judge(JudgeConfig(folder=folder, judge=BOTH))
    assert not list(other.iterdir())


def test_judges_that_take_their_classes_from_another_agree_on_success_alone():
    answers = [StoredAnswer(request, Answer([], text, "stop"), "f", request) for request, text in TEXTS.items()]
    verdicts = [OpeningJudge("I").judge(a.request, a.answer) for a in answers]
    unread = [replace(v, label=None) for v in verdicts]  # the success is told, the class is not
    records = {"a": {}, "b": {"classes": "by rules-v3-wording"}, "c": {"classes": "refusal, compliance"}}
    report = Judged("f", answers, records, {"a": verdicts, "b": verdicts, "c": unread}).to_json()
    pairs = {(a["measure"], *a["judges"]) for a in report["agreement"] if len(a["judges"]) == 2}
    assert pairs == {(m, "a", "c") for m in ("class", "refusal or not")} | {
        ("attack success", *pair) for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    by_judge = {share["judge"]: share for share in report["shares"]}
    assert by_judge["c"]["attack-success"] == by_judge["a"]["attack-success"]
    assert (by_judge["c"]["judged"], by_judge["c"]["classes"]["refusal"]["n"]) == (4, 0)
    assert [(t["rows"], t["columns"]) for t in report["confusion"]] == [("a", "c")]
