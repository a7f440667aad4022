"""Built-in word problems: right answers, no two alike, held-out stories apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from ptst.data.word_problems import families, generate
from ptst.evaluation.extraction import last_number, strict_answer

SPLITS = ("train", "validation", "test")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_is_right_and_the_last_gives_the_answer(split):
    for p in generate(split, 1500, seed=3):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", p.answer)
        assert steps, p
        for a, operation, b, result in steps:
            assert OPERATIONS[operation](int(a), int(b)) == int(result), p
        assert int(steps[-1][3]) == p.value >= 0
        assert p.answer.endswith(f"\n#### {p.value}")
        assert last_number(p.answer) == strict_answer(p.answer) == p.value
        assert p.question.endswith("?")
        assert not set("{}") & set(p.question + p.answer)
        # Nothing is calculated with that the question does not give or an earlier step has not found ("half" is 2).
        given = set(re.findall(r"\d+", p.question)) | {"2"}
        for a, _operation, b, result in steps:
            assert {a, b} <= given, p
            given.add(result)


@pytest.mark.parametrize("split", SPLITS)
def test_no_two_alike_and_families_in_turn(split):
    problems = generate(split, 1000, seed=1)
    assert len({p.question for p in problems}) == 1000
    bare = {(p.family, *re.findall(r"\d+", p.answer)) for p in problems}
    assert len(bare) == 1000
    first = problems[: len(families(split))]
    assert set(Counter(p.family for p in first).values()) == {1}


def test_splits_are_apart():
    assert len(families("train")) + len(families("test")) >= 40
    assert not {f.name for f in families("train")} & {f.name for f in families("test")}
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            seen[split] |= {(p.family, *re.findall(r"\d+", p.answer)) for p in generate(split, 1500, seed)}
    assert not seen["validation"] & seen["test"]


def test_the_same_seed_gives_the_same_problems():
    text = "".join(p.question + p.answer for p in generate("train", 200, seed=5))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "625b53150050"
    assert generate("train", 5, 0) != generate("train", 5, 1)


def test_mistakes():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate("dev", 1)
    for count in (0, 10**6):
        with pytest.raises(ValueError, match=rf"{count} word problems were asked for; the test split has 1 to"):
            generate("test", count)
