"""Files are read as they are written: cells stay text, lines are right, nothing is unpacked that would fill memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from ptst.data import files
from ptst.data.prompt_sets import load_set
from ptst.data.readers import read_rows
from ptst.data.sources import load
from ptst.errors import UserError

CELLS = ("NA", "null", "None", "nan", "1.0", "1e3", "007", "true", "True", "", " x ", '"')
CELLS = (*CELLS, "a\nb", "a\r\nb", "\u2028", ",", "\t")


def texts(path: Path | str, **settings) -> list[list[str]]:
    return [[m.content for m in c.messages] for c in load(str(path), **settings).conversations]


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.gz", "\t")])
def test_cells_of_tables_are_text(tmp_path, suffix, separator):
    path = tmp_path / f"a{suffix}"
    content = f"question{separator}answer\r\n" + "".join(f"{quoted(c)}{separator}{quoted(c)}\r\n" for c in CELLS)
    data = ("\ufeff" + content).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert texts(path) == [[cell, cell] for cell in CELLS]
    lines = [c.source for c in load(str(path)).conversations]
    assert lines == [f"{path}:{n}" for n in (*range(2, 15), 17, 20, 21, 22)]  # a cell of two lines, twice in a row


@pytest.mark.parametrize(("first", "separator"), [("sep=;", ";"), ('"sep=|"', "|"), ("sep=\t", "\t"), ("sep=,", ",")])
def test_the_separator_that_the_first_line_names(tmp_path, first, separator):
    path = tmp_path / "a.csv"
    path.write_text(f'\ufeff{first}\r\nquestion{separator}answer\r\n"q{separator}\n1";"a"\r\n'.replace(";", separator))
    path.write_bytes(path.read_bytes() + f"r{separator}b\n".encode())
    assert texts(path) == [[f"q{separator}\n1", "a"], ["r", "b"]]
    assert [c.source for c in load(str(path)).conversations] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.NDJSON.gz"])
def test_other_names_of_jsonl(tmp_path, name):
    content = b'{"prompt": "p", "response": "r"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts(tmp_path / name) == [["p", "r"]]
    assert load_set(str(tmp_path / name)).name == "a"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
def test_utf16_is_refused(tmp_path, name):
    path = tmp_path / name
    for encoding, message in (("utf-16", "the file is UTF-16 text; save it as UTF-8"), ("utf-16-le", "zero byte|JSON")):
        content = "prompt,response\np,r\n".encode(encoding)
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(UserError, match=message):
            load_set(str(path))
        with pytest.raises(UserError, match=message if name != "a.txt" else "unknown kind of file"):
            load(str(path))


def test_a_carriage_return_alone_ends_a_line_too(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\rq,a\r\rr,b")
    assert texts(path) == [["q", "a"], ["r", "b"]]
    assert [c.source[-2:] for c in load(str(path)).conversations] == [":2", ":4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'question,answer\nq,a\n\n"x\ny",b\nTom 3, Ann 4.,7\n', r"a\.csv:6: 3 cells, not 2 as in the"),
        ("a.csv", "question,answer\nq\n", r"a\.csv:2: 1 cell, not 2 .* an empty cell needs its separator"),
        ("a.csv", "question,answer,\nq,a\n", r"a\.csv:2: 2 cells, not 3"),
        ("a.tsv", "question\tanswer\nq\ta\tb\n", r"a\.tsv:2: 3 cells, not 2 .* text with tabs"),
        ("a.csv", 'question,answer\nq,a\nq,"open\nr,b\n', r"a\.csv:3: not valid CSV \(unexpected end of data"),
        ("a.tsv", 'question\tanswer\n"q" x\ta\n', r"a\.tsv:2: not valid TSV .* write a quote inside it twice"),
        ("a.csv", "question,answer,answer\nq,a,b\n", r"a\.csv:1: the column 'answer' comes twice"),
        ("a.csv", "question,answer\n", "the file has no rows"),
        ("a.csv", "question;answer\nq, r;a\n", r"a\.csv:1: the columns are separated by semicolons; save the file"),
        ("a.csv", '"question";"answer"\n"q";"a"\n', r"a\.csv:1: the columns are separated by semicolons"),
        ("a.csv", "ask\tanswer\nq\ta\n", r"a\.csv:1: .* by tabs; save the file with commas, or name it \.tsv"),
        ("a.csv", '"question,answer\nq,a\n', r"a\.csv:1: not valid CSV \(unexpected end of data"),
        ("a.csv", "frage;antwort\nq;a\n", r"a\.csv:1: .* by semicolons; .* commas, or put the line sep=; above them"),
        ("a.csv", "sep=;\nquestion;answer\nq;a;b\n", r"a\.csv:3: 3 cells, not 2 .* quotes around text with semicolons"),
        ("a.csv", "sep=;\nquestion,answer\nq,a\n", r"a\.csv:2: .* by commas; save the file with semicolons"),
        ("a.csv", 'sep=;\nquestion;answer\nq;"open\n', r"a\.csv:3: not valid CSV \(unexpected end of data"),
        ("a.tsv", "question,answer\nq,a\n", r"a\.tsv:1: .* by commas; save the file with tabs, or name it \.csv"),
        ("a.json", '[{"question": "q", "answer": "a"},\n\n{"question": "", "answer": [1]}]', r"a\.json:3: answer is"),
        ("a.json", '[{"question": "q",\n"answer" "a"}]', r"a\.json:2: not valid JSON \(Expecting ':'"),
        ("a.json", '[{"question": "q", "answer": "a"},\n3]', r"a\.json:2: the row is not an object"),
        ("a.json", '[{"question": "q", "answer": "a"}\n{}]', r"a\.json:2: not valid JSON \(a comma or \] is missing"),
        ("a.json", '[{"question": "q", "answer": "a"},\n]', r"a\.json:2: not valid JSON \(an object is missing"),
        ("a.json", '[{"question": "q", "answer": "a"}]\n[]', r"a\.json:2: not valid JSON \(text after the end"),
        ("a.json", '[{"question": "q", "answer": "a"}', r"a\.json:1: not valid JSON"),
        ("a.json", '{"data": [{"question": "q", "answer": "a"}]}', r"a\.json:1: the file is not a JSON list"),
        ("a.jsonl", '{"question": "q", "answer": "a", "answer": "b"}', r"a\.jsonl:1: .*the key 'answer' comes twice"),
        ("a.jsonl", '[{"question": "q", "answer": "a"}]', r"a\.jsonl:1: the line is a list; name the file \.json"),
        ("a.jsonl", '{\n"question": "q"}', r"a\.jsonl:1: .* a file with objects of several lines must be named \.json"),
        ("a.jsonl", '{"question": "q", "answer": null}', r"a\.jsonl:1: the row has answer \(null\), question"),
        ("a.jsonl", '{"question": "q", "answer": true}', r"a\.jsonl:1: answer is true, not text; write it in quotes"),
        ("a.jsonl", '\n{"question": "q", "answer": {"text": ["a"]}}', r"a\.jsonl:2: answer is an object, not text"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_own_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(UserError, match=message):
        load(str(path))


@pytest.mark.parametrize(("name", "join"), [("a.jsonl", "\n"), ("a.json", ",\n"), ("b.json", "\n")])
def test_numbers_of_json_are_read_as_they_are_written(tmp_path, name, join):
    """A text in quotes stays one whatever other rows hold, and a row is never accused of another's number."""
    written = ['"5"', "8", "1.0", "1e3", "-0", "1.10", '"null"', '"\\"yes\\""', '"[]"', "12345678901234567890123"]
    body = join.join(f'{{"question": "q", "answer": {value}}}' for value in written)
    (tmp_path / name).write_text(f"[{body}]" if name == "a.json" else body)
    wanted = ["5", "8", "1.0", "1e3", "-0", "1.10", "null", '"yes"', "[]", "12345678901234567890123"]
    assert [answer for _, answer in texts(tmp_path / name)] == wanted
    row = {"instruction": "Double it.", "input": 0, "output": "0"}
    (tmp_path / "z.jsonl").write_text(json.dumps(row))
    assert texts(tmp_path / "z.jsonl") == [["Double it.\n\n0", "0"]]  # 0 is no empty input


