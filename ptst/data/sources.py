"""Named data sources to conversations: the built-in word problems, GSM8K, and any JSONL, JSON, CSV or Parquet file.

Rows may be question/answer, instruction/input/output, prompt/response, or messages; `system` or `system_prompt` is
taken where a row has one. Files are read by the `datasets` library, into memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ptst.data.word_problems import generate
from ptst.text.segments import Conversation, Message

DEFAULT = "word-problems"
# Enough for one pass of the default run, and for its held-out measurements.
DEFAULT_COUNTS = {"train": 400, "validation": 32, "test": 100}
_SHAPES = (("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("prompt", "response"))
_SHAPES += (("prompt", "completion"),)
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Conversations with the template family they were written for. `name` is what the user asked for."""

    name: str
    family: str
    conversations: tuple[Conversation, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 over all messages in order: two runs with the same one read the same data."""
        digest = hashlib.sha256()
        for c in self.conversations:
            digest.update(json.dumps([[m.role, m.content] for m in c.messages]).encode() + b"\n")
        return digest.hexdigest()


def load(name: str, split: str = "train", limit: int | None = None, bad: list[str] | None = None) -> Source:
    """Read a source: `word-problems` (or `word-problems:N`), `gsm8k`, or a file.

    Raises ValueError for an unknown name, a file that cannot be read, and a row without the needed fields (file and
    line named). With `bad`, such rows are left out and their reasons noted there instead.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit is {limit}; at least 1 example is needed (leave --limit out for all)")
    base, _, count = name.partition(":")
    if base == DEFAULT:
        if count and not count.isdigit():
            raise ValueError(f"data {name!r}: after the colon stands the number of problems, as in {DEFAULT}:800")
        problems = generate(split, limit or int(count or DEFAULT_COUNTS[split]))
        rows = [
            Conversation((Message("user", p.question), Message("assistant", p.answer)), f"{DEFAULT}/{split}:{i}")
            for i, p in enumerate(problems, 1)
        ]
        return Source(name, "gsm8k", tuple(rows))
    if name == "gsm8k":
        return Source(name, "gsm8k", tuple(_gsm8k_from_hub(split, limit)))
    path = Path(name)
    if not path.exists():
        raise ValueError(f"there is no data {name!r}; give a file, {DEFAULT} (built in) or gsm8k (from the hub)")
    conversations = tuple(_from_file(path, limit, bad))
    worked = bool(conversations) and all("\n####" in c.messages[-1].content for c in conversations)
    return Source(name, "gsm8k" if worked else "plain", conversations)


def to_conversation(row: dict, source: str) -> Conversation:
    """One row as a conversation. Raises ValueError, naming `source`, for a row of no known shape."""
    messages: list[Message] = []
    present = {k for k, v in row.items() if v is not None}
    system = next((row[k] for k in ("system", "system_prompt") if k in present and row[k] != ""), None)
    if system is not None:
        messages.append(Message("system", _text(system, "system", source)))
    if "messages" in present:
        try:
            messages += [Message(m["role"], _text(m["content"], "content", source)) for m in row["messages"]]
        except (KeyError, TypeError):
            raise ValueError(f"{source}: messages must be a list of objects with role and content") from None
        return Conversation(tuple(messages), source)
    for ask, reply in _SHAPES:
        if ask in present and reply in present:
            user = _text(row[ask], ask, source)
            if ask == "instruction" and row.get("input"):
                user += "\n\n" + _text(row["input"], "input", source)
            messages += [Message("user", user), Message("assistant", _text(row[reply], reply, source))]
            return Conversation(tuple(messages), source)
    raise ValueError(
        f"{source}: the row has {', '.join(sorted(present)) or 'no fields'}; it needs question and answer, "
        "instruction and output, prompt and response, or messages"
    )


def _text(value: object, key: str, source: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{source}: {key} is {type(value).__name__}, not text")
    return value


def _from_file(path: Path, limit: int | None, bad: list[str] | None) -> Iterable[Conversation]:
    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown kind of file; use {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; it needs one row per example")
    lines = _line_numbers(path) if path.suffix == ".jsonl" else None
    rows = _rows(path, kind)
    count = 0
    for count, row in enumerate(rows, 1):
        # A CSV's header is line 1; Parquet has no lines, so its rows are counted.
        place = lines[count - 1] if lines else count + (kind == "csv")
        try:
            yield to_conversation(row, f"{path}:{place}")
        except ValueError as error:
            if bad is None:
                raise
            bad.append(str(error))
        if count == limit:
            return
    if not count:
        raise ValueError(f"{path} has no rows")


def _line_numbers(path: Path) -> list[int]:
    """Line number of every row of a JSONL file (blank lines are no rows), each checked to be an object."""
    numbers = []
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if not isinstance(json.loads(line), dict):
                        raise ValueError(f"{path}:{number}: the row is not an object in braces")
                    numbers.append(number)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number + 1}: not UTF-8 text") from None
    return numbers


def _rows(path: Path, kind: str) -> Iterable[dict]:
    import tempfile

    import datasets  # slow to import, so only where a file is read

    datasets.disable_progress_bars()
    read = {"json": datasets.Dataset.from_json, "csv": datasets.Dataset.from_csv}.get(
        kind, datasets.Dataset.from_parquet
    )
    # The library writes an Arrow copy; in a folder of its own it leaves nothing behind and is never stale.
    with tempfile.TemporaryDirectory() as cache:
        try:
            return read(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as {kind}: {reason}") from None


def _gsm8k_from_hub(split: str, limit: int | None) -> Iterable[Conversation]:
    import datasets

    part = "test" if split == "validation" else split
    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split=part)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"gsm8k could not be fetched from the hub ({type(error).__name__}); give its file instead, "
            "as in --data gsm8k/train.jsonl, or use the built-in --data word-problems"
        ) from None
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    return [to_conversation(row, f"gsm8k/{part}:{i}") for i, row in enumerate(rows, 1)]
