"""Prompts of a user's file: CSV, JSONL, JSON or TXT, each prompt exactly as written and each mistake with its line.

CSV and JSON have readers of their own here: unlike the typed columns of training data, every cell of a CSV is text,
a file may lack a header, and rows of JSON keep their line numbers. Also what a prompt is, and how a limit is spread
over the categories.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ptst.data.files import Row, check_object, json_mistake, not_utf8, open_data, read_jsonl
from ptst.errors import UserError
from ptst.reading import MAX_BYTES, parse_json


@dataclass(frozen=True)
class SafetyPrompt:
    """One prompt with its category (malware, drug, phishing, disinfo in the built-in sets) and family. `request`: what
    is judged, where that is not the prompt, such as the bare goal of a prompt with an adversarial suffix."""

    id: str
    prompt: str
    category: str = ""
    family: str = ""
    request: str = ""


def interleave(prompts: Iterable[SafetyPrompt], *kinds: str) -> list[SafetyPrompt]:
    """One prompt of each kind in turn (`kinds`: fields of a prompt); those of one kind, by the next field."""
    if not kinds:
        return list(prompts)
    groups: dict[str, list[SafetyPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(getattr(prompt, kinds[0]), []).append(prompt)
    turns = zip_longest(*(interleave(group, *kinds[1:]) for group in groups.values()))
    return [prompt for turn in turns for prompt in turn if prompt is not None]


# Names of the prompt column; the first of these that the file has.
PROMPT_COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "text")


def read_prompts(path: str | Path) -> list[SafetyPrompt]:
    """Prompts of a CSV, JSONL, JSON (one list, or JailbreakBench's object of `jailbreaks`) or TXT (one prompt a line)
    file in UTF-8, in the file's order.

    The prompt column is the first of `PROMPT_COLUMNS` that the file's first row has, in upper or lower case; category
    (or type, as XSTest calls it), family and id are taken where they exist, and a row without an id is named "<file
    stem>-<row number>". A row with both prompt and goal is judged by its goal (JailbreakBench's prompts with suffixes).
    A CSV of one column whose first line is more than one word has no header (AdvBench's form): every row is a prompt.
    Prompts are kept exactly, outer spaces too; blank lines between rows are skipped.

    Raises UserError, with file and line, for anything that cannot be read and for a row without a prompt."""
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        cause = f"prompts are read from {', '.join(_READERS)} files, recognized by the ending of the name"
        raise UserError(cause, where=path)
    prompts = to_prompts(read(path), path.stem)
    if not prompts:
        raise UserError("the file holds no prompts", "give a file with at least one", path)
    return prompts


def to_prompts(rows: Iterable[Row], stem: str) -> list[SafetyPrompt]:
    """Prompts of rows; those without an id are named after `stem`. Raises UserError as `read_prompts`."""
    prompts: list[SafetyPrompt] = []
    column = None
    for place, cells in rows:
        column = column or _prompt_column(place, cells)
        row = {name.strip().lower(): value for name, value in cells.items()}
        prompt = row.get(column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{column!r} is missing, empty or not text", "give it a prompt or delete the row", place)
        name = _label(row, "id") or f"{stem}-{len(prompts) + 1}"
        category = _label(row, "category") or _label(row, "type")
        goal = _label(row, "goal") if column == "prompt" else ""
        prompts.append(SafetyPrompt(name, prompt, category, _label(row, "family"), goal))
    return prompts


def _prompt_column(place: str, names: Iterable[str]) -> str:
    normalized = {name.strip().lower() for name in names}
    column = next((c for c in PROMPT_COLUMNS if c in normalized), None)
    if column is None:
        cause = f"the prompt must be named one of {', '.join(PROMPT_COLUMNS)}"
        raise UserError(cause, f"the names here are {', '.join(names) or 'none'}", place)
    return column


def _label(row: dict[str, Any], name: str) -> str:
    """An optional cell as text: ids are often numbers, and 0 is one."""
    value = row.get(name)
    return "" if value is None else str(value)


def _read_utf8(path: Path) -> str:
    with open_data(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"the file has more than {MAX_BYTES >> 20} MB", "divide it", path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}") from None


def _read_csv(path: Path) -> Iterator[Row]:
    # newline="" leaves line ends to the csv module; strict, lest an unclosed quote swallow the rest of the file.
    reader = csv.reader(io.StringIO(_read_utf8(path), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                # One word above a single column is its name, not a prompt.
                if len(cells) > 1 or re.fullmatch(r"\s*\w+\s*", cells[0]):
                    _prompt_column(place, cells)
                    header = cells
                    continue
                header = [PROMPT_COLUMNS[0]]
            if len(cells) != len(header):
                cause = f"{len(cells)} cells, not {len(header)}"
                raise UserError(cause, "put double quotes around text with commas", place)
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        remedy = "correct the quotes of the row that begins here"
        raise UserError(f"not valid CSV ({error})", remedy, f"{path}:{line}") from None


def _read_json(path: Path) -> Iterator[Row]:
    text = _read_utf8(path)
    try:
        rows = parse_json(text) if text.strip() else []
    except ValueError as error:
        cause = f"not valid JSON ({json_mistake(error)})"
        raise UserError(cause, "the file holds one list", f"{path}:{getattr(error, 'lineno', 1)}") from None
    start = 0
    if isinstance(rows, dict) and isinstance(rows.get("jailbreaks"), list):  # JailbreakBench's published artifacts
        rows, start = rows["jailbreaks"], text.index('"jailbreaks"')
    if not isinstance(rows, list):
        remedy = "put the objects in [ ], or one a line in a .jsonl file"
        raise UserError("the file is not a JSON list", remedy, f"{path}:1")
    # json gives no line numbers, so the elements are decoded once more, each from where the one before it ends.
    decoder, element = json.JSONDecoder(), re.compile(r"[^\s,]")
    end = text.index("[", start) + 1 if rows else 0
    counted, line = 0, 1
    for row in rows:
        found = element.search(text, end)
        assert found is not None
        line += text.count("\n", counted, found.start())
        counted = found.start()
        yield f"{path}:{line}", check_object(row, f"{path}:{line}")
        end = decoder.raw_decode(text, counted)[1]


def _read_txt(path: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(_read_utf8(path), newline=None), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line.rstrip("\n")}


_READERS: dict[str, Callable[[Path], Iterator[Row]]]
_READERS = {".csv": _read_csv, ".jsonl": read_jsonl, ".json": _read_json, ".txt": _read_txt}
