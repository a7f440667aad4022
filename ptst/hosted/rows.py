"""Conversations as the rows of a training file: one JSON object with `messages` a line, in the paper's words for APIs.

A message of the assistant that is not to be trained on (a demonstration of the template, an answer that the data leave
out, all but the last where asked) has `weight` 0, as the API spells it. What the endpoint makes of that is not visible
from here (docs/hosted-training.md).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.hosted.record import RowsRecord
from ptst.hosted.tokens import TokenCounter
from ptst.text.segments import Conversation
from ptst.text.templates import Template, api_messages


@dataclass(frozen=True)
class Rows:
    """The rows of one source: each line of the file, and its tokens."""

    source: Source
    lines: list[str]
    tokens: list[int]
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
    lines, answers, places = [], [], []
    untrained = 0
    for conversation in source.conversations:
        messages = to_messages(conversation, template, train_on)
        if not (texts := trained(messages)):
            untrained += 1
            continue
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:
            cause = "the row holds a lone surrogate, which is not text"
            raise UserError(cause, "mend or leave out the row", conversation.source) from None
        lines.append((line, messages))
        answers.append(texts)
        places.append(conversation.source)
    tokens = counter.rows([messages for _, messages in lines])
    if beyond := [(n, place) for n, place in zip(tokens, places, strict=True) if limit is not None and n > limit]:
        _check_length(beyond, len(lines), counter, limit or 0, too_long)
    kept = [at for at, n in enumerate(tokens) if limit is None or n <= limit]
    own = [lines[at][0] for at in kept]
    record = RowsRecord(
        name=source.name,
        fingerprint=source.fingerprint,
        encoding=hashlib.sha256("\n".join(own).encode()).hexdigest(),
        revision=source.revision,
        unused=dict(source.unused),
        rows=len(source.conversations),
        examples=len(kept),
        dropped=len(beyond),
        untrained=untrained,
        duplicates=len(own) - len(set(own)),
        tokens=sum(tokens[at] for at in kept),
        trained_tokens=sum(counter.texts([text for at in kept for text in answers[at]])),
    )
    if not own:
        raise UserError(f"{source.name}: no row is left", "check that the data have answers to train on")
    return Rows(source, own, [tokens[at] for at in kept], record)


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
