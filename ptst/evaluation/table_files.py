"""Tables as files that any tool reads in one line: Parquet with types, and CSV with the same columns.

Lines come from an iterator and leave in batches, so that a table may be larger than the memory. Both files are whole or
absent. The CSV holds texts as they are: a spreadsheet takes one that begins with = for a formula, unless it imports the
column as text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ptst.progress import say
from ptst.storage import atomic_path

BATCH = 1000  # lines; a row group of the Parquet file
Format = Literal["parquet", "csv"]
Kind = Literal["text", "whole number", "number", "yes or no", "messages"]


@dataclass(frozen=True)
class Column:
    """A column of a table. `messages`: a list of role and content; JSON in CSV. Any cell may be absent (null)."""

    name: str
    kind: Kind
    meaning: str


def write_table(
    folder: Path,
    name: str,
    columns: Sequence[Column],
    lines: Iterable[Mapping[str, Any]],
    formats: Sequence[Format] = ("parquet", "csv"),
) -> list[Path]:
    """Write `name`.parquet and `name`.csv, or one of them; returns their paths. `lines` may leave columns out, and have
    no others. Without pyarrow, which `datasets` brings, nothing is written, and said. Raises OSError, and UserError for
    a link."""
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError:
        say(f"no {name}.parquet and {name}.csv: the package pyarrow is not installed; install ptst again")
        return []
    typed = pa.schema([(c.name, _type(c.kind)) for c in columns])
    flat = pa.schema([(c.name, _type("text" if c.kind == "messages" else c.kind)) for c in columns])
    nested = [i for i, c in enumerate(columns) if c.kind == "messages"]
    paths = {kind: folder / f"{name}.{kind}" for kind in formats}
    with ExitStack() as held:
        partial = {kind: held.enter_context(atomic_path(path)) for kind, path in paths.items()}
        makers: dict[str, Any] = {
            "parquet": lambda path: parquet.ParquetWriter(path, typed),
            "csv": lambda path: csv.CSVWriter(path, flat),
        }
        writers = {kind: held.enter_context(makers[kind](path)) for kind, path in partial.items()}
        for batch in _batches(lines):
            table = _table(batch, typed)
            if "parquet" in writers:
                writers["parquet"].write_table(table)
            for i in nested:
                texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in table[i].to_pylist()]
                table = table.set_column(i, flat[i], pa.array(texts, pa.string()))
            if "csv" in writers:
                writers["csv"].write_table(table)
    return [*paths.values()]


def _batches(lines: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    left = iter(lines)
    while batch := list(islice(left, BATCH)):
        yield batch


def _table(batch: list[Mapping[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    unknown = {key for line in batch for key in line} - set(schema.names)
    assert not unknown, f"no columns: {unknown}"
    try:
        return pa.Table.from_pylist(batch, schema)
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not have: as JSON escapes it
        return pa.Table.from_pylist([_encodable(line) for line in batch], schema)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _encodable(v) for key, v in value.items()}
    return [_encodable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _type(kind: Kind) -> Any:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    types = {"text": pa.string(), "whole number": pa.int64(), "number": pa.float64(), "yes or no": pa.bool_()}
    return types.get(kind) or pa.list_(message)
