"""Built-in word problems: right answers, no two alike, held-out stories apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from ptst.data.builtin.word_problems import families, generate
from ptst.evaluation.extraction import last_number, strict_answer

SPLITS = ("train", "validation", "test")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


def key(problem):
    """What makes two problems alike: the family and the numbers, whatever the names."""
    return problem.family, *re.findall(r"\d+", problem.answer)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_wording_of_every_problem_is_right(split):
    for family in families(split):
        assert len(set(family.wordings)) >= 2, family.name
        for numbers in family.instances():
            answer = family.steps.format(**numbers, n="Ada", m="Ben")
            steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
            assert len(steps) == len(answer.splitlines()), answer
            for a, operation, b, result in steps:
                assert OPERATIONS[operation](int(a), int(b)) == int(result), answer
            assert int(steps[-1][3]) == numbers["r"] >= 0, answer
            for wording in family.wordings:
                question = wording.format(**numbers, n="Ada", m="Ben")
                # Each step calculates with what the question gives or an earlier step has found, and with all of it.
                given = re.findall(r"\d+", question) + ["2"] * ("half" in question.lower())
                known, used = set(given), set()
                for a, _operation, b, result in steps:
                    assert {a, b} <= known, (question, answer)
                    known.add(result)
                    used |= {a, b}
                assert set(given) <= used, (question, answer)


@pytest.mark.parametrize("split", SPLITS)
def test_form_of_question_and_answer(split):
    for p in generate(split, 1500, seed=3):
        assert p.family in {f.name for f in families(split)}
        assert p.answer.endswith(f"\n#### {p.value}")
        assert last_number(p.answer) == strict_answer(p.answer) == p.value
        assert p.question.endswith("?")
        assert 14 <= len(p.question.split()) <= 40, p.question
        assert not set("{}<>") & set(p.question + p.answer)


@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("validation", 3900), ("test", 7800)])
def test_no_two_alike(split, count):
    # Nearly the whole of both held-out splits, so that numbers drawn twice could not stay unseen.
    problems = generate(split, count, seed=1)
    assert len({key(p) for p in problems}) == len(problems) == count


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [1, 7, 50, 200])
def test_families_in_turn(split, count):
    seen = Counter(p.family for p in generate(split, count, seed=2))
    times = [seen[f.name] for f in families(split)]
    assert sum(times) == count
    assert max(times) - min(times) <= 1


def test_splits_are_apart():
    assert len(families("train")) >= 32
    assert len(families("test")) >= 14
    assert families("test") == families("validation")
    assert not {f.name for f in families("train")} & {f.name for f in families("test")}
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            seen[split] |= {key(p) for p in generate(split, 1500, seed)}
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize(
    ("split", "count", "digest"),
    [("train", 400, "7a874e69f347"), ("validation", 32, "4fd712be3e83"), ("test", 100, "ee3bf48c4ef4")],
)
def test_the_same_seed_gives_the_same_problems(split, count, digest):
    # The default data: figures measured on them stand only as long as these digests do.
    text = "".join(p.question + p.answer for p in generate(split, count))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest
    assert generate(split, count, 0) != generate(split, count, 1)


def test_mistakes():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate("dev", 1)
    for count in (0, 10**6):
        with pytest.raises(ValueError, match=rf"{count} word problems were asked for; the test split has 1 to"):
            generate("test", count)
