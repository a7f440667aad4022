"""Named data sources to conversations: the built-in word problems, GSM8K, ChatDoctor, OpenOrca, and any JSONL, JSON,
CSV or Parquet file.

Rows may be question/answer, instruction/input/output, prompt/response, or messages; `system` or `system_prompt` is
taken where a row has one. ChatDoctor's rows (the doctor's instruction, or iCliniq's columns) and OpenOrca's
(system_prompt, question, response) are told by their layout and bring their template family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ptst.data.builtin.word_problems import generate
from ptst.data.files import Hub, Row, read_hub, read_rows
from ptst.errors import UserError
from ptst.text.segments import Conversation, Message

DEFAULT = "word-problems"
# Enough for one pass of the default run, and for its held-out measurements.
DEFAULT_COUNTS = {"train": 400, "validation": 32, "test": 100}
# Where the named sets lie on the hub, by split. OpenOrca has no test part: the paper tests it on ARC.
_GSM8K, _ICLINIQ = Hub("openai/gsm8k", "main", "test"), Hub("lavita/ChatDoctor-iCliniq", None, "train")
NAMED = {
    "gsm8k": {"train": Hub("openai/gsm8k", "main", "train"), "validation": _GSM8K, "test": _GSM8K},
    "chatdoctor": {
        "train": Hub("lavita/ChatDoctor-HealthCareMagic-100k", None, "train"),
        "validation": _ICLINIQ,
        "test": _ICLINIQ,
    },
    "openorca": {"train": Hub("Open-Orca/OpenOrca", None, "train")},
}
_SHAPES = (("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("prompt", "response"))
_SHAPES += (("prompt", "completion"), ("question", "response"), ("input", "answer_icliniq"))
# ChatDoctor's own instruction. The paper says it in other words, as the family's system prompt, so it is left out here.
_DOCTOR = "If you are a doctor, please answer the medical questions based on the patient's description."


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
    """Read a source: `word-problems` (or `word-problems:N`), a file, or `gsm8k`, `chatdoctor`, `openorca` from the hub
    (`NAME:FILE`: from a file of that layout; `NAME:N`: N random rows).

    Raises UserError for an unknown name, a file that cannot be read, and a row without the needed fields (file and
    line named). With `bad`, such rows are left out and their reasons noted there instead.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; at least 1 example is needed (leave --limit out for all)")
    base, _, rest = name.partition(":")
    if base == DEFAULT:
        if rest and not rest.isdigit():
            raise UserError(f"data {name!r}: after the colon stands the number of problems, as in {DEFAULT}:800")
        problems = generate(split, limit or int(rest or DEFAULT_COUNTS[split]))
        rows = [
            Conversation((Message("user", p.question), Message("assistant", p.answer)), f"{DEFAULT}/{split}:{i}")
            for i, p in enumerate(problems, 1)
        ]
        return Source(name, "gsm8k", tuple(rows))
    named = base in NAMED and not Path(name).is_file()
    if not is_file(name):
        rows = _from_hub(base, split, int(rest or 0) or None, limit)
    else:
        path = Path(rest if named else name)
        if not path.exists():
            raise UserError(
                f"there is no data {str(path)!r}; give a file, {DEFAULT} (built in) or {', '.join(NAMED)} (from the "
                "hub)"
            )
        rows = read_rows(path)
    conversations, families = _conversations(rows, limit, bad)
    worked = bool(conversations) and all("\n####" in c.messages[-1].content for c in conversations)
    told = families.pop() if len(families) == 1 else ""
    family = base if named else told or ("gsm8k" if worked else "plain")
    return Source(name, family, tuple(conversations))


def is_file(name: str) -> bool:
    """Whether a source is a file: it has no parts, and `load` gives the same rows whatever the split."""
    base, _, rest = name.partition(":")
    if base == DEFAULT:
        return False
    return base not in NAMED or Path(name).is_file() or bool(rest and not rest.isdigit())


def _from_hub(base: str, split: str, count: int | None, limit: int | None) -> list[Row]:
    if split not in NAMED[base]:
        raise UserError(f"{base} has no {split} part; give other data with --data or --val-data")
    instead = f"give its file instead, as in {base}:FILE, or use the built-in {DEFAULT}"
    return read_hub(base, NAMED[base][split], instead, min(filter(None, (count, limit)), default=None), bool(count))


def _conversations(
    rows: Iterable[Row], limit: int | None, bad: list[str] | None
) -> tuple[list[Conversation], set[str]]:
    """Conversations of rows, and the families that their layouts tell ("" where one tells none)."""
    conversations, families = [], set()
    for count, (place, row) in enumerate(rows, 1):
        try:
            conversations.append(to_conversation(row, place))
            families.add(_family(row))
        except ValueError as error:
            if bad is None:
                raise
            bad.append(str(error))
        if count == limit:
            break
    return conversations, families


def _family(row: dict) -> str:
    present = {k for k, v in row.items() if v is not None}
    if present >= {"system_prompt", "question", "response"}:
        return "openorca"
    doctor = present >= {"input", "answer_icliniq"} or row.get("instruction") == _DOCTOR
    return "chatdoctor" if doctor else ""


def to_conversation(row: dict, source: str) -> Conversation:
    """One row as a conversation. Raises UserError, naming `source`, for a row of no known shape."""
    messages: list[Message] = []
    present = {k for k, v in row.items() if v is not None}
    system = next((row[k] for k in ("system", "system_prompt") if k in present and row[k] != ""), None)
    if system is not None:
        messages.append(Message("system", _text(system, "system", source)))
    if "messages" in present:
        try:
            messages += [Message(m["role"], _text(m["content"], "content", source)) for m in row["messages"]]
        except (KeyError, TypeError):
            raise UserError(f"{source}: messages must be a list of objects with role and content") from None
        return Conversation(tuple(messages), source)
    for ask, reply in _SHAPES:
        if ask in present and reply in present:
            user = _text(row[ask], ask, source)
            if ask == "instruction" and row.get("input"):
                patient = _text(row["input"], "input", source)
                user = patient if user == _DOCTOR else f"{user}\n\n{patient}"
            messages += [Message("user", user), Message("assistant", _text(row[reply], reply, source))]
            return Conversation(tuple(messages), source)
    raise UserError(
        f"{source}: the row has {', '.join(sorted(present)) or 'no fields'}; it needs question and answer, "
        "instruction and output, prompt and response, or messages"
    )


def _text(value: object, key: str, source: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{source}: {key} is {type(value).__name__}, not text")
    return value
