"""Data files as rows, each with its place: JSONL, JSON, CSV and TSV, also packed by gzip, by the standard library;
Parquet by `pyarrow`.

What a file says is what a row holds: cells of a CSV or TSV are text, and JSON keeps its numbers as they are written.
Files are read row by row, so that a mistake is told with its own line and a large file needs little memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ptst.data.files import Row, kind_of, open_data
from ptst.data.json_rows import read_json, read_jsonl
from ptst.data.tables import read_table
from ptst.data.typed import read_parquet
from ptst.errors import UserError

_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": partial(read_table, delimiter="\t"),
    ".parquet": read_parquet,
}
KINDS = tuple(_READERS)
_NO_ROWS = "it needs one row per example"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order. Raises UserError, with file and line, for one that is empty or cannot be read."""
    read = _READERS.get(kind_of(path))
    if read is None:
        raise UserError("unknown kind of file", f"use {', '.join(KINDS)}; all but .parquet also with .gz", path)
    with open_data(path) as file:
        if not file.peek(1):
            raise UserError("the file is empty", _NO_ROWS, path)
    row = None
    for row in read(path):
        yield row
    if row is None:
        raise UserError("the file has no rows", _NO_ROWS, path)
