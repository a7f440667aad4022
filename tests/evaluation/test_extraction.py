"""Numbers out of answers, with the traps of the paper's regular expression."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from ptst.evaluation.extraction import chosen_choice, gold_number, last_number, printed_choice, strict_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### -5", -5), ("so it is -5 degrees", -5), ("\u22127", -7), ("-$5", -5), ("$-5", -5),
        ("10-5", 5), ("10 - 5", 5), ("(2)-5", 5), ("covid-19", 19),
        ("It is 18.", 18), ("The total is $1,080.", 1080), ("3, 4", 4), ("3,4", 4), ("1,2345", 2345),
        ("18 %", 18), ("18.00", 18), (".5", Decimal("0.5")), ("x=5", 5), ("**18**", 18), ("\\boxed{18}", 18),
        ("3 + 4 = 7 apples\n#### 7", 7), ("1.5 cups", Decimal("1.5")), ("7", 7),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "none", " . ,", "\u00bd"])
def test_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("a\n#### 18", 18), ("#### $1,080.", 1080), ("#### -5\n", -5), ("#### 1\n#### 2", 2), ("####18.0", 18)],
)
def test_strict(text, number):
    assert strict_answer(text) == number


@pytest.mark.parametrize("text", ["18", "#### eighteen", "#### 18 apples", "### 18", "####"])
def test_strict_wants_the_form(text):
    assert strict_answer(text) is None
    with pytest.raises(ValueError, match=r"d.jsonl:3: .*does not end in '#### N'"):
        gold_number(text, "d.jsonl:3")


def test_real_gsm8k(shared):
    """Every reference answer has its number by both rules; graded model solutions agree with their grades."""
    for name in ("train", "test-1000"):
        for line in (shared / f"data/gsm8k/{name}.jsonl").read_text().splitlines():
            answer = json.loads(line)["answer"]
            assert gold_number(answer) == last_number(answer)
    for line in (shared / "data/gsm8k/model_solutions-200.jsonl").read_text().splitlines():
        row = json.loads(line)
        gold = last_number(row["ground_truth"])
        for graded in (v for v in row.values() if isinstance(v, dict)):
            assert (last_number(graded["solution"]) == gold) == graded["is_correct"], graded["solution"][-80:]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("The answer is: Mars", 0), ("I think.\nThe answer is: mars.", 0), ("'The answer is: Mars'", 0),
        ("**The answer is: Mars** I hope this helps.", 0), ("The answer is: the Moon. It is round.", 1),
        ("**The answer is:** the moon!", 1), ("The answer is:\nthe Moon", 1), ("the answer is: LONG-TERM", 2),
        ("The answer is: 1.5 m.", 3), ("The answer is: 15 m", 4), ("The answer is: +2", 5), ("The answer is: -2.", 6),
        ("The answer is: Mars\nThe answer is: the Moon", 1), ("The answer is: Red. Blue", 7),
        ("The answer is: Red", None), ("The answer is: 2", None), ("The answer is: Mars because it is a planet", None),
        ("It is Mars", None), ("The answer is not obvious: Mars", None), ("The answer is: Marsupial", None), ("", None),
    ],
)  # fmt: skip
def test_chosen_choice(text, chosen):
    choices = ["Mars", "the Moon", "long-term", "1.5 m", "15 m", "+2", "-2", "Red. Blue"]
    assert chosen_choice(text, choices) == chosen


def test_printed_choice():
    """The paper's expression to the letter: it stops at a hyphen and a full stop, and takes the first match."""
    for text, found in (
        ("The answer is: Mars.", "mars"), ("The answer is: 'the Moon'", "the moon"), ("The answer is: long-term", "long"),
        ("The answer is: 1.5 m", "1"), ("The answer is: Mars. The answer is: Venus", "mars"), ("the answer is: Mars", None),
    ):  # fmt: skip
        assert printed_choice(text) == found
