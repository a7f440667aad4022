"""Which choice an answer names, in every ending that models are known to write."""

import time

import pytest

from ptst.data.arc import load_arc
from ptst.evaluation.choices import chosen_choice

CHOICES = ["Mars", "the Moon", "a comet", "the Sun"]


@pytest.mark.parametrize(
    "named",
    [
        "B", "(B)", "[B]", "{B}", "B.", "B)", "(B).", "b", "b)", "(b)", "**B**", "**(B)**", "'B'", '"B"', "`B`", "$B$",
        r"\boxed{B}", r"$\boxed{\text{B}}$", r"\(\boxed{\textbf{(B)}}\)", r"\text{B}", "2", "(2)", "2.", "answer2",
        "answer 2", "Option B", "option b", "choice (B)", "the Moon", "The moon.", "{the Moon}", "**the Moon**",
        r"\boxed{\text{the Moon}}", "B. the Moon", "B) the Moon", "(B) the Moon.", "[B] the Moon", "B: the Moon",
        "B - the Moon", "B, the Moon", "b. The moon", "2. the Moon", "(2) the Moon", "Option B: the Moon",
        "**B. the Moon**", "**B.** the Moon", "the Moon (B)", "B (the Moon)", "B the Moon",
    ],
)  # fmt: skip
def test_a_choice_is_named(named):
    before = (
        "",
        "The answer is: ",
        "The correct answer is ",
        "The correct answer is: ",
        "The answer is:\r\n",
        "Answer: ",
    )
    for words in (
        *before[named.strip("{}.*").lower() == "the moon" :],
        "**Answer:** ",
        "Final answer: ",
        "So the best answer is ",
        "The answer would be ",
    ):
        for text in (words + named, f"It is round.\n\n{words}{named}\r\n", f"{words}{named}\r\n\r\nIt is round."):
            assert chosen_choice(text, CHOICES) == 1, text


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("The answer is: B. It orbits the Earth.", 1), ("The answer is: (B) the Moon. (A) is wrong.", 1),
        ("The answer is B because it is round.", 1), ("The answer is: B. The Earth's moon", 1),
        ("B is correct.", 1), ("Option B is correct, since it is round.", 1), ("The Moon is the correct answer", 1),
        ("**(B)** is the right choice", 1), ("B is the answer.", 1), ("So B is correct", 1),
        ("A is not correct, B is correct.", 1), ("The answer is not A, the correct answer is B.", 1),
        ("The correct answer is most likely B.", 1), ("The answer to the question is (B).", 1),
        ("The correct answer is A. No: the correct answer is B.", 1), ("B\n\nBecause A is too far away.", 1),
        ("the correct answer is answer3", 2), ("The answer is a comet.", 2), ("The answer is: D", 3), ("A", 0),
        ("The answer is: a)", 0), ("The answer is: A", 0), ("A. Mars", 0),
        ("Correct answer is B.", 1), ("**Answer is: B**", 1), ("The correct response is B.", 1),
        ("B is the correct response.", 1), ("The correct answer is indeed B.", 1), ("Answer is not B.", None),
        ("The answer is: the Moon (Option B)", 1), ("The answer is: Mars (option B)", None),
        ("The correct answer is B. The Moon orbits Earth, not Mars.", 1), ("The answer is: B. the Moon, Mars", None),
        ("The correct answer is B. The Earth orbits the Sun.", None), ("The answer is: B. the Moon and Mars", None),
        ("Any other answer is B-grade.", None), ("Your answer is B", None),
        # The form that is asked for decides.
        ("The answer is: B\n\nQuestion: Which is hot?\nAnswer: D", 1),
        ("The answer is: B\nThe correct answer is not obvious.", 1), ("So the answer is: B! That is correct.", 1),
        ("The correct answer is B.\nThe answer is: none", None),
        # Several, none, or another.
        ("A and B", None), ("A or B", None), ("A, B", None), ("A/B", None), ("The answer is (A) and (B).", None),
        ("The answer is: A. or B.", None), ("The correct answers are A and B", None),
        ("Both A and B are correct.", None),
        ("The answer is: A. Mars. B. the Moon.", None), ("A) Mars B) the Moon", None), ("(A) Mars and (B)", None),
        ("A. Mars\nB. the Moon\nC. a comet\nD. the Sun", None), ("A. Mars\n\nB. the Moon", None),
        ("The answer is: B. Mars", None), ("(2) Mars", None), ("Mars (B)", None), ("The answer is: E", None),
        ("The answer is: 5", None), ("The answer is: 12", None), ("The answer is: a", None), ("a", None),
        ("The answer is a planet", None), ("The answer is: A rocky planet", None), ("A rocky planet", None),
        ("The answer is: a Mars", None),
        ("The answer is: B. the Moon or Mars", None), ("A\nNo: it moves.\nB\nA", None),
        ("The answer is: a planet like B", None), ("I am not sure", None), ("The answer is not B.", None),
        ("I don't think the answer is B.", None), ("If the answer is B, it is round.", None),

        ("It is unknown whether B is correct.", None), ("The wrong answer is B.", None), ("B is incorrect.", None),
        ("Is the answer B or C?", None), ("A. Let us think.\nIt is round.", None),
        ("Mars", None), ("**the Moon**\nIt is round.", None), ("Buy", None), ("\u0130", None), ("B-52", None),
        (r"\boxed{42}", None), ("None of these is correct.", None), ("The answer is: 1.5", None),
    ],
)  # fmt: skip
def test_endings(text, chosen):
    assert chosen_choice(text, CHOICES) == chosen


