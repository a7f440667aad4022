"""All rules on the rows and examples that a run takes, a chunk of rows at a time, so that memory does not grow with
them: references of all rows would take several times that of the examples. Many chunks are checked by several
processes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

from ptst.audit.account.expected import build_prompts, build_references
from ptst.audit.account.fates import Counted, check_left_out, find_fate
from ptst.audit.account.tally import Tally
from ptst.audit.agreement import agrees
from ptst.audit.documents import check_documents
from ptst.audit.findings import Finding
from ptst.audit.reference.tokenizer_check import SAMPLE, check_tokenizer
from ptst.audit.rows import check_rows
from ptst.audit.setup import Setup
from ptst.collector import paused_collector
from ptst.data.example_arrays import ExampleArrays, rows_of
from ptst.data.examples import TrainingSource
from ptst.data.sources import Source
from ptst.data.step_batches import StepBatches
from ptst.forked import forked_map
from ptst.progress import ProgressLine
from ptst.records import DataRecord
from ptst.text.encode import Example
from ptst.text.segments import Conversation

CHUNK = 2048  # rows
MANY = 16  # chunks from which several processes check them


@dataclass(frozen=True)
class Prepared:
    """Data that a run takes: the rows of one or more sources, their examples, and a record of each source. `sources`:
    those of training, which may have templates of their own."""

    source: Source
    examples: Sequence[Example]
    records: Sequence[DataRecord] = ()
    sources: Sequence[TrainingSource] = ()


def check_part(part: Prepared, setup: Setup, micro_batch_tokens: int) -> Tally:
    """What all rules find: on rows, then on documents, then on what was counted."""
    chunks = _Chunks(part, setup.of_sources(part.sources), micro_batch_tokens)
    on_rows = Tally(f for own, rows in chunks.samples() for f in check_tokenizer(own, rows))
    on_documents, left_out = Tally(), Tally()
    counted = [Counted() for _ in part.records]
    for found in _checked(chunks):
        on_rows.merge(found.on_rows)
        on_documents.merge(found.on_documents)
        left_out.merge(found.left_out)
        for total, own in zip(counted, found.counted, strict=True):
            total.merge(own)
    miscounted = Tally(f for own, record in zip(counted, part.records, strict=True) for f in own.check(record))
    for more in (on_documents, left_out, miscounted):
        on_rows.merge(more)
    return on_rows


def _checked(chunks: "_Chunks") -> "Iterator[_Checked]":
    numbers = chunks.numbers
    if len(numbers) < MANY:
        yield from map(chunks.check, numbers)
        return
    pieces = forked_map(lambda at: chunks.check(numbers[at]).to_bytes(), len(numbers))
    with ProgressLine("audit", len(chunks.part.source.conversations)) as progress:
        for done, piece in enumerate(pieces, 1):
            progress.update(min(done * CHUNK, progress.total))
            yield _Checked.from_bytes(piece)


@dataclass
class _Checked:
    """What was found in a chunk. `counted`: of each source."""

    counted: list[Counted]
    on_rows: Tally = field(default_factory=Tally)
    on_documents: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def to_bytes(self) -> bytes:
        tallies = [tally.to_json() for tally in (self.on_rows, self.on_documents, self.left_out)]
        return json.dumps([[vars(own) for own in self.counted], *tallies]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Checked":
        counted, *tallies = json.loads(data)
        return cls([Counted(**own) for own in counted], *map(Tally.from_json, tallies))


@dataclass(frozen=True)
class _Chunks:
    """Checks of one chunk after another."""

    part: Prepared
    setup: Setup
    micro_batch_tokens: int

    @cached_property
    def numbers(self) -> list[int]:
        """The chunks, those without a conversation too: an example may say that it comes from there."""
        rows = range(-(-len(self.part.source.conversations) // CHUNK))
        return sorted({row // CHUNK for row in rows_of(self.part.examples)}.union(rows))

    @cached_property
    def _examples(self) -> dict[int, list[Example]]:
        """The examples by chunk, where they are in memory as such."""
        found: dict[int, list[Example]] = {}
        for example in self.part.examples:
            found.setdefault(example.row // CHUNK, []).append(example)
        return found

    def samples(self) -> list[tuple[Setup, list[Conversation]]]:
        """The setups of the rows, each with its first rows."""
        found: dict[int, tuple[Setup, list[Conversation]]] = {}
        for rows, own in self.setup.stretches(len(self.part.source.conversations)):
            known = found.setdefault(id(own), (own, []))[1]
            known += self.part.source.conversations[rows.start : min(rows.stop, rows.start + SAMPLE - len(known))]
        return list(found.values())

    def check(self, number: int) -> _Checked:
        """Everything about a chunk."""
        with paused_collector():
            return self._check(number)

    def _check(self, number: int) -> _Checked:
        part, first = self.part, number * CHUNK
        conversations = part.source.conversations
        rows = conversations[max(0, first) : max(0, first + CHUNK)]
        here = conversations if isinstance(conversations, tuple | list) else _Here(conversations, rows, first)
        found = _Checked([Counted() for _ in part.records])
        for stretch, own in self.setup.stretches(first + len(rows), first) if rows else ():
            of_rows = rows[stretch.start - first : stretch.stop - first]
            found.on_rows.merge(Tally(check_rows(of_rows, own.prompt_format)))
        examples = self._of(number)
        references = dict(enumerate(build_references(rows, self.setup, first), first)) if rows else {}
        prompts = dict(enumerate(build_prompts(rows, self.setup, first), first))
        documents: dict[Finding, None] = {}
        for batch in StepBatches(examples, range(len(examples)), self.micro_batch_tokens, share=False):
            if not agrees(batch.whole, references, prompts, self.setup):
                documents.update(dict.fromkeys(check_documents(batch.whole, here, self.setup, references)))
        found.on_documents = Tally(documents)
        fates = [find_fate(reference, self.setup) for reference in references.values()]
        made = {example.row - first for example in examples}
        ends = [*accumulate(record.rows for record in part.records)]
        for own_count, start, end in zip(found.counted, [0, *ends], ends, strict=False):
            span = slice(max(0, start - first), max(0, end - first))
            own_count.add(fates[span])
            left = {row - span.start for row in made if span.start <= row < span.stop}
            places = [row.source for row in rows[span]]
            found.left_out.merge(Tally(check_left_out(places, fates[span], left)))
        return found

    def _of(self, number: int) -> list[Example]:
        examples = self.part.examples
        if isinstance(examples, ExampleArrays):
            return examples.between(number * CHUNK, (number + 1) * CHUNK)
        return self._examples.get(number, [])


class _Here(Sequence[Conversation]):
    """All rows, of which those of a chunk are at hand."""

    def __init__(self, every: Sequence[Conversation], chunk: Sequence[Conversation], first: int):
        self._every, self._chunk, self._first = every, chunk, first

    def __len__(self) -> int:
        return len(self._every)

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, at: Any) -> Any:
        near = isinstance(at, int) and 0 <= at - self._first < len(self._chunk)
        return self._chunk[at - self._first] if near else self._every[at]

    def nearby(self) -> Iterator[tuple[int, Conversation]]:
        """The rows of the chunk, numbered: an index of all would be in memory."""
        return enumerate(self._chunk, self._first)
