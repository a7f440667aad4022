"""Several sources in one training run: the main one, and others that are mixed in with their own number of epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptst.data.order import Part
from ptst.data.prepare import prepare
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat


@dataclass(frozen=True)
class Mixture:
    """Examples of all sources in turn, all under one template. `source` holds all their conversations, and an
    example's `row` counts through it. `counts` are each source's own."""

    source: Source
    examples: list[Example]
    parts: list[Part]
    counts: list[dict[str, Any]]


def parse_mix(text: str) -> tuple[str, float]:
    """`FILE:EPOCHS` as (data, epochs). Raises UserError for anything else."""
    name, _, number = text.rpartition(":")
    try:
        epochs = float(number)
    except ValueError:
        epochs = math.nan
    if not name or not 0 < epochs < math.inf:
        raise UserError(f"--mix {text}: write the data, a colon and its epochs, as in safety.jsonl:1")
    return name, epochs


def mix(
    sources: Sequence[tuple[Source, float]], prompt_format: PromptFormat, max_length: int, too_long: str, train_on: str
) -> Mixture:
    """Prepare each (source, epochs); the first is the main one. Raises UserError as `prepare`, and for a source
    without an example to train on."""
    conversations, examples, parts, counts = [], [], [], []
    for source, epochs in sources:
        kept, count = prepare(source, prompt_format, max_length, too_long, train_on)
        if not kept:
            raise UserError(f"{source.name}: no example is left to train on; raise --max-length or look at the data")
        examples += [replace(e, row=e.row + len(conversations)) for e in kept]
        conversations += source.conversations
        parts.append(Part(len(kept), epochs))
        counts.append({"name": source.name, "epochs": epochs, "fingerprint": source.fingerprint, **count})
    main = sources[0][0]
    return Mixture(Source(main.name, main.family, tuple(conversations)), examples, parts, counts)
