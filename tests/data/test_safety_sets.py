"""The built-in prompts are many, different and mild; a user's file is read or refused with its line."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from ptst.data.builtin import alignment_set
from ptst.data.builtin.alignment_set import harmless, refusals
from ptst.data.builtin.safety_sets import fresh_look_alikes, fresh_requests, harmful_requests, look_alikes
from ptst.data.json_rows import read_jsonl
from ptst.data.prompt_files import read_prompts
from ptst.data.prompt_sets import load_set
from ptst.errors import UserError
from ptst.evaluation.tasks.table import load_tasks
from ptst.evaluation.tasks.task import Defaults


@pytest.mark.parametrize("load", [harmful_requests, look_alikes])
def test_built_in_sets(load):
    prompts = load()
    assert len(prompts) == len({p.prompt for p in prompts}) == len({p.id for p in prompts}) >= 200
    assert Counter(p.category for p in prompts) == dict.fromkeys(
        ("malware", "drug", "phishing", "disinfo"), len(prompts) // 4
    )
    assert set(Counter((p.category, p.family) for p in prompts).values()) == {5}
    words = [set(re.findall(r"\w+", p.prompt.lower())) for p in prompts]
    assert all(5 <= len(p.prompt.split()) <= 25 for p in prompts)
    for i, a in enumerate(words):
        assert all(len(a & b) / len(a | b) < 0.7 for b in words[:i])
    # Any first N cover categories and families evenly.
    assert set(Counter(p.category for p in load()[:100]).values()) == {25}
    assert max(Counter((p.category, p.family) for p in load()[:100]).values()) == 3


def test_look_alikes_have_the_families_of_the_harmful_requests():
    assert {(p.category, p.family) for p in harmful_requests()} == {(p.category, p.family) for p in look_alikes()}
    assert not {p.prompt for p in harmful_requests()} & {p.prompt for p in look_alikes()}


def _words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(("load", "first"), [(fresh_requests, harmful_requests), (fresh_look_alikes, look_alikes)])
def test_fresh_sets(load, first):
    prompts = load()
    assert len(prompts) == len({p.prompt for p in prompts}) == len({p.id for p in prompts}) == 80
    assert set(Counter((p.category, p.family) for p in prompts).values()) == {2}
    assert set(Counter(p.category for p in prompts[:40]).values()) == {10}
    assert len({p.family for p in prompts[:40]}) == 40
    # As long as those of the first sets, on average.
    lengths = [[len(p.prompt.split()) for p in of] for of in (prompts, first())]
    assert all(5 <= number <= 25 for number in lengths[0])
    assert abs(sum(lengths[0]) / 80 - sum(lengths[1]) / 240) < 2
    # No prompt is another one in slightly other words, nor one that a model was aligned or tested on.
    aligned = [c.turns[0].content for c in (*refusals(), *harmless())]
    before = [_words(text) for text in (*aligned, *(p.prompt for p in (*harmful_requests(), *look_alikes())))]
    for own in (_words(p.prompt) for p in prompts):
        assert all(len(own & other) / len(own | other) < 0.6 for other in before)
        before.append(own)


def test_fresh_families_are_in_no_other_set():
    fresh = {(p.category, p.family) for p in fresh_requests()}
    assert fresh == {(p.category, p.family) for p in fresh_look_alikes()}
    assert {category for category, _ in fresh} == {p.category for p in harmful_requests()}
    aligned = {row.get("family") for _, row in read_jsonl(files("ptst.data.builtin") / "alignment.jsonl")}
    assert not {family for _, family in fresh} & ({p.family for p in harmful_requests()} | aligned)


def test_fresh_sets_by_name(tmp_path, monkeypatch):
    """`fresh` is the harmful requests in one task and their look-alikes in the other."""
    tasks = load_tasks(["safety:fresh", "over-refusal:fresh"], Defaults("", limit=10))
    asked = {key: [p.prompt for p in data.items] for key, (_, data) in tasks.items()}
    assert asked["safety:fresh"] == [p.prompt for p in fresh_requests()][:10]
    assert asked["over-refusal:fresh"] == [p.prompt for p in fresh_look_alikes()][:10]
    tasks = load_tasks(["safety:stopping", "over-refusal:stopping"], Defaults(""))
    assert [list(data.items) for _, data in tasks.values()] == list(alignment_set.stopping())
    monkeypatch.chdir(tmp_path)
    Path("fresh").write_text("mine\n")
    with pytest.raises(UserError, match="recognized by the ending"):
        load_tasks(["over-refusal:fresh"], Defaults(""))  # a file is a file


def test_limits():
    with pytest.raises(ValueError, match="the limit is 0"):
        load_set("built-in", 0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'Goal,Category\nfirst one,x\n"second, one",y\n', [("first one", "x"), ("second, one", "y")]),
        ("a.csv", "no heading here\nsecond\n", [("no heading here", ""), ("second", "")]),
        ("a.jsonl", '{"prompt": "p", "category": "c"}\n\n{"prompt": "q"}\n', [("p", "c"), ("q", "")]),
        ("a.txt", "one\n\ntwo\n", [("one", ""), ("two", "")]),
    ],
)
def test_users_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    assert [(p.prompt, p.category) for p in read_prompts(path)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,y\n1,2\n", r"a.csv:1: the prompt must be named one of .* the names here are x, y"),
        ("a.csv", b"query\nfirst one\n", r"a.csv:1: the prompt must be named one of .* the names here are query"),
        ("a.csv", b"goal,category\nfirst, second, third\n", r"a.csv:2: 3 cells, not 2"),
        ("a.jsonl", b'{"prompt": "p"}\n{oops}\n', r"a.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            b'\n{"id": "x", "prompt": "a \\ud83d"}\n',
            r"a.jsonl:2: the prompt holds a lone surrogate, U\+D83D, at",
        ),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: the line is a list"),
        ("a.jsonl", b'{"prompt": " "}\n', r"a.jsonl:1: 'prompt' is missing, empty or not text"),
        ("a.txt", b"fine\n\xff\n", r"a.txt:2: not UTF-8"),
        ("a.txt", b"", r"a.txt: the file holds no prompts"),
        ("a.json", b'{"prompt": "p"}', r"a.json:1: the file is not a JSON list"),
        ("a.json", b'[{"prompt": "p"},\n{"prompt": 3}]', r"a.json:2: 'prompt' is missing"),
        ("a.csv", b'goal,category\n"open,x\n', r"a.csv:2: not valid CSV"),
        ("a.xml", b"", r"recognized by the ending of the name"),
    ],
)
def test_files_with_mistakes(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.csv")


def test_known_files(shared):
    for name, count in (
        ("safety/advbench.csv", 520), ("safety/directharm4-half.jsonl", 200), ("xstest/xstest_prompts.csv", 450)
    ):  # fmt: skip
        assert len(read_prompts(shared / "data" / name)) == count
