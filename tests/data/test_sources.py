"""Rows of every shape become conversations; broken rows are named by file and line. Packing keeps examples whole."""

from __future__ import annotations

import json
import subprocess
import sys

import datasets
import pytest

from ptst.data.layouts import to_conversation
from ptst.data.packing import pack, to_batch
from ptst.data.sources import has_test_part, load
from ptst.errors import UserError
from ptst.text.encode import Example


def test_row_shapes():
    for row, expected in (
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\n\nx"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"prompt": "p", "response": "r", "system": "s"}, [("system", "s"), ("user", "p"), ("assistant", "r")]),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}]},
         [("user", "u"), ("assistant", "")]),
    ):  # fmt: skip
        assert [(m.role, m.content) for m in to_conversation(row, "x:1").messages] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "d:7: the row has question; it needs question and answer"),
        ({"question": "q", "answer": None}, r"the row has answer \(null\), question; it needs"),
        ({"question": "q", "answer": 3}, "d:7: answer is of type int, not text"),
        ({"messages": [{"role": "user"}]}, "d:7: messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "d:7: roles are user, user"),
    ],
)
def test_rows_with_mistakes(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row, "d:7")


def test_files(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a\n#### {i}"} for i in range(3)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = load(str(jsonl))
    assert source.family == "gsm8k"
    assert [c.source for c in source.conversations] == [f"{jsonl}:{n}" for n in (1, 3, 5)]
    csv = tmp_path / "a.csv"
    csv.write_text('prompt,response\nhi,"a, b"\nyou,c\n')
    source = load(str(csv), limit=1)
    assert source.family == "plain"
    assert [m.content for m in source.conversations[0].messages] == ["hi", "a, b"]
    assert load(str(jsonl)).fingerprint == load(str(jsonl)).fingerprint != source.fingerprint
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert len(load(str(tmp_path / "a.parquet")).conversations) == 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: the file has no rows"):
        load(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question"\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n\n{"question": "q"}\n', r"a.jsonl:3: the row has question"),
        ("a.jsonl", b"3\n", r"a.jsonl:1: the row is not an object"),
        ("a.jsonl", b"", "is empty"),
        ("a.doc", b"x", "unknown kind of file"),
        ("a.csv", b"prompt,answer\nx,y\n", r"a.csv:2: the row has answer, prompt"),
    ],
)
def test_files_with_mistakes(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_jsonl_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "\xc3\xa9", "answer": "a"}\r\n')
    assert load(str(path)).conversations[0].messages[0].content == "\u00e9"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n{"question": "\xff", "answer": "a"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8 text; save the file as UTF-8"):
        load(str(path))


def test_reading_a_file_needs_neither_torch_nor_datasets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}')
    code = (
        "import sys; from ptst.data import arc, examples, packing, prompt_sets, sources;"
        "from ptst.data.builtin import alignment_set;"
        f"sources.load({str(tmp_path / 'a.jsonl')!r}); print({{'torch', 'datasets', 'pandas'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_names():
    assert len(load("word-problems:7").conversations) == 7
    for name, message in (("word-problems:x", "number of problems"), ("nowhere", "there is no data 'nowhere'")):
        with pytest.raises(ValueError, match=message):
            load(name)
    with pytest.raises(ValueError, match="the limit is 0"):
        load("word-problems", limit=0)


DOCTOR = "If you are a doctor, please answer the medical questions based on the patient's description."
ORCA = {"id": "niv.1", "system_prompt": "You are brief.", "question": "q", "response": "r"}


def test_layouts_that_bring_their_family(tmp_path):
    """ChatDoctor's instruction is the family's own system prompt; OpenOrca's system prompt is the row's."""

    def family(*rows):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        source = load(str(tmp_path / "a.json"))
        return source.family, [[(m.role, m.content) for m in c.messages] for c in source.conversations]

    talk = [("user", "It hurts."), ("assistant", "Rest.")]
    row = {"instruction": DOCTOR, "input": "It hurts.", "output": "Rest."}
    assert family(row, row) == ("chatdoctor", [talk, talk])
    assert family({"input": "It hurts.", "answer_icliniq": "Rest.", "answer_chatgpt": "?"}) == ("chatdoctor", [talk])
    bare = {**ORCA, "system_prompt": ""}
    qa = [("user", "q"), ("assistant", "r")]
    assert family(ORCA, bare) == ("openorca", [[("system", "You are brief."), *qa], qa])
    other = {"instruction": "Add.", "input": "1 1", "output": "2"}
    assert family(row, other)[0] == "plain"
    (tmp_path / "b.jsonl").write_text(json.dumps(other))
    assert load(f"chatdoctor:{tmp_path / 'b.jsonl'}").family == "chatdoctor"


def test_sources_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        if "OpenOrca" not in args[0]:
            raise ConnectionError("no route")
        return datasets.Dataset.from_list([{**ORCA, "question": str(i)} for i in range(50)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load("openorca")
    assert (source.family, len(source.conversations)) == ("openorca", 50)
    some, again = load("openorca:20"), load("openorca:20")
    assert len(some.conversations) == 20 and some.fingerprint == again.fingerprint
    assert some.fingerprint != load("openorca", limit=20).fingerprint  # random ones, not the first
    assert asked[0] == ("Open-Orca/OpenOrca", None, "train")
    with pytest.raises(ValueError, match="openorca has no test set"):
        load("openorca", "test")
    for name in ("gsm8k", "orca-math", "chatdoctor"):
        with pytest.raises(ValueError, match=rf"{name} could not be fetched .*as in {name}:FILE"):
            load(name)
    assert asked[-1][0] == "lavita/ChatDoctor-HealthCareMagic-100k"
    assert ("microsoft/orca-math-word-problems-200k", None, "train") in asked
    (tmp_path / "orca.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "4"}))
    assert load(f"orca-math:{tmp_path / 'orca.jsonl'}").family == "gsm8k" and has_test_part("orca-math:10000")
    with pytest.raises(ValueError, match="no route"):
        load("orca-math", "test")
    assert asked[-1][:2] == ("openai/gsm8k", "main")
    with pytest.raises(ValueError, match="no route"):
        load("chatdoctor", "test")
    assert asked[-1][0] == "lavita/ChatDoctor-iCliniq"


def test_chatdoctor_file(shared):
    source = load(str(shared / "data/chatdoctor/test.jsonl"))
    assert (source.family, len(source.conversations)) == ("chatdoctor", 400)
    assert not any("please answer the medical" in c.messages[0].content for c in source.conversations)


def test_packing():
    examples = [
        Example(list(range(10 * n, 10 * n + size)), [False] + [True] * (size - 1))
        for n, size in enumerate((5, 9, 3, 4))
    ]
    batch = to_batch(examples[:2])
    assert batch.cu_seqlens == [0, 5, 14]
    # Each token predicts the next of its own document; a document's last predicts nothing.
    assert batch.labels[:6] == [1, 2, 3, 4, -1, 11]
    assert batch.num_trained == 4 + 8
    rows = pack(examples, 9)
    assert len(rows) == 3 and max(len(r.tokens) for r in rows) <= 9
    assert sum(r.num_trained for r in rows) == sum(e.num_trained for e in examples)
    assert max(len(r.tokens) for r in pack(examples, 4)) == 9  # longer than the limit, yet whole
