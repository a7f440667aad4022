"""Several sources in one training run: the main one, and others mixed in, each with its own number of epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptst.data.examples import ExampleCounts, check_not_empty, prepare
from ptst.data.order import SourcePlan
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class SourceCounts:
    """One source of a mixture: its name, epochs, data fingerprint, and what became of its rows."""

    name: str
    epochs: float
    fingerprint: str
    examples: ExampleCounts

    def to_json(self) -> dict[str, Any]:
        own = {"name": self.name, "epochs": self.epochs, "fingerprint": self.fingerprint}
        return own | self.examples.to_json()


@dataclass(frozen=True)
class Mixture:
    """The examples of all sources in turn, under one template. `source` holds all their conversations, and an example's
    `row` is an index into it. `plans` and `counts` have one entry for each source."""

    source: Source
    examples: list[Example]
    plans: list[SourcePlan]
    counts: list[SourceCounts]


def parse_mix(text: str) -> tuple[str, float]:
    """`FILE:EPOCHS` as (data, epochs). Raises UserError for anything else."""
    name, _, number = text.rpartition(":")
    try:
        epochs = float(number)
    except ValueError:
        epochs = math.nan
    if not name or not 0 < epochs < math.inf:
        remedy = "write the data, a colon and its epochs, as in safety.jsonl:1"
        raise UserError((Setting("mix"), f" is {text!r}"), remedy)
    return name, epochs


def mix(
    sources: Sequence[tuple[Source, float]], prompt_format: PromptFormat, max_length: int, too_long: str, train_on: str
) -> Mixture:
    """Prepare each (source, epochs); the first is the main one. Raises UserError as `prepare`, and for a source
    without an example to train on."""
    conversations: list[Conversation] = []
    examples: list[Example] = []
    plans, counts = [], []
    for source, epochs in sources:
        own, count = prepare(source, prompt_format, max_length, too_long, train_on)
        check_not_empty(own, source.name)
        examples += [replace(example, row=example.row + len(conversations)) for example in own]
        conversations += source.conversations
        plans.append(SourcePlan(len(own), epochs))
        counts.append(SourceCounts(source.name, epochs, source.fingerprint, count))
    main = sources[0][0]
    return Mixture(Source(main.name, main.family, tuple(conversations)), examples, plans, counts)
