"""Conversations to training examples: encoded, held to the length limit, everything left out counted."""

from __future__ import annotations

from typing import Any

from ptst.data.sources import Source
from ptst.text.encode import Encoded, Prompting, cut


def prepare(
    source: Source, prompting: Prompting, max_length: int, too_long: str, train_on: str
) -> tuple[list[Encoded], dict[str, Any]]:
    """Encode every conversation; longer ones are dropped or cut, and all is counted.

    Raises ValueError for a conversation that does not end with an answer.
    """
    kept: list[Encoded] = []
    counts: dict[str, Any] = dict.fromkeys(("rows", "dropped", "cut", "untrained", "seams", "lossy"), 0)
    for conversation in source.conversations:
        if not conversation.answered:
            raise ValueError(f"{conversation.where}the conversation ends without an assistant turn to train on")
        encoded = prompting.encode(conversation, train_on)
        counts["rows"] += 1
        counts["seams"] += len(encoded.seams)
        if encoded.lossy:
            counts["lossy"] += 1
            counts.setdefault("first_lossy", f"{conversation.where}{encoded.lossy[0]}")
        if len(encoded.ids) > max_length:
            counts["cut" if too_long == "cut" else "dropped"] += 1
            if too_long == "drop":
                continue
            encoded = cut(encoded, max_length)
        # What is never trained on (all of it was cut off, say) must not reach the loss as an empty example.
        if not any(encoded.trained):
            counts["untrained"] += 1
            continue
        kept.append(encoded)
    counts["examples"] = len(kept)
    counts["tokens"] = sum(len(e.ids) for e in kept)
    counts["trained_tokens"] = sum(e.num_trained for e in kept)
    return kept, counts
