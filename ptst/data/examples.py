"""Conversations to training examples: encoded, held to the length limit, everything left out counted; and several
sources mixed in one training run, each with its own number of epochs, and its own template where it has one."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.data.order import SourcePlan
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.records import DataRecord
from ptst.text.encode import Example, cut
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.templates import Template

AT_ONCE = 4096  # conversations that are encoded together


def prepare(
    source: Source,
    prompt_format: PromptFormat,
    max_length: int,
    too_long: str,
    train_on: str,
    errors: dict[int, UserError] | None = None,
) -> tuple[list[Example], DataRecord]:
    """The examples of a source, counted; those above `max_length` tokens are dropped or cut as `too_long` says. Raises
    UserError for a conversation that cannot be trained on: one that does not end in an answer, one that the template or
    format cannot express, and, if `too_long` is "stop", one that is too long. With `errors`, such rows are left out and
    their errors collected there by row index."""
    examples: list[Example] = []
    beyond_limit: list[tuple[int, str]] = []
    counts: dict[str, Any] = dict.fromkeys(("dropped", "cut", "untrained", "token_boundaries", "lossy"), 0)
    first_lossy = ""
    for row, (conversation, found) in enumerate(_encoded(source.conversations, prompt_format, train_on)):
        if isinstance(found, UserError):
            if errors is None:
                raise found
            errors[row] = found
            continue
        example = replace(found, row=row)
        length = len(example.ids)
        if length > max_length and too_long == "stop":
            beyond_limit.append((length, conversation.source))
            if errors is not None:
                errors[row] = UserError(f"{length} tokens exceed the limit of {max_length}", where=conversation.source)
            continue
        counts["token_boundaries"] += len(example.token_boundaries)
        if example.lossy:
            counts["lossy"] += 1
            first_lossy = first_lossy or f"{conversation.where}{example.lossy[0]}"
        if length > max_length:
            counts["cut" if too_long == "cut" else "dropped"] += 1
            if too_long == "drop":
                continue
            example = cut(example, max_length)
        # An example without a trained token (all of the answer was cut off, say) must not reach the loss.
        if any(example.loss_mask):
            examples.append(example)
        else:
            counts["untrained"] += 1
    if beyond_limit and errors is None:
        raise _too_long(beyond_limit, max_length, len(source.conversations))
    record = DataRecord(
        name=source.name,
        encoding=fingerprint(examples),
        rows=len(source.conversations),
        examples=len(examples),
        first_lossy=first_lossy,
        unused=dict(source.unused),
        revision=source.revision,
        tokens=sum(len(example.ids) for example in examples),
        trained_tokens=sum(example.num_trained for example in examples),
        **counts,
    )
    return examples, record


def _encoded(
    conversations: Sequence[Conversation], prompt_format: PromptFormat, train_on: str
) -> Iterator[tuple[Conversation, Example | UserError]]:
    """Every conversation, encoded, or the reason why not."""
    for at in range(0, len(conversations), AT_ONCE):
        part = conversations[at : at + AT_ONCE]
        for conversation, found in zip(part, prompt_format.encode_all(part, train_on), strict=True):
            if not conversation.answered:
                cause = "the conversation ends without an assistant turn to train on"
                yield conversation, UserError(cause, "", conversation.source)
            else:
                yield conversation, found


def _too_long(beyond_limit: list[tuple[int, str]], max_length: int, num_rows: int) -> UserError:
    length, place = max(beyond_limit)
    cause = (
        *(f"{length} tokens exceed the limit of {max_length} set by ", Setting("micro_batch_tokens"), ", "),
        *(Setting("max_length"), " and the model"),
        f", as do {len(beyond_limit) - 1} other examples of {num_rows}",
    )
    return UserError(cause, ("raise the limit, or set ", Setting("too_long"), " to drop or cut"), place)


def check_not_empty(examples: Sequence[Example], name: str) -> None:
    """Raise UserError if no example of the data `name` is left."""
    if not examples:
        remedy = ("raise ", Setting("max_length"), ", or check that the data leave an answer in the loss")
        raise UserError(f"{name}: no example is left", remedy)


def length_limit(max_length: int | None, max_positions: int, micro_batch_tokens: int | str) -> int:
    """Longest example in tokens: `max_length`, and never beyond the model's context or a micro-batch ("auto" is no
    limit: it makes room for the longest)."""
    limits = [max_length or max_positions, max_positions]
    return min(limits if isinstance(micro_batch_tokens, str) else [*limits, micro_batch_tokens])


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over all ids and loss masks in order: two runs with the same one trained the same tokens."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", example.ids).tobytes() + bytes(example.loss_mask) + b"|")
    return digest.hexdigest()


@dataclass(frozen=True)
class TrainingSource:
    """A source of a run's training data. `template`: its own, from `template_file` where that is given; None: that of
    the run. `share`: per cent of the main source's rows whose place its rows take (0: none; `select`). `left_out`: what
    became of its other rows, by place."""

    source: Source
    epochs: float = 1.0
    template: Template | None = None
    template_file: Path | None = None
    share: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)

    def under(self, prompt_format: PromptFormat) -> PromptFormat:
        """The prompt format of its rows, from that of the run."""
        return prompt_format if self.template is None else prompt_format.with_template(self.template)


@dataclass(frozen=True)
class Mixture:
    """The examples of all sources in turn. `source` holds all their conversations, and an example's `row` is an index
    into it. `plans`, `records` and `sources` have one entry for each source."""

    source: Source
    examples: list[Example]
    plans: list[SourcePlan]
    records: list[DataRecord]
    sources: Sequence[TrainingSource] = ()


def mix(
    sources: Sequence[TrainingSource],
    prompt_format: PromptFormat,
    max_length: int,
    too_long: str,
    train_on: str,
    errors: dict[int, UserError] | None = None,
) -> Mixture:
    """Prepare each source, one with a template of its own under that; the first is the main one. Raises UserError as
    `prepare`, and for a source without an example to train on. With `errors`, rows that cannot be trained on are left
    out and their errors collected there by index into all rows, and a source may be left without an example."""
    conversations: list[Conversation] = []
    examples: list[Example] = []
    plans, records = [], []
    for each in sources:
        bad = None if errors is None else dict[int, UserError]()
        source, own_format = each.source, each.under(prompt_format)
        own, record = prepare(source, own_format, max_length, too_long, train_on, bad)
        if errors is None:
            check_not_empty(own, source.name)
        else:
            errors.update((row + len(conversations), error) for row, error in (bad or {}).items())
        examples += [replace(example, row=example.row + len(conversations)) for example in own]
        conversations += source.conversations
        plans.append(SourcePlan(len(own), each.epochs, bool(each.share)))
        template = own_format.template if each.template else None
        records.append(replace(record, epochs=each.epochs, fingerprint=source.fingerprint, template=template))
    main = sources[0].source
    return Mixture(Source(main.name, main.family, tuple(conversations)), examples, plans, records, sources)
