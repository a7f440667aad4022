"""Folders and patterns as sources of data: which files are read, in which order, and how they are recorded."""

from __future__ import annotations

import gzip
import json

import pytest

from ptst.data import sources
from ptst.errors import UserError
from ptst.records import absolute


def row(number: int) -> str:
    return json.dumps({"question": f"{number}?", "answer": f"{number}."}) + "\n"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "b.jsonl").write_text(row(2) + row(3))
    (folder / "a.jsonl").write_text(row(1))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(row(4).encode()))
    (folder / "more/d.jsonl").write_text(row(5))
    (folder / "README.md").write_text("# Rows")
    (folder / ".hidden.jsonl").write_text("damaged")
    return folder


def asked(name: str) -> list[str]:
    return [c.messages[0].content for c in sources.load(name).conversations]


def test_a_folder_and_a_pattern_are_their_files_in_order(rows):
    whole = ["1?", "2?", "3?", "4?"]
    assert asked("rows") == asked("rows/") == asked(str(rows)) == asked("rows/*.jsonl*") == whole
    assert asked("rows/**/*.jsonl") == asked("./rows/**/*.jsonl") == ["1?", "2?", "3?", "5?"]
    (rows / ".hidden.jsonl").write_text(row(6))
    assert asked("rows/.*.jsonl") == ["6?"] and asked(f"{rows.parent}/../{rows.parent.name}/rows/b*") == ["2?", "3?"]
    assert (
        asked("rows/[ab].jsonl, rows/more/")
        == asked(f"gsm8k:{rows}/[ab].jsonl,rows/more/d.jsonl")
        == [*whole[:3], "5?"]
    )
    found = sources.load("rows/b*").conversations
    assert [c.source for c in found] == ["rows/b.jsonl:1", "rows/b.jsonl:2"]


def test_what_cannot_be_meant_is_one_sentence(rows):
    for name, told in (
        ("rows/*.csv", r"no file fits rows/\*\.csv; check the pattern"),
        ("rows/a.jsonl,rows/", r"the file rows/a\.jsonl is named twice in rows/a\.jsonl,rows/; name it once"),
        ("rows/README*", r"README\.md: unknown kind of file"),
        ("rows/**.jsonl/**x", r"is no pattern of files|no file fits"),
        ("rows/a.jsonl,,rows/b.jsonl", r"a name of a file is missing in 'rows/a\.jsonl,,rows/b\.jsonl'; write"),
        ("", r"a name of a file is missing in ''"),
    ):
        with pytest.raises(UserError, match=told):
            sources.load(name)
    (rows / "e.csv").write_text("question,answer\n5?,5.\n")
    with pytest.raises(UserError, match=r"the folder holds \.csv and \.jsonl files; say which, as in rows/\*\.csv"):
        sources.load("rows")
    (rows / "more/d.jsonl").unlink()
    with pytest.raises(UserError, match="is a folder, not a file, and no data file is in it; those are"):
        sources.load("rows/more")
    (rows / "more/notes.txt").touch()
    with pytest.raises(UserError, match=r"no data file is in it \(notes\.txt\)"):
        sources.load("rows/more")


def test_a_record_has_whole_paths(rows):
    assert absolute("rows/") == f"{rows}"
    assert absolute("rows/*.jsonl") == f"{rows}/*.jsonl"
    assert absolute("rows/a.jsonl,rows/more/") == f"{rows}/a.jsonl,{rows}/more"
    assert absolute("gsm8k:rows/[ab].jsonl") == f"gsm8k:{rows}/[ab].jsonl"
    assert absolute("rows/*.jsonl:2") == f"{rows}/*.jsonl:2"
    assert absolute("word-problems:80") == "word-problems:80" and absolute("org/name") == "org/name"
