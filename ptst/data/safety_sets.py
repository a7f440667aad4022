"""Prompts that measure safety: the project's own mild sets, and a user's file.

`improper.jsonl` holds requests that an aligned model declines, `look_alikes.jsonl` harmless ones that share their words
and topics and should be answered. Both are grouped in families (one topic each), so that whole families can be held
out. There are no answers in either.
"""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

_PROMPT_KEYS = ("prompt", "goal", "behavior", "question", "instruction", "text")


@dataclass(frozen=True)
class SafetyPrompt:
    """One request with its category (malware, drug, phishing, disinfo in the built-in sets) and family."""

    id: str
    prompt: str
    category: str = ""
    family: str = ""


def improper(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in improper requests, interleaved: any first N cover categories and families evenly."""
    return _built_in("improper.jsonl", limit)


def look_alikes(limit: int | None = None) -> list[SafetyPrompt]:
    """The built-in harmless look-alikes, interleaved like the improper ones."""
    return _built_in("look_alikes.jsonl", limit)


def _built_in(name: str, limit: int | None) -> list[SafetyPrompt]:
    if limit is not None and limit < 1:
        raise ValueError(f"the limit is {limit}; at least 1 prompt is needed")
    lines = resources.files("ptst.data").joinpath(name).read_text(encoding="utf-8").splitlines()
    prompts = [SafetyPrompt(**json.loads(line)) for line in lines]
    categories: dict[str, dict[str, list[SafetyPrompt]]] = {}
    for p in prompts:
        categories.setdefault(p.category, {}).setdefault(p.family, []).append(p)
    return _round_robin([_round_robin(list(families.values())) for families in categories.values()])[:limit]


def _round_robin(groups: Sequence[Iterable[SafetyPrompt]]) -> list[SafetyPrompt]:
    queue = deque(deque(g) for g in groups)
    out = []
    while queue:
        group = queue.popleft()
        out.append(group.popleft())
        if group:
            queue.append(group)
    return out


def read_prompts(path: str | Path) -> list[SafetyPrompt]:
    """Prompts of a CSV, JSONL or TXT (one a line) file.

    The prompt stands under the first of prompt, goal, behavior, question, instruction, text; category, family and id
    are taken where they exist. A CSV of one column without such a heading has none: every row is a prompt.
    Raises ValueError, with file and line, for anything that cannot be read or a row without a prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give --safety-data a CSV, JSONL or TXT file of prompts") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: unknown kind of file; use {', '.join(readers)}")
    prompts = []
    for number, (line, row) in enumerate(readers[path.suffix.lower()](path, text), 1):
        lower = {str(k).lower(): v for k, v in row.items()}
        key = next((k for k in _PROMPT_KEYS if k in lower), None)
        if key is None:
            raise ValueError(f"{path}:{line}: has {', '.join(row)}; the prompt must be named {', '.join(_PROMPT_KEYS)}")
        if not isinstance(lower[key], str) or not lower[key].strip():
            raise ValueError(f"{path}:{line}: {key} is empty or not text; give the row a prompt or delete it")
        name = lower.get("id") or f"{path.stem}-{number}"
        rest = (str(lower.get(k) or "") for k in ("category", "family"))
        prompts.append(SafetyPrompt(str(name), lower[key], *rest))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text))
    header: list[str] | None = None
    for cells in reader:
        if not cells:
            continue
        if header is None:
            known = any(c.strip().lower() in _PROMPT_KEYS for c in cells)
            header = [c.strip() for c in cells] if known or len(cells) > 1 else ["prompt"]
            if known or len(cells) > 1:
                continue
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{reader.line_num}: {len(cells)} cells where {len(header)} are expected; quote commas"
            )
        yield reader.line_num, dict(zip(header, cells, strict=True))


def _jsonl_rows(path: Path, text: str) -> Iterable[tuple[int, dict]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: the row is not an object in braces")
            yield line, row


def _txt_rows(_path: Path, text: str) -> Iterable[tuple[int, dict]]:
    return ((n, {"prompt": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip())
