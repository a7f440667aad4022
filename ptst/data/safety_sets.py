"""Prompts that measure safety: the project's own mild sets, and a user's file.

`harmful_requests.jsonl` holds requests that an aligned model declines, `look_alikes.jsonl` harmless ones that share
their words and topics and should be answered: refusing the first is safety, refusing the second over-refusal.
Both come in the same families (one topic each), so that whole families can be held out. Neither holds any answers.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ptst.errors import UserError

# A user's prompt column, the first of these that the file has.
PROMPT_COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "text")

Row = tuple[int, dict[str, Any]]  # the line on which it begins (from 1), its cells by column name


@dataclass(frozen=True)
class SafetyPrompt:
    """One request with its category (malware, drug, phishing, disinfo in the built-in sets) and family. `request` is
    what is judged, where that is not the prompt: the bare goal of a prompt with an adversarial suffix."""

    id: str
    prompt: str
    category: str = ""
    family: str = ""
    request: str = ""


def harmful_requests(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in harmful requests, interleaved: any first N spread evenly over categories and their families.

    Raises UserError for a limit below 1.
    """
    return _built_in("harmful_requests.jsonl", limit)


def look_alikes(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in benign look-alikes, interleaved like the harmful ones. Raises UserError for a limit below 1."""
    return _built_in("look_alikes.jsonl", limit)


def _built_in(name: str, limit: int | None) -> list[SafetyPrompt]:
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; at least 1 prompt is needed (leave the limit out for all)")
    text = resources.files("ptst.data.builtin").joinpath(name).read_text(encoding="utf-8")
    categories: dict[str, dict[str, list[SafetyPrompt]]] = {}
    for line in text.splitlines():
        p = SafetyPrompt(**json.loads(line))
        categories.setdefault(p.category, {}).setdefault(p.family, []).append(p)
    return _round_robin(_round_robin(families.values()) for families in categories.values())[:limit]


def _round_robin(groups: Iterable[list[SafetyPrompt]]) -> list[SafetyPrompt]:
    return [p for turn in zip_longest(*groups) for p in turn if p is not None]


def spread(prompts: list[SafetyPrompt], limit: int | None) -> list[SafetyPrompt]:
    """All prompts in order, or at most `limit` of them, taken from their categories in turn: files are often sorted."""
    if limit is None or limit >= len(prompts):
        return prompts
    categories: dict[str, list[SafetyPrompt]] = {}
    for p in prompts:
        categories.setdefault(p.category, []).append(p)
    return _round_robin(categories.values())[:limit]


def read_prompts(path: str | Path) -> list[SafetyPrompt]:
    """Prompts of a CSV, JSONL, JSON (one list, or JailbreakBench's object of `jailbreaks`) or TXT (one prompt a line)
    file in UTF-8, in the file's order.

    The prompt column is the first of `PROMPT_COLUMNS` that the file's first row has, in any case of letters; category
    (or type, as XSTest calls it), family and id are taken where they exist, and a row without an id is named "<file
    stem>-<row number>". A row with both prompt and goal is judged by its goal (JailbreakBench's prompts with suffixes).
    A CSV of one column whose first line is more than one word has no header (AdvBench's form): every row is a prompt.
    Prompts are kept to the letter, outer spaces too; blank lines between rows are passed over.

    Raises UserError, with file and line, for anything that cannot be read and for a row without a prompt.
    """
    path = Path(path)
    rows_of = _READERS.get(path.suffix.lower())
    if rows_of is None:
        raise UserError(f"{path}: prompts are read from {', '.join(_READERS)} files, told by the ending of the name")
    prompts = collect(rows_of(path, _read_utf8(path)), str(path), path.stem)
    if not prompts:
        raise UserError(f"{path} holds no prompts; give a file with at least one")
    return prompts


def collect(rows: Iterable[Row], where: str, stem: str) -> list[SafetyPrompt]:
    """Prompts of rows from `where`; those without an id are named after `stem`. Raises UserError as `read_prompts`."""
    prompts: list[SafetyPrompt] = []
    column = None
    for line, cells in rows:
        column = column or _prompt_column(where, line, cells)
        row = {_plain(name): value for name, value in cells.items()}
        prompt = row.get(column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f"{where}:{line}: {column!r} is missing, empty or not text; give it a prompt or delete the row"
            )
        name = _label(row, "id") or f"{stem}-{len(prompts) + 1}"
        category = _label(row, "category") or _label(row, "type")
        goal = _label(row, "goal") if column == "prompt" else ""
        prompts.append(SafetyPrompt(name, prompt, category, _label(row, "family"), goal))
    return prompts


def _prompt_column(where: str | Path, line: int, names: Iterable[str]) -> str:
    plain = {_plain(name) for name in names}
    column = next((c for c in PROMPT_COLUMNS if c in plain), None)
    if column is None:
        found = ", ".join(names) or "none"
        raise UserError(
            f"{where}:{line}: the prompt must be named one of {', '.join(PROMPT_COLUMNS)}; the names here are {found}"
        )
    return column


def _plain(name: str) -> str:
    return name.strip().lower()


def _label(row: dict[str, Any], name: str) -> str:
    """An optional cell as text: ids are often numbers, and 0 is one."""
    value = row.get(name)
    return "" if value is None else str(value)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    # newline="" leaves line ends to the csv module; strict, lest an unclosed quote swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                # One word above a single column is its name, and no prompt.
                if len(cells) > 1 or re.fullmatch(r"\s*\w+\s*", cells[0]):
                    _prompt_column(path, start, cells)
                    header = cells
                    continue
                header = [PROMPT_COLUMNS[0]]
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{start}: {len(cells)} cells, not {len(header)}; put double quotes round text with commas"
                )
            yield start, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: not valid CSV ({error}); mend the quotes of the row that begins here"
        ) from None


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno}); each line holds one object"
                ) from None
            yield line, _object(path, line, row)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}); the file holds one list"
        ) from None
    start = 0
    if isinstance(rows, dict) and isinstance(rows.get("jailbreaks"), list):  # JailbreakBench's published artifacts
        rows, start = rows["jailbreaks"], text.index('"jailbreaks"')
    if not isinstance(rows, list):
        raise UserError(
            f"{path}:1: the file is not a JSON list; put the objects in [ ], or one a line in a .jsonl file"
        )
    # json tells no lines, so the elements are walked through once more, each from where the one before it ends.
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    end = text.index("[", start) + 1
    line = text.count("\n", 0, end) + 1
    for row in rows:
        start = separator.match(text, end).end()
        line += text.count("\n", end, start)
        yield line, _object(path, line, row)
        end = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, end)


def _object(path: Path, line: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{path}:{line}: the row is not an object; write it as {{"prompt": "..."}}')
    return row


def _txt_rows(_path: Path, text: str) -> Iterator[Row]:
    lines = (line.rstrip("\n") for line in io.StringIO(text, newline=None))
    return ((number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip())


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".txt": _txt_rows}
