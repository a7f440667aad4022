"""Rules and counts of a whole data set: role markers, blanks, duplicates, overlap, lengths, packing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptst.audit.findings import Finding
from ptst.data.examples import ExampleCounts
from ptst.data.packing import Batch
from ptst.data.sources import Source
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message


def check_rows(conversations: Sequence[Conversation], prompt_format: PromptFormat) -> Iterator[Finding]:
    """Rules on the messages: role markers of the chat format, blank turns, duplicates."""
    first: dict[tuple[Message, ...], str] = {}
    for conversation in conversations:
        for cause in prompt_format.forged_markers(conversation):
            yield Finding("role-markers", conversation.source, cause)
        for number, message in enumerate(conversation.messages, 1):
            if not message.content.strip() and message.role != "system":
                rule = "blank-answer" if message.role == "assistant" else "blank-prompt"
                cause = f"message {number} ({message.role}) is {message.content!r}"
                yield Finding(rule, conversation.source, cause)
        if conversation.messages in first:
            yield Finding("duplicate", conversation.source, f"the same as {first[conversation.messages]}")
        first.setdefault(conversation.messages, conversation.source)


def check_overlap(conversations: Sequence[Conversation], asked: Mapping[str, str]) -> Iterator[Finding]:
    """Training questions among `asked`: test texts (`normalized`), with the name of the set that each is from."""
    for conversation in conversations:
        for message in conversation.messages:
            name = asked.get(normalized(message.content)) if message.role == "user" and asked else None
            if name is not None:
                yield Finding("overlap", conversation.source, f"this question is also in {name}")


def normalized(text: str) -> str:
    """Text without case, extra whitespace and punctuation at its ends."""
    return " ".join(text.lower().split()).strip(".?! ")


def count(
    source: Source,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    prepared: ExampleCounts,
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """Counts of what reaches training. Lengths in tokens."""
    lengths = [len(e.ids) for e in examples]
    capacity = sum(max(micro_batch_tokens, len(b.tokens)) for b in batches)
    tokens = sum(lengths)
    return {
        **{k: v for k, v in prepared.to_json().items() if k not in ("first_lossy", "encoding")},
        "shortest": min(lengths, default=0),
        "median_length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "trained_share": prepared.trained_tokens / tokens if tokens else 0.0,
        "micro_batch_tokens": micro_batch_tokens,
        "packing_fill": tokens / capacity if capacity else 0.0,
        "distinct_rows": len({c.messages for c in source.conversations}),
    }