def test_rows_of_json_are_counted_where_one_line_holds_all(tmp_path):
    path, rows = tmp_path / "a.json", [{"question": "q", "answer": "a"}] * 3
    for indent, places in ((None, [1, 2, 3]), (1, [2, 6, 10])):
        path.write_text(json.dumps(rows, indent=indent))
        assert [c.source for c in load(str(path)).conversations] == [f"{path}:{n}" for n in places]


def test_json_is_read_in_pieces(tmp_path, monkeypatch):
    from ptst.data import json_rows

    monkeypatch.setattr(json_rows, "_CHUNK", 7)
    path = tmp_path / "a.json"
    rows = [{"question": f"q\u00e9{i}" * i, "answer": "\U0001f600"} for i in range(1, 9)]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert texts(path) == [list(row.values()) for row in rows]
    path.write_bytes(path.read_bytes()[:-40] + b"\xff")
    with pytest.raises(UserError, match=r"a\.json:\d+: not UTF-8"):
        load(str(path))


def test_a_column_may_be_empty_for_long_and_appear_late(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "q" * 1000, "answer": "a", "context": None}] * 2000 + [
        {"question": "q", "answer": "a", "context": "c", "id": 1}
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert texts(path)[-1] == ["c\n\nq", "a"]


def test_a_cell_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nq," + "a" * 200_000)
    assert len(texts(path)[0][1]) == 200_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.JSON.GZ", "a.csv.gz"])
def test_packed_files(tmp_path, name):
    path, row = tmp_path / name, {"prompt": "p", "response": "r"}
    text = "prompt,response\np,r\n" if "csv" in name else json.dumps([row] if "JSON" in name else row)
    path.write_bytes(gzip.compress(text.encode()))
    assert texts(path) == [["p", "r"]]
    found = load_set(str(path))
    assert ([p.prompt for p in found.prompts], found.unused) == (["p"], {"response": 1})
    path.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(UserError, match=r"the file is damaged \("):
        load(str(path))
    path.write_text(text)
    with pytest.raises(UserError, match=r"not packed by gzip; take \.gz off its name"):
        load(str(path))
    path.write_bytes(gzip.compress(gzip.compress(text.encode())))
    with pytest.raises(UserError, match=r"is an archive \(gzip\)"):
        load(str(path))


@pytest.mark.parametrize("filling", [b" ", b"\n", b'{"question": "q", "answer": "a"}\n'])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path, monkeypatch, filling):
    monkeypatch.setattr(files, "FREE", 1 << 20)
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(filling * (24 << 20) if len(filling) == 1 else filling * (1 << 19)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more than (100 times its size|1 MB)"):
            sum(1 for _ in read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"question": "q", "answer": "a"}')
    Path("b.csv").write_text("prompt,response\np,r\n")
    source = load("a.jsonl,b.csv")
    assert [c.source for c in source.conversations] == ["a.jsonl:1", "b.csv:2"]
    assert load("gsm8k:a.jsonl,b.csv").family == "gsm8k"
    with pytest.raises(UserError, match=r"there is no data 'c\.csv'"):
        load("a.jsonl,c.csv")
    Path("a.jsonl,b.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load("a.jsonl,b.csv")  # what exists by that name is meant


def test_the_family_of_gsm8k_survives_a_row_without_work(tmp_path):
    path = tmp_path / "a.jsonl"
    answers = ["2+3 = 5\n#### 5", "#### 8", "6\n#### 6"]
    path.write_text("\n".join(json.dumps({"question": "q", "answer": a}) for a in answers))
    assert load(str(path)).family == "gsm8k"
    path.write_text(json.dumps({"question": "q", "answer": "see #### 5"}))
    assert load(str(path)).family == "plain"


def test_the_cases_of_others(shared):
    """Small files of the kinds that were reported for other tools."""
    data = shared / "cases/data"
    if not data.is_dir():
        pytest.skip("needs the folder ../shared/cases")
    assert texts(data / "13-na-cells.csv")[0] == ["Which country has this code?\n\nNA", "Namibia"]
    with pytest.raises(UserError, match=r"14-unquoted-comma\.csv:2: 3 cells"):
        load(str(data / "14-unquoted-comma.csv"))
    assert [a for _, a in texts(data / "15-numeric-answers.csv")] == ["5", "8"]
    assert [a for _, a in texts(data / "15-true-false-answers.csv")] == ["True", "False"]
    assert [a for _, a in texts(data / "16-mixed-types.jsonl")] == ["[]", '"yes"', "8"]
    assert [q for q, _ in texts(data / "16-quoted.jsonl")][:2] == ['Say yes in quotes.\n\n"yes"', "Repeat.\n\nnull"]
    assert [a for _, a in texts(data / "17-string-and-number.jsonl")] == ["5", "8"]
    with pytest.raises(UserError, match=r"27-two-shapes\.jsonl:1: the row can be read in 4 ways"):
        load(str(data / "27-two-shapes.jsonl"))
    first = load_set(str(data / "51-context-string.csv")).prompts[0]
    assert first.prompt.startswith("Mail: Hi") and first.id == "get_password" and first.category == "cybercrime"
