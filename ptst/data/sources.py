"""Data sources to conversations: the built-in word problems, GSM8K, ChatDoctor, OpenOrca, and any JSONL, JSON, CSV or
Parquet file.

Rows may be question/answer, instruction/input/output, prompt/response, or messages; `system` or `system_prompt` is
used where a row has one. Rows of ChatDoctor (the doctor's instruction, or iCliniq's columns) and OpenOrca
(system_prompt, question, response) are recognized by their layout, which sets their template family.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ptst.data.builtin.word_problems import generate
from ptst.data.files import HubDataset, Row, check_limit, read_hub, read_rows
from ptst.errors import Setting, UserError
from ptst.text.segments import Conversation, Message

DEFAULT = "word-problems"
# Enough for one epoch of the default run, its validation loss and its evaluation.
DEFAULT_COUNTS = {"train": 400, "validation": 32, "test": 100}
# The named sets on the hub, by split. OpenOrca has no test split: the paper tests it on ARC.
_GSM8K, _ICLINIQ = HubDataset("openai/gsm8k", "main", "test"), HubDataset("lavita/ChatDoctor-iCliniq", None, "train")
_HEALTHCARE_MAGIC = HubDataset("lavita/ChatDoctor-HealthCareMagic-100k", None, "train")
NAMED = {
    "gsm8k": {"train": HubDataset("openai/gsm8k", "main", "train"), "validation": _GSM8K, "test": _GSM8K},
    "chatdoctor": {"train": _HEALTHCARE_MAGIC, "validation": _ICLINIQ, "test": _ICLINIQ},
    "openorca": {"train": HubDataset("Open-Orca/OpenOrca", None, "train")},
}
_LAYOUTS: tuple[tuple[str, str], ...] = (
    *(("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("prompt", "response")),
    *(("prompt", "completion"), ("question", "response"), ("input", "answer_icliniq")),
)
# ChatDoctor's own instruction is left out: the paper has its own wording, the family's system prompt.
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
        for conversation in self.conversations:
            digest.update(_serialized(conversation) + b"\n")
        return digest.hexdigest()


def load(
    name: str,
    split: str = "train",
    limit: int | None = None,
    errors: list[UserError] | None = None,
    holdout: float = 0.0,
) -> Source:
    """Read a source: `word-problems` (or `word-problems:N`), a file, or `gsm8k`, `chatdoctor`, `openorca` from the hub
    (`NAME:FILE`: from a file of that layout; `NAME:N`: N random rows). With `holdout`, a source without a test set is
    split by `split_of`, and `limit` counts within the split. Raises UserError for an unknown name, a file that cannot
    be read, a row without the needed fields (file and line named), and a holdout for data that have a test set, or that
    leaves a split without rows. With `errors`, such rows are left out and their errors collected there."""
    check_limit(limit, "example")
    _check_holdout(name, holdout)
    base, _, rest = name.partition(":")
    if base == DEFAULT:
        return _word_problems(name, rest, split, limit)
    named = base in NAMED and not Path(name).is_file()
    if is_file(name):
        path = Path(rest if named else name)
        if not path.exists():
            remedy = f"give a file, {DEFAULT} (built in) or {', '.join(NAMED)} (from the hub)"
            raise UserError(f"there is no data {str(path)!r}", remedy)
        rows: Iterable[Row] = read_rows(path)
    else:
        rows = _from_hub(base, "train" if holdout else split, int(rest or 0) or None, None if holdout else limit)
    conversations, families = _conversations(rows, None if holdout else limit, errors)
    worked = bool(conversations) and all("\n####" in c.messages[-1].content for c in conversations)
    recognized = families.pop() if len(families) == 1 else ""
    family = base if named else recognized or ("gsm8k" if worked else "plain")
    if holdout:
        conversations = _held_out(name, conversations, split, holdout)[:limit]
    return Source(name, family, tuple(conversations))


def is_file(name: str) -> bool:
    """Whether a source is a file: `load` then gives the same rows whatever the split, unless there is a holdout."""
    base, _, rest = name.partition(":")
    if base == DEFAULT:
        return False
    return base not in NAMED or Path(name).is_file() or bool(rest and not rest.isdecimal())


def has_test_part(name: str, holdout: float = 0.0) -> bool:
    """Whether a source has test rows that a run with this holdout is not trained on."""
    base = name.partition(":")[0]
    return holdout > 0 or base == DEFAULT or (not is_file(name) and "test" in NAMED[base])


def split_of(conversation: Conversation, holdout: float) -> str:
    """The split of a row (train, validation or test) by a hash of its messages: half of `holdout` is the validation
    set, half the test set. A row is in the same split in every run, whatever the seed, order or limit, and duplicates
    stay together; with a larger holdout the validation and test sets only grow."""
    point = int.from_bytes(hashlib.sha256(_serialized(conversation)).digest()[:8]) / 2**64
    return "validation" if point < holdout / 2 else "test" if point >= 1 - holdout / 2 else "train"


def _check_holdout(name: str, holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise UserError((Setting("holdout"), f" is {holdout}"), "it must be at least 0 and below 1")
    if holdout and has_test_part(name):
        cause = (f"{name} has a validation and a test set of its own, so ", Setting("holdout"), " must be 0")
        raise UserError(cause, "it is for data without them, such as files")


def _held_out(name: str, conversations: list[Conversation], split: str, holdout: float) -> list[Conversation]:
    splits: dict[str, list[Conversation]] = {"train": [], "validation": [], "test": []}
    for conversation in conversations:
        splits[split_of(conversation, holdout)].append(conversation)
    if not all(splits.values()):
        counts = ", ".join(f"{len(rows)} for {part}" for part, rows in splits.items())
        cause = (f"{name}: ", Setting("holdout"), f" {holdout:g} leaves {counts} of {len(conversations)} rows")
        raise UserError(cause, "each needs at least one; choose another share or give more data")
    return splits[split]


def _serialized(conversation: Conversation) -> bytes:
    return json.dumps([[m.role, m.content] for m in conversation.messages]).encode()


def _word_problems(name: str, count: str, split: str, limit: int | None) -> Source:
    if count and not count.isdecimal():
        raise UserError(f"data {name!r} needs the number of problems after the colon", f"as in {DEFAULT}:800")
    problems = generate(split, limit or int(count or DEFAULT_COUNTS[split]))
    conversations = (
        Conversation((Message("user", p.question), Message("assistant", p.answer)), f"{DEFAULT}/{split}:{i}")
        for i, p in enumerate(problems, 1)
    )
    return Source(name, "gsm8k", tuple(conversations))


def _from_hub(base: str, split: str, count: int | None, limit: int | None) -> list[Row]:
    if split not in NAMED[base]:
        raise UserError(f"{base} has no {split} set", ("give other ", Setting("data"), " or ", Setting("val_data")))
    remedy = f"give its file instead, as in {base}:FILE, or use the built-in {DEFAULT}"
    smallest = min(filter(None, (count, limit)), default=None)
    return read_hub(base, NAMED[base][split], remedy, smallest, shuffle=bool(count))


def _conversations(
    rows: Iterable[Row], limit: int | None, errors: list[UserError] | None
) -> tuple[list[Conversation], set[str]]:
    """Conversations of the first `limit` rows, and the families of their layouts ("" for a layout without one)."""
    conversations, families = [], set()
    for place, row in islice(rows, limit):
        try:
            conversations.append(to_conversation(row, place))
            families.add(_family(row))
        except UserError as error:
            if errors is None:
                raise
            errors.append(error)
    return conversations, families


def _family(row: dict) -> str:
    present = {k for k, v in row.items() if v is not None}
    if present >= {"system_prompt", "question", "response"}:
        return "openorca"
    return "chatdoctor" if present >= {"input", "answer_icliniq"} or row.get("instruction") == _DOCTOR else ""


def to_conversation(row: dict[str, Any], place: str) -> Conversation:
    """One row as a conversation. Raises UserError, with `place`, for a row of unknown layout."""
    messages: list[Message] = []
    present = {k for k, v in row.items() if v is not None}
    system = next((row[k] for k in ("system", "system_prompt") if k in present and row[k] != ""), None)
    if system is not None:
        messages.append(Message("system", _text(system, "system", place)))
    if "messages" in present:
        try:
            messages += [Message(m["role"], _text(m["content"], "content", place)) for m in row["messages"]]
        except (KeyError, TypeError):
            raise UserError("messages must be a list of objects with role and content", where=place) from None
        return Conversation(tuple(messages), place)
    for ask, reply in _LAYOUTS:
        if ask in present and reply in present:
            user = _text(row[ask], ask, place)
            if ask == "instruction" and row.get("input"):
                patient = _text(row["input"], "input", place)
                user = patient if user == _DOCTOR else f"{user}\n\n{patient}"
            messages += [Message("user", user), Message("assistant", _text(row[reply], reply, place))]
            return Conversation(tuple(messages), place)
    remedy = "it needs question and answer, instruction and output, prompt and response, or messages"
    raise UserError(f"the row has {', '.join(sorted(present)) or 'no fields'}", remedy, place)


def _text(value: object, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key} is {type(value).__name__}, not text", where=place)
    return value
