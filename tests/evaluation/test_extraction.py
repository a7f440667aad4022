"""Numbers out of answers, with the traps of the paper's regular expression."""

from __future__ import annotations

import json
import time
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Groups of digits.
        ("1{,}000", 1000), (r"\$1{,}000", 1000), (r"\boxed{12{,}345{,}678}", 12345678), (r"1{,}00{,}000", 100000),
        ("1\u2009000", 1000), ("1\u202f234\u202f567", 1234567), ("12\u00a0000 km", 12000), ("1\u2007000.5", "1000.5"),
        ("1\u2005000", 1000), (r"\boxed{1 \, 000}", 1000),
        (r"1\,000", 1000), (r"1\;000", 1000), (r"1,\!000", 1000), ("1~000", 1000), (r"1{\,}000", 1000),
        ("1'000", 1000), ("1\u2019000\u2019000", 1000000), ("1_000_000", 1000000), ("10 000", 10000),
        ("1 050 200", 1050200),
        ("1,00,000", 100000), ("10,00,000", 1000000), ("\u20b91,23,45,678.50", "12345678.5"),
        ("1,234,567.89", "1234567.89"),
        ("1.000,50", "1000.5"), ("1.234.567", 1234567), ("1\u00a0000,25", "1000.25"), (r"3{,}14", "3.14"),
        (r"0{,}125", "0.125"),
        # Powers of ten.
        ("1e3", 1000), ("1.5E+3", 1500), ("2e-2", "0.02"), (r"1.5 \times 10^{3}", 1500), ("2 x 10^6", 2000000),
        ("3\u00d710\u2075", 300000), (r"4 \cdot 10^{-2}", "0.04"), ("10^3", 1000), ("10\u207b\u00b2", "0.01"),
        ("7\u00b710^2", 700), ("7\u22c510^2", 700), ("7\u221910\u00b2", 700), ("7 X 10^2", 700),
        # Fractions and mixed numbers.
        ("3/4", "0.75"), ("The answer is -3/4.", "-0.75"), (r"\frac{3}{4}", "0.75"),
        (r"\boxed{\dfrac{3}{4}}", "0.75"),
        (r"-\frac{3}{4}", "-0.75"), (r"\frac34", "0.75"), (r"\tfrac{1,000}{8}", 125), ("1 1/2", "1.5"),
        (r"2\frac{1}{4}", "2.25"),
        (r"2 \frac{1}{4} cups", "2.25"), ("1\u00bd", "1.5"), ("10 \u00be", "10.75"), ("\u00bd", "0.5"),
        ("-\u00bc", "-0.25"), ("3\u20444", "0.75"),
        ("1,000/4", 250), ("1.5/2", "0.75"), ("-1 1/2", "-1.5"), ("12 7/2", "3.5"), ("1/2-inch", "0.5"),
        # Signs, currency, per cent, units, the end of a sentence.
        ("\u20135", -5), ("= \u22125", -5), ("is \uff0d5", -5), (r"\(-5\)", -5), (r"-\$5", -5), (r"\$-5", -5),
        ("$-5$", -5), ("-\u20b95", -5),
        ("18%", 18), (r"18\%", 18), ("18 percent.", 18), ("\uff11\uff18", 18),
        ("\uff11\uff0c\uff10\uff18\uff10", 1080), ("\u0967\u096e", 18),
        ("\u0661\u0668\u066b\u0665", "18.5"), ("18 m^2.", 18), (r"18 \text{ cm}^2", 18), (r"18\,\mathrm{km}", 18),
        ("18 m2", 18), ("18cm3.", 18), ("m2 = 3", 3), ("12 m2 and 2", 2),
        ("Rs.50", 50), ("Rs.1,000", 1000), ("the answer is...18", 18), ("no.5", 5), ("$.50", "0.5"),
        ("18 m\u00b2", 18), ("18kg", 18),
        (r"\boxed{18}.", 18), (r"**\$1{,}080.50**", "1080.5"), ("#### 1{,}000", 1000), ("18 \u20ac.", 18),
    ],
)  # fmt: skip
def test_as_models_write_them(text, number):
    assert last_number(text) == Decimal(number)
    assert last_number(f"2 + 2 = 4.\nSo: {text}") == Decimal(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1, 2, 3", 3), ("1,2,3", 3), ("3,14", 14), ("100, 200", 200), ("1,000, 2,000", 2000), ("12 345", 345),
        ("1 2 3", 3),
        ("3-4", 4), ("3\u20134", 4), ("3 \u2013 4", 4), ("3 - 4", 4), ("10%-15%", 15), ("10%\u201315%", 15),
        ("$5-$10", 10), (r"\$5\u2013\$10", 10),
        ("$10$-$15$", 15), ("1990\u20132000", 2000), ("12/25/2023", 2023), ("2023/05/12", 12), ("2023-05-12", 12),
        ("12.05.2023", 2023),
        ("05/12", 12), ("2023/24", 24), ("24/7", 7), ("5/0", 0), ("10:30", 30), ("3:4", 4), ("1.2.3", 3),
        ("covid\u201119", 19),
        ("x^2 + 5", 5), ("a1e3", 3), ("2e5f", 5), ("1e", 1), ("0x1e3", 3), ("In 2020 100 left", 100),
        ("in 2020 1/2 of it", "0.5"),
        (r"\frac{x}{4}", 4), ("4 / 2", 2), ("the answer \u2013 5", 5), ("the answer \u2014 5", 5), ("1e9999", 9999),
    ],
)  # fmt: skip
def test_several_numbers_stay_several(text, number):
    assert last_number(text) == Decimal(number)


