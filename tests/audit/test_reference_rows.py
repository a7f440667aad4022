"""The second reading of the data: it agrees with the first on every layout and file kind, and finds what a spoiled
first reading loses, doubles, exchanges or changes."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import check_word_problems
from ptst.audit.reference.columns import Columns, Refused, Unknown
from ptst.audit.reference.files import file_rows, from_json
from ptst.audit.reference.layouts import meaning
from ptst.audit.reference.prompts import check_asked, plain, prompt_texts
from ptst.audit.reference.rows import Request, check_source, split_of
from ptst.data import sources
from ptst.data.builtin import safety_sets
from ptst.data.builtin.chats import CHATS
from ptst.data.columns import ColumnRules
from ptst.data.json_rows import parse_json
from ptst.data.layouts import family_of, to_conversation
from ptst.data.prompt_files import read_prompts
from ptst.data.readers import KINDS, read_rows
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.segments import Conversation, Message
from tests.data import test_published_layouts as published


def cases(test) -> list:
    """The parameters of a test."""
    return [case for mark in test.pytestmark for case in mark.args[1]]


ROWS = [row for row, _ in cases(published.test_rows_open) + cases(published.test_preference_sets_open)]
REFUSED = [row for row, _ in cases(published.test_rows_are_refused_by_name)]


def first_reading(row: dict, settings: dict) -> object:
    unused = Counter[str]()
    try:
        found = to_conversation(row, "d:1", ColumnRules.of(**settings), unused)
    except UserError:
        return "refused"
    return tuple((m.role, m.content, m.trained) for m in found.messages), dict(unused), family_of(row)


def second_reading(row: dict, settings: dict) -> object:
    try:
        found = meaning(row, Columns(**settings))
    except Refused:
        return "refused"
    return found.messages, found.unused, found.family


@pytest.mark.parametrize("settings", [{}, {"use_chosen": True}, {"ignore_columns": ["prompt,label", "text"]}])
def test_both_readings_agree_on_published_layouts(settings):
    read = 0
    for row in ROWS + REFUSED:
        text = json.dumps(row)
        try:
            found = second_reading(from_json(text), settings)
        except Unknown:
            continue
        assert found == first_reading(parse_json(text), settings), row
        read += found != "refused"
    assert read > 20


def test_both_readings_agree_on_changed_rows():
    """Rows of the published layouts with cells of others, lost, renamed and set to odd values."""
    rng, read = random.Random(0), 0
    cells = [cell for row in ROWS + REFUSED for cell in row.items()]
    odd = [None, "", "a\nb", " x ", 0, 1, 8.5, True, [], {}, ["q", "a"], "null", [["a", "b"]], {"text": ["a"]}]
    for _ in range(4000):
        row = dict(rng.choice(ROWS))
        for _ in range(rng.randint(0, 3)):
            name, value = rng.choice(cells)
            if row and rng.random() < 0.3:
                del row[rng.choice(list(row))]
            elif row and rng.random() < 0.3:
                row[rng.choice(list(row))] = rng.choice(odd)
            else:
                row[name] = value
        settings = {"use_chosen": rng.random() < 0.5, "ignore_columns": ["id,text"] * rng.randint(0, 1)}
        try:
            found = second_reading(from_json(json.dumps(row)), settings)
        except Unknown:
            continue
        assert found == first_reading(parse_json(json.dumps(row)), settings), (row, settings)
        read += found != "refused"
    assert read > 1000


def write_files(folder: Path) -> list[Path]:
    """The same four rows in every kind of file, and some that only one kind can have."""
    rows = [{"question": f"q {i},\t\u00e4", "answer": f' "a" {i}\n', "id": "x"} for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    quoted = ['"' + '"{0}"'.join(cell.replace('"', '""') for cell in row.values()) + '"' for row in rows]
    table = ["question{0}answer{0}id", *quoted]
    files = {
        "a.jsonl": "\n".join(lines),
        "blank.ndjson": "\ufeff" + "\r\n\n  \n".join(lines) + "\n\n",
        "list.json": json.dumps(rows),
        "lines.json": " [\n\n" + ",\n".join(lines) + "]\n",
        "indented.json": json.dumps(rows, indent=2),
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "attacks.json": '{"x": 1,\n "jailbreaks": [\n' + ",\n".join(lines) + "]}",
        "a.csv": "\n".join(table).format(","),
        "a.tsv": "\n".join(table).format("\t"),
        "excel.csv": "\ufeffsep=;\r\n" + "\r\n".join(table).format(";"),
        "comment.csv": "# of today\n\n" + "\n\n".join(table).format(","),
        "mac.csv": "\r".join(table).format(",") + "\r",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content.encode())
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(files["a.jsonl"].encode()))
    (folder / "b.csv.gz").write_bytes(gzip.compress(files["a.csv"].encode()))
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return sorted(folder.iterdir())


def check(name: str, split: str = "train", limit: int | None = None, holdout: float = 0.0) -> list[Finding]:
    errors: list[UserError] = []
    source = sources.load(name, split, limit, errors, holdout)
    return list(check_source(source, Request(name, split, limit, holdout, errors=errors)))


def test_both_readings_agree_on_every_kind_of_file(tmp_path):
    files = write_files(tmp_path)
    assert {kind for kind in KINDS if not any(f.name.removesuffix(".gz").endswith(kind) for f in files)} == set()
    for file in files:
        read = [(place, dict(cells)) for place, cells in read_rows(file)]
        assert [(row.place, row.cells) for row in file_rows(file)] == read, file.name
        assert len(read) == 4 and check(str(file)) == check(str(file), limit=2) == [], file.name
    both = f"{files[0]}, {tmp_path / 'lines.json'}"
    assert check(both) == check(f"gsm8k:{both}", limit=6) == check(f"{files[0]},{files[0]}") == []


def test_both_readings_agree_on_limits_and_holdouts(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"q{i}", "answer": f"a\n#### {i}"} for i in range(60)]
    rows[3] |= {"options": "b"}  # refused
    path.write_text("\n".join(map(json.dumps, rows)))
    for split in ("train", "validation", "test"):
        assert check(str(path), split, holdout=0.4) == check(str(path), split, 4, 0.4) == []
    source = sources.load(str(path), holdout=0.4, errors=[])
    assert all(split_of([(m.role, m.content, True) for m in c.messages], 0.4) == "train" for c in source.conversations)
    assert {f.rule for f in check_source(source, Request(str(path), "validation", None, 0.4))} >= {"split-leak"}


def test_real_files_are_clean(shared):
    for path in sorted([*(shared / "data").rglob("*.*"), *(shared / "cases/data").iterdir()]):
        if path.name != "14-unquoted-comma.csv":  # refused as a whole
            assert check(str(path)) == [], path


@pytest.fixture
def clean(tmp_path) -> tuple[Source, Request]:
    path = tmp_path / "a.jsonl"
    answers = ["a", "b ", "c\n", "d"]
    path.write_text("\n".join(json.dumps({"id": 1, "question": f"q{i}", "answer": a}) for i, a in enumerate(answers)))
    return sources.load(str(path)), Request(str(path))


def with_answer(c: Conversation, text: str, trained: bool = True) -> Conversation:
    return Conversation((*c.messages[:-1], Message("assistant", text, trained)), c.source)


FAULTS = {
    "the last row is lost": (lambda c: c[:-1], [("row-lost", 4)]),
    "all rows are lost": (lambda c: [], [("row-lost", 1), ("row-lost", 2), ("row-lost", 3), ("row-lost", 4)]),
    "a row comes twice": (lambda c: [*c[:2], c[1], *c[2:]], [("row-twice", 2)]),
    "a row takes another's place": (lambda c: [c[0], c[1], c[1], c[3]], [("row-lost", 3), ("row-twice", 2)]),
    "rows are exchanged": (
        lambda c: [c[0], replace(c[1], source=c[2].source), replace(c[2], source=c[1].source), c[3]],
        [("row-exchanged", 2), ("row-exchanged", 3), ("row-exchanged", 2)],
    ),
    "rows are out of order": (lambda c: [c[0], c[2], c[1], c[3]], [("row-exchanged", 2)]),
    "a place is wrong": (lambda c: [*c[:3], replace(c[3], source="a:9")], [("row-lost", 4), ("row-unknown", 0)]),
    "an answer is stripped": (lambda c: [with_answer(x, x.messages[-1].content.strip()) for x in c],
                              [("row-differs", 2), ("row-differs", 3)]),
    "an answer is not trained": (lambda c: [with_answer(c[0], "a", False), *c[1:]], [("row-differs", 1)]),
    "a question is lost": (lambda c: [replace(c[0], messages=(Message("user", "q0"),)), *c[1:]], [("row-differs", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_spoiled_conversations_are_found(clean, fault):
    source, request = clean
    assert list(check_source(source, request)) == []
    spoil, expected = FAULTS[fault]
    found = list(check_source(replace(source, conversations=tuple(spoil(list(source.conversations)))), request))
    places = {f"{request.name}:{n}": n for n in range(1, 5)}
    assert sorted((f.rule, places.get(f.row, 0)) for f in found) == sorted(expected)


def test_what_is_said_of_a_source_is_checked(clean):
    source, request = clean
    assert [f.rule for f in check_source(replace(source, unused={"id": 3}), request)] == ["column-lost"]
    assert [f.rule for f in check_source(replace(source, family="gsm8k"), request)] == ["family-differs"]
    found = list(check_source(source, replace(request, columns=Columns(ignore_columns=["question"]))))
    assert found[0].rule == "row-differs" and "it may not be" in found[0].cause


def test_rows_that_may_not_be_read_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a", "options": "b"}\n{"question": "r", "answer": "s"}')
    source = sources.load(str(path), errors=[])
    (lost,) = check_source(source, Request(str(path)))
    assert (lost.rule, lost.row) == ("row-lost", f"{path}:1")  # neither a conversation nor an error


def test_word_problems_are_pinned():
    for split, name in (("train", "word-problems"), ("validation", "word-problems:9"), ("test", "word-problems:150")):
        source = sources.load(name, split)
        assert list(check_word_problems(source, name, split, None)) == []
        wrong = [with_answer(c, c.messages[-1].content.replace(" = ", " = 1", 1)) for c in source.conversations]
        found = list(check_word_problems(replace(source, conversations=tuple(wrong)), name, split, None))
        assert [f.rule for f in found] == ["row-differs"] * len(wrong)
    other = sources.load("word-problems:200", "test")  # of another split
    assert "row-differs" in {f.rule for f in check_word_problems(other, "word-problems:200", "train", None)}
    assert {f.rule for f in check_word_problems(other, "word-problems:201", "test", None)} == {"row-lost"}
    twice = (*source.conversations[:120], *(replace(source.conversations[119], source="word-problems/test:121"),))
    found = list(check_word_problems(replace(source, conversations=twice), "word-problems:121", "test", None))
    assert [f.rule for f in found] == ["row-twice"]


@pytest.mark.parametrize("name", sorted(CHATS))
def test_built_in_chats_are_pinned(name):
    """A row altered, lost, exchanged or of another set is found without the code that assembles the rows."""
    source = sources.load(name)
    rows = source.conversations
    assert check(name) == check(f"{name}:5") == check(name, limit=3) == []
    wrong = (*rows[:-1], with_answer(rows[-1], rows[-1].messages[-1].content + " "))
    exchanged = (replace(rows[0], messages=rows[1].messages), *rows[1:])
    for altered, rule in ((wrong, "row-differs"), (rows[:-1], "row-lost"), (exchanged, "row-differs")):
        found = list(check_source(replace(source, conversations=altered), Request(name)))
        assert [f.rule for f in found] == [rule]
    other = next(other for other in CHATS if other != name)
    assert "row-differs" in {f.rule for f in check_source(source, Request(other))}
    assert {f.rule for f in check_source(replace(source, family="gsm8k"), Request(name))} == {"family-differs"}


def test_rows_of_the_hub_are_compared_where_they_are_at_hand(monkeypatch):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(9)]
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: data)
    for name in ("someone/rows", "someone/rows/main:train@abc", "gsm8k", "openorca:4"):
        assert check(name) == check(name, limit=3) == [], name
    assert check("someone/rows", "validation", holdout=0.6) == []
    source = sources.load("someone/rows")
    lost = replace(source, conversations=source.conversations[:-1])
    assert [(f.rule, f.row) for f in check_source(lost, Request("someone/rows"))] == [
        ("row-lost", "someone/rows/train:9")
    ]

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert [f.rule for f in check_source(source, Request("someone/rows"))] == ["rows-unchecked"]


def test_prompts_of_the_test_are_compared(tmp_path, shared):
    for row in [row for row, _ in cases(published.test_prompt_sets_open)]:
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps(row))
        assert list(prompt_texts(path, Columns())) == [p.prompt for p in read_prompts(path)], row
    for name, content in (
        ("bare.csv", "v; as it is\nw\n"),
        ("excel.csv", "sep=;\r\nprompt;id\r\nv;c\r\n"),
        ("a.txt", " v\n\nw\n"),
    ):
        (tmp_path / name).write_text(content)
        assert list(prompt_texts(tmp_path / name, Columns())) == [p.prompt for p in read_prompts(tmp_path / name)]
    path = shared / "data/safety/advbench.csv"
    texts = [p.prompt for p in read_prompts(path)] + [p.prompt for p in safety_sets.harmful_requests()]
    others = (safety_sets.look_alikes(), safety_sets.fresh_requests(), safety_sets.fresh_look_alikes())
    asked = {plain(t) for t in texts} | {plain(p.prompt) for prompts in others for p in prompts}
    assert list(check_asked(asked, path, Columns())) == []
    (found,) = check_asked(asked - {plain(texts[-1])}, path, Columns())
    assert (found.rule, found.row) == ("asked-differs", "harmful_requests.jsonl")
    (found,) = check_asked(asked - {plain(others[2][0].prompt)}, path, Columns())
    assert (found.rule, found.row) == ("asked-differs", "fresh_look_alikes.jsonl")
