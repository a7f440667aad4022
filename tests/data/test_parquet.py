"""Parquet files: what cannot be read is told with the column, and how to mend it."""

from __future__ import annotations

import gzip
import io

import pyarrow
import pyarrow.parquet
import pytest

from ptst.data.sources import load
from ptst.errors import UserError

TEXT = pyarrow.array(["one", "two"])
OLD = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


def table(names=("question", "answer"), answer=TEXT) -> bytes:
    file = io.BytesIO()
    columns = [TEXT, answer, *(TEXT for _ in names[2:])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=list(names)), file)
    return file.getvalue()


def not_utf8() -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, TEXT.buffers()[1], pyarrow.py_buffer(6 * b"\xff")])


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.parquet", lambda: table()[:-9], r"cannot be read as Parquet \(.*\); fetch or write the file again"),
        ("a.parquet", lambda: b'{"question": "q"}\n', r"cannot be read as Parquet \(.*; fetch .* of another kind"),
        ("a.parquet.gz", lambda: gzip.compress(table()), r"not read out of \.gz; unpack it first"),
        ("a.parquet", lambda: OLD, "only a pointer of Git LFS to the file; run git lfs pull"),
        ("a.jsonl", lambda: OLD, "only a pointer of Git LFS to the file; run git lfs pull"),
        ("a.parquet", lambda: table(("question", "answer", "answer")), "the column 'answer' comes twice; rename one"),
        ("a.parquet", lambda: table(answer=pyarrow.array([1, 2])), "1: answer is of type int, not text; write the"),
        ("a.parquet", lambda: table(answer=not_utf8()), "'answer' has text that is not UTF-8 .*; write the file again"),
        (
            "a.parquet",
            lambda: table(answer=pyarrow.array([2**55] * 2, pyarrow.timestamp("ms"))),
            r"'answer', of type timestamp\[ms\], has a value that cannot be read .*; write that column as text",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data())
    with pytest.raises(UserError, match=f"{name}.*{told}"):
        load(str(tmp_path / name))


def test_no_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": TEXT[:0], "answer": TEXT[:0]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: the file has no rows; it needs one row per example"):
        load(str(path))
