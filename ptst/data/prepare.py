"""Conversations to training examples: encoded, held to the length limit, everything left out counted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.encode import Example, cut
from ptst.text.prompt_format import PromptFormat


def prepare(
    source: Source,
    prompt_format: PromptFormat,
    max_length: int,
    too_long: str,
    train_on: str,
    bad: dict[int, str] | None = None,
) -> tuple[list[Example], dict[str, Any]]:
    """Encode every conversation; longer ones are dropped or cut as `too_long` says, and all is counted.

    Raises UserError for a conversation that cannot be trained on: without a last answer, or one that the template or
    format cannot say; and for longer ones if `too_long` is "stop". With `bad`, such rows are left out and noted there
    instead: index to reason.
    """
    kept: list[Example] = []
    long: list[tuple[int, str]] = []
    counts: dict[str, Any] = dict.fromkeys(("rows", "dropped", "cut", "untrained", "token_boundaries", "lossy"), 0)
    for row, conversation in enumerate(source.conversations):
        counts["rows"] += 1
        try:
            if not conversation.answered:
                raise UserError(f"{conversation.where}the conversation ends without an assistant turn to train on")
            encoded = replace(prompt_format.encode(conversation, train_on), row=row)
        except ValueError as error:
            if bad is None:
                raise
            bad[row] = str(error)
            continue
        counts["token_boundaries"] += len(encoded.token_boundaries)
        if encoded.lossy:
            counts["lossy"] += 1
            counts.setdefault("first_lossy", f"{conversation.where}{encoded.lossy[0]}")
        if len(encoded.ids) > max_length and too_long == "stop":
            long.append((len(encoded.ids), conversation.where))
            if bad is not None:
                bad[row] = f"{conversation.where}{len(encoded.ids)} tokens are more than the {max_length} of the limit"
            continue
        if len(encoded.ids) > max_length:
            counts["cut" if too_long == "cut" else "dropped"] += 1
            if too_long == "drop":
                continue
            encoded = cut(encoded, max_length)
        # What is never trained on (all of it was cut off, say) must not reach the loss as an empty example.
        if not any(encoded.loss_mask):
            counts["untrained"] += 1
            continue
        kept.append(encoded)
    if long and bad is None:
        length, where = max(long)
        raise UserError(
            f"{where}{length} tokens are more than the {max_length} that --micro-batch-tokens, --max-length and the "
            f"model allow, as are {len(long) - 1} other examples of {counts['rows']}; raise the limit, or choose "
            "--too-long drop or cut"
        )
    counts["encoding"] = fingerprint(kept)
    counts["examples"] = len(kept)
    counts["tokens"] = sum(len(e.ids) for e in kept)
    counts["trained_tokens"] = sum(e.num_trained for e in kept)
    return kept, counts


def length_limit(max_length: int | None, max_positions: int, micro_batch_tokens: int | str) -> int:
    """Longest example in tokens: as asked, and never beyond the model's context or what is in memory at once ("auto"
    is no limit: it makes room for the longest)."""
    return min(
        max_length or max_positions,
        max_positions,
        *([] if isinstance(micro_batch_tokens, str) else [micro_batch_tokens]),
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over all ids and flags in order: two runs with the same one trained the same tokens."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(array("q", e.ids).tobytes() + bytes(e.loss_mask) + b"|")
    return digest.hexdigest()
