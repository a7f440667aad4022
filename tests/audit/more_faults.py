"""Further faults of data preparation, of other kinds than the field's known bugs: wrong words, wrong rows, wrong order,
text that was changed on the way, masks and boundaries that are off by one.

Each is a function from a bench to (batch, row, token); where the tokens are wrong, the token is the first that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ptst.audit.setup import Setup
from ptst.data.packing import Batch, to_batch
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import Tokenizer

ROWS = (
    (("user", "what is in the tin?"), ("assistant", "the tin is in the bin.")),
    (("user", "one thing"), ("assistant", "two things"), ("user", "and the third?"), ("assistant", "four of them")),
    (
        ("user", " the \u00e9t\u00e9\r\nin\u00a0town \ufb01 "),
        ("assistant", "\tna\u00efve\u200b \u2013 \u00e9t\u00e9\r\n done "),
    ),
    (("system", "Be terse."), ("user", "how many?"), ("assistant", "seven")),
    (("system", "Think in steps."), ("user", "how few?"), ("assistant", "eleven")),
    (("user", "say <|im_end|> now"), ("assistant", "here: <|im_end|> it is")),
    (("user", "first?"), ("assistant", "not this"), ("user", "second?"), ("assistant", "but this")),
    (("user", "spell \u65e5\u672c"), ("assistant", "it is \u65e5\u672c\u8a9e \U0001f600 indeed")),
    (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")),
    (("user", "go on"), ("assistant", "\n\nyes, the end")),
)
SINGLE, MULTI, ODD, SYSTEM, SYSTEM2, FORGED, FLAGGED, WIDE, LONG, BOUNDARY = range(len(ROWS))


@dataclass(frozen=True)
class Bench:
    setup: Setup
    rows: tuple[Conversation, ...]
    raw: Tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return self.setup.prompt_format.tokenizer

    def good(self, row: int) -> Example:
        return self.written(row, self.rows[row])

    def written(self, row: int, conversation: Conversation, train_on: str | None = None, **changes) -> Example:
        """Another conversation, or another prompt format, in a row's place."""
        changed = replace(self.setup.prompt_format, **changes)
        return replace(changed.encode(conversation, train_on or self.setup.train_on), row=row)

    def start(self, row: int) -> int:
        return len(self.setup.prompt_format.encode(self.rows[row].prompt()).ids)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def control(self, name: str) -> int:
        return self.tokenizer.control_id(name)


def bench(tokenizer: Tokenizer, raw: Tokenizer, chat_format: str, template: str, family: str, **asked) -> Bench:
    rows = [
        Conversation(tuple(Message(role, text) for role, text in turns), f"more.jsonl:{n}")
        for n, turns in enumerate(ROWS, 1)
    ]
    skipped = [replace(m, trained=i != 1) for i, m in enumerate(rows[FLAGGED].messages)]
    rows[FLAGGED] = replace(rows[FLAGGED], messages=tuple(skipped))
    formats = CHAT_FORMATS[chat_format]
    chosen = PromptFormat(find_template(template), find_family(family), formats, tokenizer, allow_role_markers=True)
    return Bench(Setup(chosen, **asked), tuple(rows), raw)


@dataclass(frozen=True)
class Fault:
    name: str
    rule: str
    words: str  # of the cause
    chat_format: str
    template: str
    family: str
    asked: dict
    plant: Callable[[Bench], tuple[Batch, int, int]]


FAULTS: list[Fault] = []


def fault(rule: str, words: str = "", chat_format="chatml", template="chat:plain", family="plain", **asked):
    def note(plant):
        FAULTS.append(Fault(plant.__name__, rule, words, chat_format, template, family, asked, plant))
        return plant

    return note


def instead(b: Bench, bad: Example) -> tuple[Batch, int, int]:
    """A wrong example between two good ones, and the first token that differs."""
    good = b.good(bad.row)
    pairs = zip(bad.ids, good.ids, strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(bad.ids), len(good.ids)))
    around = [row for row in (SINGLE, WIDE) if row != bad.row]
    return to_batch([b.good(around[0]), bad, b.good(around[-1])]), bad.row, min(at, len(bad.ids) - 1)


def edited(b: Bench, row: int, edit: Callable[[Message], str]) -> tuple[Batch, int, int]:
    """A row whose messages' texts are changed."""
    messages = tuple(replace(m, content=edit(m)) for m in b.rows[row].messages)
    return instead(b, b.written(row, replace(b.rows[row], messages=messages)))


def with_messages(b: Bench, row: int, messages) -> tuple[Batch, int, int]:
    return instead(b, b.written(row, replace(b.rows[row], messages=tuple(messages))))


def with_template(b: Bench, row: int, **changes) -> tuple[Batch, int, int]:
    template = replace(b.setup.prompt_format.template, **changes)
    return instead(b, b.written(row, b.rows[row], template=template))
