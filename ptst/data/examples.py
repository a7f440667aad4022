"""Conversations to training examples: encoded, held to the length limit, everything left out counted; and several
sources mixed in one training run, each with its own number of epochs, and its own template where it has one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ptst.data.encode_rows import Encoder, encode_rows, update_fingerprint
from ptst.data.example_arrays import Columns, ExampleArrays
from ptst.data.kept_rows import is_kept, joined
from ptst.data.order import SourcePlan
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.records import DataRecord
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.templates import Template


def prepare(
    source: Source,
    prompt_format: PromptFormat,
    max_length: int,
    too_long: str,
    train_on: str,
    errors: dict[int, UserError] | None = None,
) -> tuple[Sequence[Example], DataRecord]:
    """The examples of a source, counted; those above `max_length` tokens are dropped or cut as `too_long` says. Raises
    UserError for a conversation that cannot be trained on: one that does not end in an answer, one that the template or
    format cannot express, and, if `too_long` is "stop", one that is too long. With `errors`, such rows are left out and
    their errors collected there by row index."""
    conversations = source.conversations
    encoder = Encoder(prompt_format, max_length, too_long, train_on)
    found = encode_rows(conversations, encoder, source.fingerprint if is_kept(conversations) else None, errors)
    for row, length in found.beyond.items():
        if errors is None:
            raise _too_long(found.beyond, max_length, conversations)
        where = conversations[row].source
        errors[row] = UserError(f"{length} tokens exceed the limit of {max_length}", where=where)
    first_lossy = ""
    if found.first_lossy is not None:
        row, what = found.first_lossy
        first_lossy = f"{conversations[row].where}{what}"
    columns, counts = found.columns, found.counts
    record = DataRecord(
        name=source.name,
        encoding=found.encoding,
        rows=len(conversations),
        partial=source.partial,
        examples=len(columns),
        first_lossy=first_lossy,
        unused=dict(source.unused),
        revision=source.revision,
        tokens=len(columns.ids),
        trained_tokens=found.trained_tokens,
        dropped=counts["dropped"],
        cut=counts["cut"],
        untrained=counts["untrained"],
        token_boundaries=counts["token_boundaries"],
        lossy=counts["lossy"],
    )
    return ExampleArrays((columns, 0)), record


def _too_long(beyond: Mapping[int, int], max_length: int, conversations: Sequence[Conversation]) -> UserError:
    length = max(beyond.values())
    place = max(conversations[row].source for row, own in beyond.items() if own == length)
    cause = (
        *(f"{length} tokens exceed the limit of {max_length} set by ", Setting("micro_batch_tokens"), ", "),
        *(Setting("max_length"), " and the model"),
        f", as do {len(beyond) - 1} other examples of {len(conversations)}",
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
    update_fingerprint(digest, Columns.of(examples))
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
    examples: Sequence[Example]
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
    conversations, first = list[Sequence[Conversation]](), 0
    parts = list[tuple[Columns, int]]()
    plans, records = [], []
    for each in sources:
        bad = None if errors is None else dict[int, UserError]()
        source, own_format = each.source, each.under(prompt_format)
        own, record = prepare(source, own_format, max_length, too_long, train_on, bad)
        if errors is None:
            check_not_empty(own, source.name)
        else:
            errors.update((row + first, error) for row, error in (bad or {}).items())
        columns = own.parts[0][0] if isinstance(own, ExampleArrays) else Columns.of(own)
        parts.append((columns, first))
        conversations.append(source.conversations)
        first += len(source.conversations)
        plans.append(SourcePlan(len(own), each.epochs, bool(each.share)))
        template = own_format.template if each.template else None
        records.append(replace(record, epochs=each.epochs, fingerprint=source.fingerprint, template=template))
    main = sources[0].source
    rows = Source(main.name, main.family, joined(conversations))
    return Mixture(rows, ExampleArrays(*parts), plans, records, sources)
