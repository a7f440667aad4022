"""Each document of a batch against the example of its row, by a hash: cheap enough for every batch of training."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import xxhash

from ptst.audit.findings import Finding
from ptst.audit.shape import check_shape
from ptst.data.example_arrays import ExampleArrays
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.data.step_batches import MicroBatch
from ptst.text.encode import Example
from ptst.text.segments import Conversation

DIFFERENT = ("unknown-document", "row-exchanged")  # rules for a document that is not its row's


def document_hash(ids: Sequence[int], loss_mask: Sequence[bool]) -> int:
    """A hash of a document's tokens and labels, from an example's ids and loss mask."""
    labels = [i if trained else IGNORE_INDEX for i, trained in zip(ids[1:], loss_mask[1:], strict=True)]
    return _hash(array("q", ids).tobytes(), array("q", [*labels, IGNORE_INDEX]).tobytes())


def batch_hashes(batch: Batch) -> list[int]:
    """The same of every document of a batch."""
    tokens, labels = (memoryview(array("q", part)).cast("B") for part in (batch.tokens, batch.labels))
    return [_hash(tokens[8 * a : 8 * b], labels[8 * a : 8 * b]) for a, b in pairwise(batch.cu_seqlens)]


def _hash(tokens: bytes | memoryview, labels: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(b"".join((tokens, labels)))


def example_hashes(examples: Sequence[Example]) -> Mapping[int, int]:
    """The hash of each example's document, by its row."""
    if not isinstance(examples, ExampleArrays):
        return {e.row: document_hash(e.ids, e.loss_mask) for e in examples}
    found = array("Q")
    for block in examples.blocks():
        tokens = block.ids.astype(np.int64)
        labels = np.full(len(tokens), IGNORE_INDEX, np.int64)
        labels[:-1] = np.where(block.trained[1:], tokens[1:], IGNORE_INDEX)
        labels[block.offsets[1:] - 1] = IGNORE_INDEX
        of_tokens, of_labels = (memoryview(part.tobytes()) for part in (tokens, labels))
        bounds = (8 * block.offsets).tolist()
        found.extend(_hash(of_tokens[a:b], of_labels[a:b]) for a, b in pairwise(bounds))
    return HashesByRow(examples.rows, found)


class HashesByRow(Mapping[int, int]):
    """Hashes by row, in a few bytes for each."""

    def __init__(self, rows: array, numbers: array):
        own = np.asarray(rows)
        if (own[1:] < own[:-1]).any():
            order = np.argsort(own, kind="stable")
            rows = array(rows.typecode, own[order].tobytes())
            numbers = array(numbers.typecode, np.asarray(numbers)[order].tobytes())
        self._rows, self._numbers = rows, numbers

    def __getitem__(self, row: int) -> int:
        at = bisect_right(self._rows, row) - 1  # the last one's, as in a dict
        if at < 0 or self._rows[at] != row:
            raise KeyError(row)
        return self._numbers[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass
class DocumentCheck:
    """`hashes`: by row of `conversations`, the hash of the document that it must be; rows without one are in no
    batch."""

    conversations: Sequence[Conversation]
    hashes: Mapping[int, int]
    _positions: list[int] = field(default_factory=list)

    def check(self, batch: MicroBatch) -> list[Finding]:
        """What is wrong with a batch: its shape, a document that is not its row's, a prefix that is not shared as it
        should be. [] at once where nothing is."""
        whole = batch.whole
        if not self.agrees(whole):
            return [*check_shape(whole, self.conversations), *self._strange(whole)]
        shared = batch.computed is whole or shares_prefixes(whole, batch.computed)
        return [] if shared else [self._at(whole, "shared-prefix", "the documents are not those before sharing", 0)]

    def agrees(self, batch: Batch) -> bool:
        """Whether every document of a batch is its row's, in tokens, labels, positions and boundaries."""
        bounds = batch.cu_seqlens
        longest = max((end - start for start, end in pairwise(bounds)), default=0)
        if longest > len(self._positions):
            self._positions = list(range(longest))
        well = bounds[:1] == [0] and bounds[-1] == len(batch.tokens) == len(batch.labels) == len(batch.position_ids)
        well = well and len(batch.rows) == len(bounds) - 1
        well = well and all(
            start < end and batch.position_ids[start:end] == self._positions[: end - start]
            for start, end in pairwise(bounds)
        )
        known = self.hashes.get
        return well and all(known(row) == found for row, found in zip(batch.rows, batch_hashes(batch), strict=True))

    def _strange(self, batch: Batch) -> Iterator[Finding]:
        """Documents that are not their rows'."""
        for number, found in enumerate(batch_hashes(batch)[: len(batch.rows)]):
            row = batch.rows[number]
            if self.hashes.get(row) == found:
                continue
            if (other := self._rows.get(found)) is not None:
                cause = f"the document is that of {self.place(other)}"
                yield self._at(batch, "row-exchanged", cause, number)
            elif row not in self.hashes:
                yield self._at(batch, "unknown-document", "the row was left out", number)
            else:
                yield self._at(batch, "unknown-document", "tokens or labels are not those of the row", number)

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {found: row for row, found in self.hashes.items()}

    def place(self, row: int) -> str:
        """The name of a row."""
        return self.conversations[row].source if 0 <= row < len(self.conversations) else f"row {row}"

    def _at(self, batch: Batch, rule: str, cause: str, document: int) -> Finding:
        return Finding(rule, self.place(batch.rows[document]) if batch.rows else "batch", cause, 0)


def shares_prefixes(whole: Batch, computed: Batch) -> bool:
    """Whether a batch whose documents share prefixes computes the same loss: every document has the same tokens,
    positions and labels, and what it leaves out is in front of another document, at the same positions, without a
    label."""
    spans, own = list(pairwise(whole.cu_seqlens)), list(pairwise(computed.cu_seqlens))
    places = computed.shared_prefixes or [(0, 0)] * len(own)
    if not len(spans) == len(own) == len(places) or computed.rows != whole.rows:
        return False
    first = {start: end for (start, end), (_, size) in zip(own, places, strict=True) if not size}
    for (start, end), (begins, ends), (at, size) in zip(spans, own, places, strict=True):
        kept = start + size
        if end - kept != ends - begins or (size and not at < at + size <= first.get(at, 0)):
            return False
        for get in _FIELDS:
            ours, theirs = get(whole), get(computed)
            if ours[kept:end] != theirs[begins:ends]:
                return False
            if size and get is not _labels and ours[start:kept] != theirs[at : at + size]:
                return False
        if whole.labels[start:kept] != [IGNORE_INDEX] * size:
            return False
    return True


def _labels(batch: Batch) -> list[int]:
    return batch.labels


_FIELDS: tuple[Callable[[Batch], list[int]], ...] = (lambda b: b.tokens, lambda b: b.position_ids, _labels)