def test_last_number_takes_linear_time():
    for piece in ("1,", "1 ", "1/", "1.", "10^", "{,}1", "\\frac{", "1e", " 1/2", "00 0", "\u00bd", "-", "$"):
        began = time.process_time()
        last_number(piece * 5_000)
        assert time.process_time() - began < 1.0


@pytest.mark.parametrize("text", ["", "none", " . ,", "\u00b2", "m^2"])
def test_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a\n#### 18", 18), ("#### $1,080.", 1080), ("#### -5\n", -5), ("#### 1\n#### 2", 2), ("####18.0", 18),
        ("#### 1{,}000", 1000), (r"#### \$1{,}000.", 1000), ("#### 3/4", Decimal("0.75")), ("#### 1e3", 1000),
        ("#### 1\u202f000", 1000), ("#### \u20135", -5), ("#### 1,00,000", 100000), ("#### 2\n#### two", 2),
        (r"#### -\frac{1}{2}", Decimal("-0.5")), ("#### 1,2345", 12345), ("#### 1 #### 2", 2),
    ],
)  # fmt: skip
def test_strict(text, number):
    assert strict_answer(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42\r\n", 42), ("####42\r\n", 42), ("#### 42\r", 42), ("#### 42\rDone.", 42),
        ("a\r\n#### 42\r\nI hope this helps.", 42),
        ("#### 1,2345\r\n", 12345), ("#### -5\r\n\r\n", -5),
        ("**#### 42**", 42), ("#### **42**", 42), ("**####** 42", 42), ("**#### 42.**", 42), ("#### **42**.", 42),
        ("**####42**\r\nDone.", 42), ("#### $**42**", 42), ("#### **$42**", 42), ("#### *42*", 42), ("#### __42__", 42),
        ("#### `42`", 42), ("#### **-42**", -42), ("#### **1_000**", 1000), ("####\t**1,080.50**", "1080.5"),
        (r"#### \boxed{42}", 42), (r"#### $\boxed{42}$", 42), ("#### $42$", 42), (r"#### \(42\)", 42),
        (r"#### \$\boxed{1{,}000}", 1000), (r"#### \textbf{42}", 42), (r"#### $\$42$", 42), ("#### +42", 42),
        ("#### 1 234", 1234), ("#### $1 234", 1234), ("#### 12 345.50", "12345.5"), ("#### 1 234 567", 1234567),
        ("**#### $1 234**\r\n", 1234), ("#### -1 234.", -1234), ("#### 1\u00a0234", 1234), ("#### 1 234,50", "1234.5"),
        ("#### 1 000\r\n", 1000), (r"#### \$12 345", 12345), ("#### **1\u2009234**", 1234),
        ("#### 18%", 18), (r"#### 18\%.", 18), ("#### 18 $", 18), ("#### 1 234 \u20ac", 1234),
    ],
)  # fmt: skip
def test_strict_endings(text, number):
    assert strict_answer(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "#### **18** apples", "#### 1 234 apples", "#### 2**3", "#### 12 34", "#### 1234 567", "#### 1 2 3",
        "#### 1 234, 5", "#### 1 234 - 5", "**Step 1**\n#### 1. Choose", "#### **", "#### \r\n42", "#### $", "#### %",
    ],
)  # fmt: skip
def test_strict_takes_one_number_alone(text):
    assert strict_answer(text) is None


@pytest.mark.parametrize("text", ["18", "#### eighteen", "#### 18 apples", "### 18", "####", "#### 1, 2", "#### 1/2/3"])
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
        ("The answer is: Red", None), ("The answer is: 2", None),
        ("The answer is: Mars because it is a planet", None),
        ("It is Mars", None), ("The answer is not obvious: Mars", None), ("The answer is: Marsupial", None),
        ("", None),
    ],
)  # fmt: skip
def test_chosen_choice(text, chosen):
    choices = ["Mars", "the Moon", "long-term", "1.5 m", "15 m", "+2", "-2", "Red. Blue"]
    assert chosen_choice(text, choices) == chosen


def test_printed_choice():
    """The paper's expression to the letter: it stops at a hyphen and a full stop, and takes the first match."""
    for text, found in (
        ("The answer is: Mars.", "mars"), ("The answer is: 'the Moon'", "the moon"),
        ("The answer is: long-term", "long"), ("the answer is: Mars", None),
        ("The answer is: 1.5 m", "1"), ("The answer is: Mars. The answer is: Venus", "mars"),
    ):  # fmt: skip
        assert printed_choice(text) == found
