"""ARC's two layouts, and rows of neither."""

from __future__ import annotations

import json

import pytest

from ptst.data.arc import ArcQuestion, load_arc, to_question
from ptst.evaluation.choices import chosen_choice, plain, printed_choice

HUB_ROW = {"id": "x", "question": "Which is hot?", "answerKey": "2"}
HUB_ROW["choices"] = {"text": ["ice", "the sun", "snow"], "label": ["1", "2", "3"]}
TEXT = (
    "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: ice Answer2: the sun Answer3: snow\n\n"
    "Answer format: answer1/answer2/answer3"
)
INSTRUCTION_ROW = {"instruction": TEXT, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
QUESTION = ArcQuestion("Which is hot?", ("ice", "the sun", "snow"), 1, "d:1")


@pytest.mark.parametrize("row", [HUB_ROW, INSTRUCTION_ROW])
def test_layouts(row, tmp_path):
    assert to_question(row, "d:1") == QUESTION
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 3))
    found = load_arc("arc-easy", str(path), limit=2)
    assert [q.source for q in found] == [f"{path}:1", f"{path}:2"]
    assert found[0].choices == QUESTION.choices


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
        to_question(row, "d:7")


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
