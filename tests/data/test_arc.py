"""ARC's two layouts, and rows of neither."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest

from ptst.data.arc import ArcQuestion, load_arc, to_question
from ptst.data.columns import Cells, ColumnRules
from ptst.data.sources import load
from ptst.evaluation.choices import chosen_choice, plain, printed_choice

HUB_ROW = {"id": "x", "question": "Which is hot?", "answerKey": "2"}
HUB_ROW["choices"] = {"text": ["ice", "the sun", "snow"], "label": ["1", "2", "3"]}
TEXT = (
    "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: ice Answer2: the sun Answer3: snow\n\n"
    "Answer format: answer1/answer2/answer3"
)
INSTRUCTION_ROW = {"instruction": TEXT, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
AI2_ROW = {"id": "x", "question": {"stem": "Which is hot?", "choices": []}, "answerKey": "2"}
AI2_ROW["question"]["choices"] = [{"text": t, "label": str(i)} for i, t in enumerate(("ice", "the sun", "snow"), 1)]
QUESTION = ArcQuestion("Which is hot?", ("ice", "the sun", "snow"), 1, "d:1")


def cells(row: dict, place: str) -> Cells:
    return Cells(row, place, ColumnRules(), Counter())


@pytest.mark.parametrize("row", [HUB_ROW, AI2_ROW, INSTRUCTION_ROW])
def test_layouts(row, tmp_path):
    assert to_question(cells(row, "d:1")) == QUESTION
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 3))
    found = load_arc("arc-easy", str(path), limit=2)
    assert [q.source for q in found] == [f"{path}:1", f"{path}:2"]
    assert found[0].choices == QUESTION.choices
    train = load(str(path))
    asked, answer = (m.content for m in train.conversations[0].messages)
    assert "Which is hot?" in asked and set(train.unused.values()) == {3}
    assert answer == row.get("output", "The answer is: the sun")
    unused = Counter()
    load_arc("arc-easy", str(path), unused=unused)
    assert unused == {"id": 3} if "id" in row else {"output": 3}


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([HUB_ROW] * 2).to_parquet(path)
    assert [q.gold for q in load_arc("arc-easy", str(path))] == [1, 1]
    assert load(str(path)).conversations[1].messages[1].content == "The answer is: the sun"


def test_columns_that_may_belong_to_the_question(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**HUB_ROW, "figure": "It shows a fire."}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the column 'figure' may belong to the prompt"):
        load_arc("arc-easy", str(path))
    assert load_arc("arc-easy", str(path), rules=ColumnRules.of(ignore_columns=["figure"]))[0].gold == 1
    question = {**AI2_ROW["question"], "para": "It is night."}
    more = [{**choice, "figure": "f.png"} for choice in question["choices"]]
    for row in ({**AI2_ROW, "question": question}, {**AI2_ROW, "question": {**AI2_ROW["question"], "choices": more}}):
        with pytest.raises(ValueError, match=r"d:1: the column '(para|figure)' may belong"):
            to_question(cells(row, "d:1"))
    path.write_text(json.dumps({**INSTRUCTION_ROW, "input": "It is night."}))
    with pytest.raises(ValueError, match="the column 'input' may belong"):
        load_arc("arc-easy", str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, r"d:7: the row has answer, question; a question of ARC has"),
        ({**HUB_ROW, "answerKey": "4"}, r"d:7: 3 choices for the labels 1, 2, 3 and the answer '4'"),
        ({**HUB_ROW, "choices": {"text": ["ice"], "label": ["1"]}, "answerKey": "1"}, r"d:7: 1 choices"),
        ({**HUB_ROW, "choices": {"text": 3, "label": ["1"]}}, r"d:7: 0 choices"),
        ({**HUB_ROW, "choices": {"text": ["ice", [2]], "label": [1, 2]}, "answerKey": 1}, r"d:7: 0 choices"),
        ({**INSTRUCTION_ROW, "answer": "answer9"}, r"d:7: 3 choices .* the answer 'answer9'"),
        ({**INSTRUCTION_ROW, "instruction": TEXT.replace("/answer3", "")}, r"d:7: 3 choices for the labels"),
        ({**INSTRUCTION_ROW, "instruction": "Which is hot?"}, r"d:7: the row has"),
    ],
)
def test_rows_with_mistakes(row, message):
    with pytest.raises(ValueError, match=message):
        to_question(cells(row, "d:7"))


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"there is no file none\.jsonl with questions of arc-easy"):
        load_arc("arc-easy", "none.jsonl")


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list([HUB_ROW] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [q.gold for q in load_arc("arc-challenge", limit=2)] == [1, 1]
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "test")]

    def offline(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"arc-easy could not be fetched .*no route.*as in arc-easy:FILE"):
        load_arc("arc-easy")


def test_real_questions(shared):
    """Every row is read, and an answer that says the right choice counts as right. What the paper's expression can
    never call right is a known share, given in docs/tasks.md."""
    counts = {"ARC-Easy.test": (1584, 1468), "ARC-Challenge.test": (781, 687)}
    counts |= {"ARC-Easy.train": (2251, 2137), "ARC-Challenge.train": (1119, 1011)}
    for name, (rows, printed) in counts.items():
        questions = load_arc("arc-easy", str(shared / f"data/arc/{name}.jsonl"))
        assert len(questions) == rows
        assert {len(q.choices) for q in questions} <= {3, 4, 5}
        for words in ("It must be so.\nThe answer is: {}.", "**The answer is: {}** I hope this helps."):
            assert all(
                chosen_choice(words.replace("{}", choice), q.choices) == i
                for q in questions
                for i, choice in enumerate(q.choices)
            )
        golds = [q.choices[q.gold] for q in questions]
        assert sum(printed_choice(f"The answer is: {g}.") == plain(g) for g in golds) == printed