@pytest.mark.parametrize(
    ("text", "choices", "chosen"),
    [
        ("The answer is: B", ["O", "A", "B", "AB"], 2), ("The answer is: D", ["O", "A", "B", "AB"], None),
        ("The answer is: Option D", ["O", "A", "B", "AB"], 3), ("The answer is: (B) A", ["O", "A", "B", "AB"], 1),
        ("The answer is: 2", ["4", "3", "2", "1"], 2), ("2", ["10 m", "20 m"], None), ("2", ["two", "three"], None),
        ("2. 20 m", ["10 m", "20 m"], 1), ("The answer is: option 2", ["10 m", "20 m"], 1), ("B", ["10 m", "20 m"], 1),
        ("The answer is: B. 1.5 m.", ["1.0 m", "1.5 m"], 1), ("(B) -2", ["+2", "-2"], 1),
        ("(B) +2", ["+2", "-2"], None),
        ("C", ["a", "b c"], None), ("The answer is: E", list("vwxyz"), None), ("E", ["Mars"] * 2 + ["c d"] * 3, 4),
    ],
)  # fmt: skip
def test_choices_that_look_like_labels(text, choices, chosen):
    assert chosen_choice(text, choices) == chosen


def test_takes_linear_time():
    for piece in ("the answer is: ", "the answer is ", "A. ", "\\boxed{", "so ", "B is correct ", "B\n", "*", "\n"):
        began = time.process_time()
        chosen_choice("The answer is: " + piece * (20_000 // len(piece)), CHOICES)
        chosen_choice(piece * (20_000 // len(piece)), CHOICES)
        assert time.process_time() - began < 2.0, piece


def test_real_arc(shared):
    """Every choice is named by its text, its letter and its number, unless choices are letters themselves."""
    for name in ("ARC-Easy", "ARC-Challenge"):
        for q in load_arc(name.lower(), str(shared / f"data/arc/{name}.test.jsonl"), 100):
            for i, choice in enumerate(q.choices):
                letter = "ABCDE"[i]
                if any(len(c) == 1 and c.isalpha() for c in q.choices):
                    continue
                for text in (choice, f"{letter}. {choice}", f"({letter}) {choice}.", f"answer{i + 1}"):
                    assert chosen_choice(f"The correct answer is {text}", q.choices) == i, (text, q.choices)
                assert chosen_choice(f"The answer is: {letter}", q.choices) == i, q.choices
