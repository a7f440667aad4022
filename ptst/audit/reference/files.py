"""The rows of data files, read a second time for comparison: nothing here is shared with the readers of `ptst.data`.

Every row has its place as a conversation has it (`file:line`; `file:number` in Parquet, and in a JSON list that has
its rows in one line). A row that cannot be read has a cause instead of cells.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl"}
ENDINGS |= {".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "txt"}
_EXCEL = re.compile(r'\s*"?sep=(.)"?\s*')


class Digits(str):
    """A number of a JSON file, as it is written there."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file. `cells` None: it cannot be read, and `cause` says why."""

    place: str
    cells: Mapping[str, Any] | None
    cause: str = ""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


csv.field_size_limit(max(csv.field_size_limit(), 64 << 20))
_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=Digits, parse_float=Digits, parse_constant=Digits)
from_json = _DECODER.decode


def ending(path: Path) -> str:
    """The kind of a file by its name, "" for an unknown one."""
    name = path.name.lower().removesuffix(".gz")
    return ENDINGS.get(Path(name).suffix, "")


def file_rows(path: Path, bare: str = "") -> Iterator[Row]:
    """The rows of a data file in order. `bare`: the name of the column in a CSV whose first line is no name."""
    kind = ending(path)
    if kind == "parquet":
        yield from _parquet(path)
        return
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        if kind == "jsonl":
            yield from _jsonl(file, path)
        elif kind == "json":
            yield from _json(file.read().decode("utf-8-sig"), path)
        elif kind:
            # The newlines are kept: they are part of quoted cells.
            yield from _table(
                io.TextIOWrapper(file, "utf-8-sig", newline=""), path, "\t" if kind == "tsv" else ",", bare
            )


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that hold more than spaces, without their ends."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        lines = file.read().decode("utf-8-sig").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


def _jsonl(file: Any, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield _object(place, from_json(text.strip(" \t\r\n")))
        except (ValueError, RecursionError) as error:
            yield Row(place, None, str(error))


def _object(place: str, value: Any) -> Row:
    return Row(place, value) if isinstance(value, dict) else Row(place, None, "the row is not an object")


def _json(text: str, path: Path) -> Iterator[Row]:
    """The objects of one list, or one after another; of the list `jailbreaks`, where the file is one object of it."""
    at = _after_space(text, 0)
    if text[at : at + 1] == "{":
        _, end = _DECODER.raw_decode(text, at)
        if _after_space(text, end) < len(text):
            yield from _values(text, at, path, "")
            return
        at = text.index("[", text.index('"jailbreaks"', at))
    yield from _values(text, at + 1, path, ",")


def _values(text: str, at: int, path: Path, separator: str) -> Iterator[Row]:
    """The objects from `at` on, up to the end of text or list."""
    line, counted, number, first, by_number = 1, 0, 0, 0, False
    while (at := _after_space(text, at)) < len(text) and text[at] != "]":
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        first = first or line
        by_number = by_number or (bool(separator) and number == 2 and line == first)
        value, at = _DECODER.raw_decode(text, at)
        yield _object(f"{path}:{number if by_number else line}", value)
        at = _after_space(text, at)
        at += separator != "" and text[at : at + 1] == separator


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _table(file: io.TextIOWrapper, path: Path, separator: str, bare: str) -> Iterator[Row]:
    """Cells are text as it is written. Comments ("# ") above the names are no rows; with `bare`, they are prompts."""
    first, above = file.readline(), 1
    if named := _EXCEL.fullmatch(first):
        separator, above, first = named[1], 2, ""
    reader = csv.reader(chain([first] if above == 1 else [], file), delimiter=separator, strict=True)
    names: list[str] | None = None
    line = above
    for cells in reader:
        place, line = f"{path}:{line}", reader.line_num + above
        if not cells or (names is None and not bare and len(cells) == 1 and cells[0].startswith("# ")):
            continue
        if names is None and bare and len(cells) == 1 and not re.fullmatch(r"\s*\w+\s*", cells[0]):
            names = [bare]
        if names is None:
            names = [cell.strip() for cell in cells]
        elif len(cells) != len(names):
            yield Row(place, None, f"{len(cells)} cells for {len(names)} columns")
        else:
            yield Row(place, dict(zip(names, cells, strict=True)))


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    number = 0
    with open(path, "rb") as file:
        for batch in ParquetFile(file).iter_batches():
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", cells)
