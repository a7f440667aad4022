"""The documents in batches of any trainer: a file's batches are read, checked by themselves, and divided into documents
with a loss mask, whatever their layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ptst.audit.batches.arrays import IGNORED, BatchArrays, read_arrays
from ptst.audit.batches.check import SHIFTED, UNKNOWN, Known, View, check_view, look
from ptst.audit.batches.files import FileBatch, read_batches
from ptst.audit.findings import Finding
from ptst.errors import UserError


@dataclass(frozen=True)
class ForeignDocument:
    """One document of a foreign batch: where it is, its ids, which of them are trained, and what the batch's own rules
    found in it. `alone`: the only one of its row. `known`: whether its labels are tokens, so that the mask counts."""

    place: str
    ids: list[int]
    trained: list[bool]
    alone: bool
    known: bool = True


@dataclass
class ForeignFile:
    """A file of batches. After all documents were read, what its batches are."""

    path: Path
    known: Known
    shifted: bool | None = None
    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    conventions: set[str] = field(default_factory=set)
    parted: set[str] = field(default_factory=set)
    batches: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def read(self) -> Iterator[ForeignDocument]:
        """The documents, in order. Raises UserError for a file that cannot be read and for what is no batch."""
        for batch in read_batches(self.path):
            try:
                arrays = self._arrays(batch)
            except UserError as error:
                where = f"{self.path}" if len(batch.places) > 1 else f"{self.path.parent / batch.places[0]}"
                raise UserError(error.cause, error.remedy, error.where or where) from None
            yield from self._take(batch, arrays)

    def _arrays(self, batch: FileBatch) -> BatchArrays:
        known = self.known
        arrays = read_arrays(batch.arrays, pad_id=known.pad_id, stops=known.eos_ids or ())
        if arrays.mask is None and not arrays.parted and (pad := padding_of(arrays)) not in (None, known.pad_id):
            arrays = read_arrays(batch.arrays, pad_id=pad, stops=known.eos_ids or ())
            known = replace(known, pad_id=pad)
        self._check_fits(arrays)
        return arrays

    def _check_fits(self, a: BatchArrays) -> None:
        """Raise UserError where most documents have ids that the model has not."""
        size = self.known.vocab_size
        if size is None or not (a.ids >= size).any():
            return
        outside = a.ids >= size
        sums = np.concatenate(([0], np.cumsum(outside)))
        concerned = np.count_nonzero(sums[a.ends] > sums[a.starts])
        if 2 * concerned > len(a.starts) and len(np.unique(a.ids[outside])) > 2:
            cause = f"ids go up to {a.ids.max()}, and the model has {size}"
            raise UserError(cause, "give the model whose tokenizer wrote them")

    def _take(self, batch: FileBatch, a: BatchArrays) -> Iterator[ForeignDocument]:
        view, found = look(a, self.known, self.shifted)
        checked = check_view(view, found)
        self.findings += [replace(f, row=_named(f.row, batch.places)) for f in checked]
        self.not_checked |= checked.not_checked
        if (a.labels != IGNORED).any():
            self.conventions.add(view.convention)
        self.parted.add(a.parted)
        self.batches += 1
        self.rows += len(a.rows) - 1
        for document in _documents(view, batch.places):
            self.documents += 1
            self.tokens += len(document.ids)
            self.trained_tokens += sum(document.trained)
            yield document


def padding_of(a: BatchArrays) -> int | None:
    """The id of a padding that nothing else tells: the one that several rows of one length end in, without labels."""
    lengths = np.diff(a.rows)
    if len(lengths) < 2 or (lengths != lengths[0]).any() or lengths[0] < 2:
        return None
    last = a.rows[1:] - 1
    ends = (a.ids[last] == a.ids[last - 1]) & (a.labels[last] == IGNORED) & (a.labels[last - 1] == IGNORED)
    values, counts = np.unique(a.ids[last[ends]], return_counts=True)
    return int(values[np.argmax(counts)]) if len(values) else None


def _documents(v: View, places: list[str]) -> Iterator[ForeignDocument]:
    a = v.arrays
    rows = a.row_of
    alone = np.bincount(rows, minlength=len(a.rows) - 1)[rows] == 1 if len(rows) else rows
    for number, (start, end) in enumerate(v.documents):
        ids, trained = a.ids[start:end].tolist(), v.trained[start:end].tolist()
        if v.convention == SHIFTED and v.over[number] != IGNORED and not _is_next(a, end, int(v.over[number])):
            ids.append(int(v.over[number]))
            trained.append(True)
        place = _named(v.place(start)[0], places)
        yield ForeignDocument(place, ids, trained, bool(alone[number]), v.convention != UNKNOWN)


def _is_next(a: BatchArrays, end: int, label: int) -> bool:
    """Whether a label behind a document is the first token of the next one, which is a fault, not its end."""
    return bool(end < len(a.ids) and end in a.starts and a.ids[end] == label)


def _named(row: str, places: list[str]) -> str:
    """`row 3, document 1` of a batch as the file's place."""
    head, _, rest = row.partition(",")
    number = int(head.removeprefix("row ")) if head.startswith("row ") else 0
    return (places[number] if number < len(places) else head) + (f",{rest}" if rest else "")
