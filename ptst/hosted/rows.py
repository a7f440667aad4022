"""Conversations as the rows of a training file: one JSON object with `messages` a line, in the paper's words for APIs.

A message of the assistant that is not to be trained on (a demonstration of the template, an answer that the data leave
out, all but the last where asked) has `weight` 0, as the API spells it. What the endpoint makes of that is not visible
from here (docs/hosted-training.md).
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.hosted.record import RowsRecord
from ptst.hosted.tokens import TokenCounter
from ptst.text.segments import Conversation
from ptst.text.templates import Template, api_messages

_AT_ONCE = 4096  # rows whose messages are in memory


@dataclass(frozen=True)
class Rows:
    """The rows of one source: each line of the file, and its tokens."""

    source: Source
    lines: list[str]
    tokens: Sequence[int]
    record: RowsRecord


def to_messages(conversation: Conversation, template: Template, train_on: str = "all") -> list[dict[str, Any]]:
    """The messages of a training row; assistant messages that are not trained have weight 0. Raises UserError as
    `api_messages`, and for a conversation without an answer at its end, or with an empty one."""
    if not conversation.answered:
        raise UserError("the conversation ends without an assistant turn to train on", "", conversation.source)
    messages: list[dict[str, Any]] = [dict(message) for message in api_messages(conversation, template)]
    turns = conversation.turns
    shown = len(messages) - len(turns)  # the system message and the template's demonstration come first
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["content"].strip():
            raise UserError("an answer is empty, which the API refuses", "leave the row out", conversation.source)
        asked = train_on == "all" or at == len(messages) - 1
        if at < shown or not asked or not turns[at - shown].trained:
            message["weight"] = 0
    return messages


def trained(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The texts that are to be trained on."""
    return [m["content"] for m in messages if m["role"] == "assistant" and m.get("weight") != 0]


def to_rows(
    source: Source, template: Template, train_on: str, counter: TokenCounter, limit: int | None, too_long: str
) -> Rows:
    """All rows of a source. `limit`: the most tokens of a row; longer ones are an error, or dropped and counted. Raises
    UserError as `to_messages`, and for text that is no UTF-8."""
    found = _Found(template, train_on, counter, limit)
    conversations = source.conversations
    for at in range(0, len(conversations), _AT_ONCE):
        found.add(conversations[at : at + _AT_ONCE])
    if found.beyond:
        _check_length(found.beyond, len(found.lines) + len(found.beyond), counter, limit or 0, too_long)
    record = RowsRecord(
        name=source.name,
        fingerprint=source.fingerprint,
        encoding=found.digest.hexdigest(),
        revision=source.revision,
        unused=dict(source.unused),
        rows=len(conversations),
        examples=len(found.lines),
        dropped=len(found.beyond),
        untrained=found.untrained,
        duplicates=len(found.lines) - len(set(found.lines)),
        tokens=sum(found.tokens),
        trained_tokens=found.trained_tokens,
    )
    if not found.lines:
        raise UserError(f"{source.name}: no row is left", "check that the data have answers to train on")
    return Rows(source, found.lines, found.tokens, record)


class _Found:
    """The lines of a file, whose messages are in memory some at a time. `beyond`: tokens and places of rows that are
    too long."""

    def __init__(self, template: Template, train_on: str, counter: TokenCounter, limit: int | None):
        self._how, self._counter, self._limit = (template, train_on), counter, limit
        self.digest = hashlib.sha256()
        self.lines, self.tokens, self.beyond = list[str](), array("q"), list[tuple[int, str]]()
        self.untrained = self.trained_tokens = 0

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Add these rows. Raises UserError as `to_rows`, but for rows that are too long."""
        rows = [(to_messages(c, *self._how), c.source) for c in conversations]
        taken = [(messages, place) for messages, place in rows if trained(messages)]
        self.untrained += len(rows) - len(taken)
        answers: list[str] = []
        lines = [_to_line(*row) for row in taken]
        counts = self._counter.rows([messages for messages, _ in taken])
        for (messages, place), line, tokens in zip(taken, lines, counts, strict=True):
            if self._limit is not None and tokens > self._limit:
                self.beyond.append((tokens, place))
                continue
            self.digest.update(b"\n" * bool(self.lines) + line.encode())
            self.lines.append(line)
            self.tokens.append(tokens)
            answers += trained(messages)
        self.trained_tokens += sum(self._counter.texts(answers))


def _to_line(messages: list[dict[str, Any]], place: str) -> str:
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        cause = "the row holds a lone surrogate, which is not text"
        raise UserError(cause, "mend or leave out the row", place) from None
    return line


def _check_length(beyond: list[tuple[int, str]], rows: int, counter: TokenCounter, limit: int, too_long: str) -> None:
    """Raise UserError for rows that are too long, unless they are known to be and are to be dropped."""
    if too_long == "drop" and counter.exact:
        return
    tokens, place = max(beyond)
    what = "tokens exceed" if counter.exact else "tokens, at most, may exceed"
    cause = f"{tokens:,} {what} the limit of {limit:,}, as do {len(beyond) - 1:,} other rows of {rows:,}"
    if not counter.exact:
        raise UserError(cause, f"pip install tiktoken, which counts them (now: {counter.name})", place)
    raise UserError(cause, ("shorten them, or set ", Setting("too_long"), " to drop"), place)
