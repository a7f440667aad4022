"""Rules and counts over a whole data set: marks, blanks, duplicates, overlap, lengths, packing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ptst.audit.findings import Finding
from ptst.data.packing import Batch
from ptst.data.sources import Source
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation


def check_rows(conversations: Sequence[Conversation], prompt_format: PromptFormat) -> Iterator[Finding]:
    """Rules on the messages themselves: role markers of the active format, blank turns, duplicates."""
    first: dict[tuple, str] = {}
    for conversation in conversations:
        for number, message in enumerate(conversation.messages, 1):
            place = f"message {number} ({message.role})"
            for marker in prompt_format.role_markers:
                if marker in message.content:
                    cause = f"{place} holds {marker}, a role marker of {prompt_format.chat_format.name}"
                    yield Finding("role-markers", conversation.source, cause)
            if not message.content.strip() and message.role != "system":
                rule = "blank-answer" if message.role == "assistant" else "blank-prompt"
                yield Finding(rule, conversation.source, f"{place} is {message.content!r}")
        if conversation.messages in first:
            yield Finding("duplicate", conversation.source, f"the same as {first[conversation.messages]}")
        first.setdefault(conversation.messages, conversation.source)


def check_overlap(conversations: Sequence[Conversation], asked: dict[str, str]) -> Iterator[Finding]:
    """`asked`: texts that are asked at test time, as `plain` makes them, with the name of the set each is from."""
    for conversation in conversations:
        for message in conversation.messages:
            if message.role == "user" and plain(message.content) in asked:
                cause = f"this question is also in {asked[plain(message.content)]}"
                yield Finding("overlap", conversation.source, cause)


def plain(text: str) -> str:
    """Text without regard to case, spacing and punctuation at its ends."""
    return " ".join(text.lower().split()).strip(".?! ")


def count(
    source: Source,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    prepared: dict[str, Any],
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """What reaches training, in numbers. Lengths in tokens."""
    lengths = [len(e.ids) for e in examples]
    room = sum(max(micro_batch_tokens, len(b.tokens)) for b in batches)
    tokens = sum(lengths)
    return {
        **{k: v for k, v in prepared.items() if k not in ("first_lossy", "encoding")},
        "shortest": min(lengths, default=0),
        "median_length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "trained_share": prepared["trained_tokens"] / tokens if tokens else 0.0,
        "micro_batch_tokens": micro_batch_tokens,
        "packing_fill": tokens / room if room else 0.0,
        "distinct_rows": len({c.messages for c in source.conversations}),
    }
