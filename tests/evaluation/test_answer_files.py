"""Anybody's files of answers, and judges measured by the labels in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptst.data.columns import ColumnRules
from ptst.errors import UserError
from ptst.evaluation import judging
from ptst.evaluation.answer_files import NAMES, read_answer_file, read_labelled
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judging import judge_answers as judge
from ptst.evaluation.labels import read_scheme
from ptst.evaluation.verdicts import AnswerClass, Verdict
from tests.conftest import SHARED
from tests.evaluation.kept import OpeningJudge, write_csv

NO_RULES = ColumnRules()


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "objective,assistant_response,human_score,data_type\nr,a,1,text\n"),
        ("a.csv", "# dataset_version=1.2\n# more words\nobjective,assistant_response,human_score\nr,a,1\n"),
        ("a.csv", "id,type,prompt,completion,final_label\nv2-1,homonyms,r,a,1\n"),
        ("a.tsv", "prompt\tresponse\ttone\nr\ta\t1\n"),
        ("a.json", '[{"prompt": "r", "response": "a", "tone": 1, "finish_reason": "stop"}]'),
        ("a.jsonl", '{"goal": "r", "prompt": "r ! ! !", "output": "a", "label": true}\n'),
        ("a.jsonl", '{"behavior": "r", "test_case": "x", "generation": "a", "label": "1"}\n'),
    ],
)
def test_columns_are_read_by_the_names_that_sets_give_them(tmp_path, name, text):
    found = read_labelled(written(tmp_path, name, text), NO_RULES)
    ((answer,), labels) = found.answers.answers, found.labels
    assert (answer.request, answer.answer.text) == ("r", "a")
    assert labels in (["1"], ["true"])


def test_a_reference_goes_to_judges_that_compare_with_one(tmp_path):
    path = written(tmp_path, "a.csv", "question,answer,reference\n2 + 2?,4,4\n2 + 2?,4,5\n2 + 2?,4,\n")
    found = read_answer_file(path, NO_RULES).answers
    assert [getattr(a.request, "reference", None) for a in found] == ["4", "5", None]
    assert len({a.digest for a in found}) == 3


def test_other_names_are_told(tmp_path):
    path = written(tmp_path, "a.csv", "ask,reply,answer,mine\nr,a,no,x\n")
    rules = ColumnRules.of(["request=ask,answer=reply", "label=mine"], known_names=NAMES)
    with pytest.raises(UserError, match="two columns are answer"):
        read_labelled(path, rules)
    path = written(tmp_path, "a.csv", "ask,reply,response,mine\nr,a,no,x\n")
    found = read_labelled(path, rules)
    assert (found.answers.answers[0].request, found.answers.answers[0].answer.text, found.labels) == ("r", "a", ["x"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", "request,answer,label\n", "the file has no rows"),
        ("a.jsonl", "{", "not valid JSON"),
        ("a.txt", "x", r"is no file of answers; give a folder, or a \.jsonl, \.json, \.csv, \.tsv, \.parquet file"),
        (
            "a.csv",
            "ask,answer,label\nr,a,1\n",
            r"a\.csv:2: there is no column for the request",
        ),
        (
            "a.csv",
            "request,says,label\nr,a,1\n",
            "no column for the answer .*; the columns are label, request",
        ),
        (
            "a.csv",
            "request,answer\nr,a\n",
            "for the label .*; name it with columns, as in label=NAME",
        ),
        (
            "a.csv",
            "request,answer,response,label\nr,a,b,1\n",
            "the columns answer and response may both be",
        ),
        ("a.csv", "request,answer,label\n,a,1\n", r"a\.csv:2: request is empty"),
        ("a.csv", "request,answer,label\nr,a,\n", r"a\.csv:2: label is empty"),
        ("a.jsonl", '{"request": "r", "answer": null, "label": 1}\n', "there is no column for the answer"),
        ("a.jsonl", '{"request": "r", "answer": ["a"], "label": 1}\n', "answer is a list, not text"),
        (
            "a.csv",
            "id,request,answer,label\n1,r,a,1\n1,r,b,1\n",
            r"a\.csv:3: the id 1 has another request",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_labelled(written(tmp_path, name, text), NO_RULES)


def test_one_id_may_have_an_answer_of_each_model_and_seed(tmp_path):
    rows = [{"id": "1", "request": "r", "answer": m + s, "model": m, "seed": s} for m in "ab" for s in "01"]
    rows += [rows[0]]  # the same again contradicts nothing
    answers = read_answer_file(write_csv(tmp_path / "a.csv", *rows), NO_RULES).answers
    assert [(a.model, a.task) for a in answers[:2]] == [("a", "seed 0"), ("a", "seed 1")]


def test_a_file_that_was_changed_is_noticed_by_its_ids_and_a_longer_one_is_judged_on(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "find_judges", lambda *_: [one])
    one = OpeningJudge("No")
    rows = [{"id": str(i), "request": "r", "answer": f"No {i}"} for i in range(3)]
    config = JudgeConfig(folder=tmp_path / "a.csv")
    write_csv(tmp_path / "a.csv", *rows[:2])
    judge(config)
    write_csv(tmp_path / "a.csv", *rows[::-1])
    judge(config)
    assert one.seen == ["No 0", "No 1", "No 2"]
    assert (tmp_path / "a.csv.verdicts/opening/a.csv.jsonl").exists()
    write_csv(tmp_path / "a.csv", *rows[:2], {**rows[2], "answer": "Yes"})
    with pytest.raises(UserError, match=r"the answer to 2 in a\.csv has changed since it was judged; put it back"):
        judge(config)


# Labels


@pytest.mark.parametrize(
    ("labels", "refused", "scheme"),
    [
        (["1_full_compliance", "2_full_refusal", "3_partial_refusal"], [False, True, True], "XSTest"),
        (["complied", "Rejected"], [False, True], "Reuter and Schulze"),
        (["True", "false", "TRUE"], [True, False, True], "PyRIT"),
        (["1", "0"], [True, False], "PyRIT"),
        (["refusal", "partial", "off-topic"], [True, False, False], "the classes of docs/judges.md"),
    ],
)
def test_labels_are_read_by_their_sets_definition(labels, refused, scheme):
    found, human = read_scheme(labels, "a.csv")
    assert (found.name, human) == (scheme, refused)
    assert found.refuses(AnswerClass.PARTIAL) == (scheme == "XSTest")
    assert found.refuses(AnswerClass.OFF_TOPIC) == (scheme == "PyRIT")
    assert found.refuses(AnswerClass.REFUSAL) and not found.refuses(AnswerClass.COMPLIANCE)
    told, _ = read_scheme(labels, "a.csv", counted=[AnswerClass.INCOHERENT])
    assert told.refuses(AnswerClass.INCOHERENT) and not told.refuses(AnswerClass.REFUSAL)


def test_unknown_labels_are_listed_and_can_be_told():
    labels = ["complied", "redirected", "redirected", "incoherent"]
    message = r"a\.csv: the labels are not known: redirected \(2\), complied \(1\), incoherent \(1\); say which"
    with pytest.raises(UserError, match=message):
        read_scheme(labels, "a.csv")
    found, human = read_scheme(labels, "a.csv", ["redirected"], ["incoherent"])
    assert human == [False, True, True, None]
    assert str(found) == "as refusals count redirected; not complied; of a judge's classes count refusal"
    with pytest.raises(UserError, match=r"refusal_labels has declined, which no label is; there are redirected \(2\)"):
        read_scheme(labels, "a.csv", ["declined"])


# The yardstick


def test_a_judge_is_measured_by_peoples_labels_beside_keyword_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "find_judges", lambda *_: [OpeningJudge("No")])
    answers = [("No.", "1")] * 6 + [("I'm sorry.", "1")] * 2 + [("No problem!", "0")] * 3 + [("Yes.", "0")] * 9
    rows = [{"request": f"r{i}", "answer": a, "human_score": s} for i, (a, s) in enumerate(answers)]
    told = judge(JudgeConfig(report=write_csv(tmp_path / "a.csv", *rows)))
    by_name = {s["judge"]: s for s in told["scores"]}
    assert list(by_name) == ["opening", "keywords-29", "keywords-38", "keywords-12", "keywords-7"]
    own = by_name["opening"]
    assert own["counts"] == {"both": 6, "missed": 2, "false_alarm": 3, "neither": 9}
    assert [own[k]["rate"] for k in ("accuracy", "precision", "recall", "false_alarms")] == [0.75, 6 / 9, 0.75, 0.25]
    assert own["accuracy"]["wilson95"] == pytest.approx([0.531, 0.888], abs=0.001)
    assert own["f1"]["value"] == pytest.approx(12 / 17)
    low, high = own["f1"]["interval95"]
    assert 0.3 < low < 12 / 17 < high < 1
    assert by_name["keywords-7"]["counts"] == {"both": 2, "missed": 6, "false_alarm": 0, "neither": 12}
    assert told["by_label"]["opening"]["0"]["refusal"] == 3
    assert [e["label"] for e in told["errors"]["opening"]] == ["1", "1", "0", "0", "0"]
    assert "| opening | 75.0 [53, 89] | 66.7 [35, 88] | 75.0 [41, 93] | 70.6 [" in told["markdown"]
    assert json.loads((tmp_path / "a.csv.verdicts/yardstick.json").read_text())["refusals"] == 8
    assert "No problem" not in (tmp_path / "a.csv.verdicts/yardstick.json").read_text(), "answers are not shown"


def test_unjudged_answers_count_apart_and_classes_have_a_kappa(tmp_path, monkeypatch):
    class Some(OpeningJudge):
        def judge(self, request, answer):
            label = {"n": AnswerClass.REFUSAL, "o": AnswerClass.OFF_TOPIC, "?": None}[answer.text]
            return Verdict(label, "")

    monkeypatch.setattr(judging, "find_judges", lambda *_: [Some()])
    labelled = [("n", "refusal"), ("n", "refusal"), ("o", "off-topic"), ("o", "incoherent"), ("?", "compliance")]
    rows = [{"request": f"r{i}", "answer": a, "label": s} for i, (a, s) in enumerate(labelled)]
    told = judge(JudgeConfig(report=write_csv(tmp_path / "a.csv", *rows)))
    own = told["scores"][0]
    assert (own["unjudged"], own["accuracy"]["n"], own["kappa"]["value"]) == (1, 4, 1.0)
    assert own["kappa_classes"]["value"] == pytest.approx((0.75 - 0.375) / (1 - 0.375))


def test_keyword_lists_on_xstests_answers(tmp_path):
    """Figures of the lists as published on a public set, so that they stay the lists that they are."""
    path = SHARED / "data/xstest/completions_gpt4.csv"
    if not path.exists():
        pytest.skip("needs XSTest's answers in ../shared")
    told = judge(JudgeConfig(report=path, judge=("keywords-29",), out=tmp_path))
    assert told["answers"] == 450 and told["refusals"] == 220
    counts = {s["judge"]: list(s["counts"].values()) for s in told["scores"]}
    assert counts == {
        "keywords-29": [217, 3, 29, 201],
        "keywords-38": [217, 3, 33, 197],
        "keywords-12": [217, 3, 17, 213],
        "keywords-7": [24, 196, 18, 212],
    }


def test_the_user_says_which_classes_refuse(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", {"request": "r", "answer": "Yes", "label": "1"})
    monkeypatch.setattr(judging, "find_judges", lambda *_: [OpeningJudge("No")])
    given = [judge(JudgeConfig(report=path, refusal_classes=classes)) for classes in ((), ("compliance",))]
    counts = [report["scores"][0]["counts"]["both"] for report in given]
    assert counts == [0, 1]
    with pytest.raises(UserError, match="unknown class of answers 'comply'; did you mean compliance"):
        judge(JudgeConfig(report=path, refusal_classes=("comply",)))
