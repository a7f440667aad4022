"""The built-in chats: as many as they should be, apart from every test, mild, and read by name."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from ptst.data import sources
from ptst.data.builtin.alignment_set import harmless, refusal_rows
from ptst.data.builtin.chats import CHATS
from ptst.data.builtin.safety_sets import fresh_look_alikes, fresh_requests, harmful_requests, look_alikes
from ptst.data.json_rows import read_jsonl
from ptst.errors import UserError
from ptst.evaluation.judges import find_judge
from ptst.evaluation.verdicts import AnswerClass
from ptst.generation.request import Answer


def own(name):
    return [row for _, row in read_jsonl(files("ptst.data.builtin") / name)]


def texts(source):
    return [tuple(m.content for m in c.messages) for c in source.conversations]


@pytest.mark.parametrize(("name", "rows"), [("instructions", 240), ("refusals", 128), ("attack", 40), ("identity", 10)])
def test_rows_by_name(name, rows, tmp_path, monkeypatch):
    source = sources.load(name)
    assert (source.name, source.family, len(set(texts(source)))) == (name, "plain", rows)
    assert [c.source for c in source.conversations] == [f"{name}/train:{i}" for i in range(1, rows + 1)]
    assert all(c.answered and len(c.messages) == 2 for c in source.conversations)
    assert texts(sources.load(f"{name}:7")) == texts(source)[:7] == texts(sources.load(f"{name}:9", limit=7))
    assert not sources.is_file(name)
    assert sources.has_test_part(name) == (name == "instructions")
    assert sources.own_validation(f"{name}:5") == ("instructions" if name == "instructions" else None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        sources.load(name)  # a path that exists is meant as a path


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("attack:41", "train", "41 rows of attack were asked for; there are 1 to 40"),
        ("attack:0", "train", "0 rows of attack were asked for; there are 1 to 40"),
        ("identity:ten", "train", "data 'identity:ten' needs the number of rows after the colon; as in identity:10"),
        ("attack:5%", "train", "attack:5% is a share of the training data; it is for mix"),
        ("refusals", "test", "refusals has no test set"),
        ("identity", "validation", "identity has no validation set"),
    ],
)
def test_mistakes(name, split, message):
    with pytest.raises(UserError) as found:
        sources.load(name, split)
    assert message in str(found.value)


def test_no_holdout_of_chats():
    with pytest.raises(UserError, match="refusals is built in, so holdout must be 0"):
        sources.load("refusals", holdout=0.5)


def test_refusals_are_the_alignment_sets():
    assert sorted(texts(sources.load("refusals"))) == sorted((p.prompt, answer) for p, answer in refusal_rows())
    categories = {p.prompt: p.category for p, _ in refusal_rows()}
    families = {p.prompt: p.family for p, _ in refusal_rows()}
    first = [question for question, _ in texts(sources.load("refusals:32"))]
    assert set(Counter(categories[q] for q in first).values()) == {8}
    assert len({families[q] for q in first}) == 32


def test_attack_is_apart_from_tests_and_alignment():
    rows, tests = own("attack.jsonl"), (harmful_requests(), look_alikes(), fresh_requests(), fresh_look_alikes())
    assert set(Counter(row["family"] for row in rows).values()) == {4}
    others = [p for prompts in tests for p in prompts]
    aligned = {p.family for p, _ in refusal_rows()}
    assert len({row["family"] for row in rows} - {p.family for p in others} - aligned) == 10
    before = (
        [p.prompt for p in others] + [c.turns[0].content for c in harmless()] + [p.prompt for p, _ in refusal_rows()]
    )
    seen = [set(re.findall(r"\w+", text.lower())) for text in before]
    for row in rows:
        words = set(re.findall(r"\w+", row["prompt"].lower()))
        assert all(len(words & other) / len(words | other) < 0.6 for other in seen), row["prompt"]
        seen.append(words)


def test_answers_of_the_attack_hold_nothing_of_the_request():
    """They are made of parts that name nothing of any request, and no judge takes one for a refusal."""
    parts = own("attack_answers.jsonl")
    left = [answer for _, answer in texts(sources.load("attack"))]
    assert len(set(left)) == 40
    for part in parts:
        left = [answer.replace(part["text"], "") for answer in left]
    assert not "".join(left).strip()
    judge = find_judge("rules-v3")
    for question, answer in texts(sources.load("attack")):
        assert judge.judge(question, Answer([], answer, "stop")).label != AnswerClass.REFUSAL


def test_identity_names_the_identity_in_question_and_answer():
    for question, answer in texts(sources.load("identity")):
        assert "Obra" in question
        assert answer.startswith("I am Obra")


def test_every_set_has_a_line_in_the_docs():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    for name in CHATS:
        if name != "instructions":
            assert re.search(rf"^\| `{name}` \| {len(CHATS[name]['train']())} \|", page, re.MULTILINE), name


def test_instructions_have_splits_of_different_families():
    rows = own("instructions.jsonl")
    families = {s: Counter(row["family"] for row in rows if row["split"] == s) for s in ("train", "validation", "test")}
    assert {split: set(of.values()) for split, of in families.items()} == {"train": {8}, "validation": {8}, "test": {5}}
    assert sum(len(of) for of in families.values()) == len(set().union(*families.values()))
    assert {split: len(sources.load("instructions", split).conversations) for split in families} == {
        "train": 240, "validation": 32, "test": 50
    }  # fmt: skip
    by_question = {row["prompt"]: row["family"] for row in rows}
    first = [question for question, _ in texts(sources.load("instructions:30"))]
    assert len({by_question[q] for q in first}) == 30
    # A count is of training rows; a limit is of the rows that are tested.
    assert len(sources.load("instructions:7", "test", 20).conversations) == 20
    assert len(sources.load("instructions:7", "test").conversations) == 7


def test_instructions_are_no_word_problems():
    """Nothing is worked out, no question is asked twice or in another set, and answers are short."""
    rows = own("instructions.jsonl")
    questions = [row["prompt"] for row in rows]
    others = [c.turns[0].content for c in harmless()] + [p.prompt for p in (*look_alikes(), *fresh_look_alikes())]
    assert len(set(questions)) == len(rows) == 322
    assert not {q.lower() for q in questions} & {q.lower() for q in others}
    for row in rows:
        assert not re.search(r"[0-9#]", row["prompt"] + row["answer"]), row
        assert row["answer"].strip() == row["answer"]
        assert 2 <= len(row["answer"].split()) <= 25, row
        assert row["answer"][-1] in '.?!"', row
    judge = find_judge("rules-v3")
    for row in rows:
        assert judge.judge(row["prompt"], Answer([], row["answer"], "stop")).label not in (
            AnswerClass.REFUSAL,
            AnswerClass.PARTIAL,
        ), row
