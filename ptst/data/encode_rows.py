"""Conversations to columns of examples, some thousands at a time: in this process, or, for those that lie on disk, by
several processes into mapped files, which later runs with the same data and settings use again.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ptst.array_folder import ArrayFolder, ArrayWriter, find_or_make, forget
from ptst.collector import paused_collector
from ptst.data.example_arrays import Columns, id_type
from ptst.data.kept_rows import is_kept
from ptst.errors import UserError
from ptst.fingerprints import code_fingerprint, combined, tokenizer_fingerprint
from ptst.forked import forked_map, num_processes
from ptst.progress import ProgressLine, say
from ptst.text.encode import Example, Lossy, cut
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation

AT_ONCE = 4096  # conversations that are encoded together
FOLDER = "examples"
VERSION = 1  # of the format
COUNTS = ("dropped", "cut", "untrained", "token_boundaries", "lossy")
_END = b"|"  # of an example, in the fingerprint of all


@dataclass(frozen=True)
class Encoder:
    """How conversations become examples. `too_long`: what happens to those above `max_length` tokens ("drop", "cut" or
    "stop"); `train_on`: which answers are trained."""

    prompt_format: PromptFormat
    max_length: int
    too_long: str
    train_on: str

    def encode(self, conversations: Sequence[Conversation]) -> list[Example | UserError]:
        """Each conversation's example, of any length, or the reason why it has none."""
        found = self.prompt_format.encode_all(conversations, self.train_on)
        return [
            example if conversation.answered else _unanswered(conversation)
            for conversation, example in zip(conversations, found, strict=True)
        ]

    def part(self, conversations: Sequence[Conversation], first: int) -> "Part":
        """What becomes of the conversations whose indices begin at `first`."""
        part = Part(id_type(self.prompt_format.tokenizer.vocab_size))
        with paused_collector():
            for row, found in enumerate(self.encode(conversations), first):
                if isinstance(found, UserError):
                    part.bad[row] = found
                else:
                    self._add(found, row, part)
        return part

    def _add(self, example: Example, row: int, part: "Part") -> None:
        length = len(example.ids)
        if length > self.max_length and self.too_long == "stop":
            part.beyond[row] = length
            return
        counts = part.counts
        counts["token_boundaries"] += len(example.token_boundaries)
        if example.lossy:
            counts["lossy"] += 1
            part.first_lossy = part.first_lossy or (row, str(example.lossy[0]))
        if length > self.max_length:
            counts["cut" if self.too_long == "cut" else "dropped"] += 1
            if self.too_long == "drop":
                return
            example = cut(example, self.max_length)
        # An example without a trained token (all of the answer was cut off, say) must not reach the loss.
        if any(example.loss_mask):
            part.take(example, row)
        else:
            counts["untrained"] += 1

    def key(self, fingerprint: str) -> str | None:
        """A name for what becomes of data of a fingerprint; None where the prompt format is no folder's."""
        p = self.prompt_format
        if p.folder is None:
            return None
        asked = (self.max_length, self.too_long, self.train_on, sorted(p.stop_ids), p.allow_role_markers)
        words = [repr(part) for part in (p.template, p.family, p.chat_format)]
        code = code_fingerprint("data", "text")
        key = combined(str(VERSION), code, fingerprint, tokenizer_fingerprint(p.folder), repr(asked), *words)
        return key.replace(":", "-")


def _unanswered(conversation: Conversation) -> UserError:
    return UserError("the conversation ends without an assistant turn to train on", "", conversation.source)


@dataclass
class Part:
    """Some conversations' examples. `bad`: the rows that cannot be encoded, with the reason; `beyond`: tokens of rows
    that are too long, where that is an error. `first_lossy`: the first row that the ids do not give back, and where."""

    id_type: np.dtype
    ids: list[int] = field(default_factory=list)
    trained: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("q"))
    rows: array = field(default_factory=lambda: array("q"))
    token_boundaries: dict[int, tuple[int, ...]] = field(default_factory=dict)
    lossy: dict[int, tuple[Lossy, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    first_lossy: tuple[int, str] | None = None
    bad: dict[int, UserError | None] = field(default_factory=dict)
    beyond: dict[int, int] = field(default_factory=dict)

    def take(self, example: Example, row: int) -> None:
        """Add an example."""
        if example.token_boundaries:
            self.token_boundaries[len(self.rows)] = example.token_boundaries
        if example.lossy:
            self.lossy[len(self.rows)] = example.lossy
        self.ids += example.ids
        self.trained += bytes(example.loss_mask)
        self.lengths.append(len(example.ids))
        self.rows.append(row)

    def columns(self) -> Columns:
        """The examples in memory."""
        ids = np.array(array("q", self.ids), np.int64)
        kind = self.id_type if int(ids.max(initial=0)) <= np.iinfo(self.id_type).max else np.dtype(np.uint32)
        offsets = np.array([0, *accumulate(self.lengths)], np.int64)
        trained = np.frombuffer(bytes(self.trained), np.bool_)
        rows = np.array(self.rows, np.int64)
        return Columns(ids.astype(kind), trained, offsets, rows, self.token_boundaries, self.lossy)

    def to_bytes(self) -> bytes:
        """The part for another process. Of bad rows only which they are: that one encodes them again."""
        columns = self.columns()
        about = {
            "counts": self.counts,
            "first_lossy": self.first_lossy,
            "bad": [*self.bad],
            "beyond": [*self.beyond.items()],
            "token_boundaries": [*self.token_boundaries.items()],
            "lossy": _listed(self.lossy),
            "sizes": [len(columns), len(columns.ids), columns.ids.dtype.itemsize],
        }
        head = json.dumps(about).encode()
        arrays = (columns.offsets, columns.rows, columns.ids, columns.trained)
        return b"".join([len(head).to_bytes(8), head, *(a.tobytes() for a in arrays)])

    @classmethod
    def from_bytes(cls, data: bytes) -> "tuple[Part, Columns]":
        """A part of another process, and its examples."""
        at = 8 + int.from_bytes(data[:8])
        about = json.loads(data[8:at])
        number, tokens, size = about["sizes"]
        kind = np.dtype(np.uint16 if size == 2 else np.uint32)
        arrays = []
        for count, own in ((number + 1, np.dtype(np.int64)), (number, np.dtype(np.int64)), (tokens, kind)):
            arrays.append(np.frombuffer(data, own, count, at))
            at += count * own.itemsize
        offsets, rows, ids = arrays
        part = cls(kind, counts=about["counts"], bad=dict.fromkeys(about["bad"]), beyond=dict(about["beyond"]))
        part.first_lossy = tuple(about["first_lossy"]) if about["first_lossy"] else None
        boundaries, lossy = _read_sparse(about)
        return part, Columns(ids, np.frombuffer(data, np.bool_, tokens, at), offsets, rows, boundaries, lossy)


def _listed(lossy: dict[int, tuple[Lossy, ...]]) -> list[Any]:
    return [[at, [[one.author, one.offset, one.character] for one in found]] for at, found in lossy.items()]


def _read_sparse(about: dict[str, Any]) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[Lossy, ...]]]:
    boundaries = {at: tuple(found) for at, found in about["token_boundaries"]}
    return boundaries, {at: tuple(Lossy(*one) for one in found) for at, found in about["lossy"]}


@dataclass
class Encoded:
    """A source's examples. `encoding`: their fingerprint. `counts`, `first_lossy`, `beyond`: as of a `Part`."""

    columns: Columns
    encoding: str
    trained_tokens: int
    counts: dict[str, int]
    first_lossy: tuple[int, str] | None
    beyond: dict[int, int]


class _Total:
    """What all parts are together: everything but the examples themselves."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.trained_tokens = self.examples = 0
        self.first_lossy: tuple[int, str] | None = None
        self.beyond: dict[int, int] = {}
        self.token_boundaries: list[tuple[int, tuple[int, ...]]] = []
        self.lossy: dict[int, tuple[Lossy, ...]] = {}

    def add(self, part: Part, columns: Columns) -> None:
        update_fingerprint(self._digest, columns)
        for name, number in part.counts.items():
            self.counts[name] += number
        self.trained_tokens += int(columns.trained.sum())
        self.first_lossy = self.first_lossy or part.first_lossy
        self.beyond |= part.beyond
        self.token_boundaries += [(at + self.examples, found) for at, found in columns.token_boundaries.items()]
        self.lossy |= {at + self.examples: found for at, found in columns.lossy.items()}
        self.examples += len(columns)

    def encoded(self, columns: Columns) -> Encoded:
        known = self._digest.hexdigest(), self.trained_tokens, self.counts, self.first_lossy, self.beyond
        return Encoded(columns, *known)

    def about(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "encoding": self._digest.hexdigest(),
            "trained_tokens": self.trained_tokens,
            "counts": self.counts,
            "first_lossy": self.first_lossy,
            "beyond": [*self.beyond.items()],
            "token_boundaries": self.token_boundaries,
            "lossy": _listed(self.lossy),
        }


def update_fingerprint(digest: Any, columns: Columns) -> None:
    """Add examples to a fingerprint: of each its ids, 8 bytes each, its loss mask, a byte each, and an end."""
    ids = memoryview(columns.ids.astype("<i8").tobytes())
    trained, offsets = memoryview(columns.trained.tobytes()), columns.offsets.tolist()
    for start, end in pairwise(offsets):
        digest.update(b"".join((ids[8 * start : 8 * end], trained[start:end], _END)))


def encode_rows(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    fingerprint: str | None = None,
    errors: dict[int, UserError] | None = None,
) -> Encoded:
    """The examples of these conversations. `fingerprint`: of conversations that lie on disk. Raises UserError for the
    first that cannot be encoded; with `errors`, those are left out and their errors collected there by index."""
    if is_kept(conversations):
        return _on_disk(conversations, encoder, fingerprint if errors is None else None, errors)
    total, parts = _Total(), []
    for at in range(0, len(conversations), AT_ONCE):
        part = encoder.part(conversations[at : at + AT_ONCE], at)
        _collect(part, conversations, encoder, errors)
        parts.append(part.columns())
        total.add(part, parts[-1])
    return total.encoded(Columns.joined(parts))


def _collect(
    part: Part, conversations: Sequence[Conversation], encoder: Encoder, errors: dict[int, UserError] | None
) -> None:
    """Raise or keep the errors of bad rows; what another process refused is encoded again, for the words."""
    for row, error in part.bad.items():
        if error is None:
            (again,) = encoder.encode(conversations[row : row + 1])
            assert isinstance(again, UserError), f"row {row} was refused by another process, and not by this one"
            error = again
        if errors is None:
            raise error
        errors[row] = error


def _on_disk(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    fingerprint: str | None,
    errors: dict[int, UserError] | None,
) -> Encoded:
    """The same by several processes into mapped files."""

    def make(writer: ArrayWriter) -> None:
        total, kind, done = _Total(), id_type(encoder.prompt_format.tokenizer.vocab_size), 0
        say(f"encoding {len(conversations)} rows by {num_processes()} processes")
        with ProgressLine("encode", len(conversations)) as progress:
            for part, columns in _parts(conversations, encoder):
                _collect(part, conversations, encoder, errors)
                assert columns.ids.dtype == kind, "an id is beyond the vocabulary"
                total.add(part, columns)
                for name, column in (("ids", columns.ids), ("trained", columns.trained), ("rows", columns.rows)):
                    writer.add(name, column)
                writer.add("lengths", np.diff(columns.offsets).astype(np.int32))
                done = min(done + AT_ONCE, len(conversations))
                progress.update(done)
        writer.about |= {**total.about(), "id_bytes": kind.itemsize}

    key = None if fingerprint is None else encoder.key(fingerprint)
    folder = find_or_make(FOLDER, key, make, "the encoded rows of large data")
    found = _read(folder)
    forget(folder)
    return found


def _parts(conversations: Sequence[Conversation], encoder: Encoder) -> Iterator[tuple[Part, Columns]]:
    def work(number: int) -> bytes:
        first = number * AT_ONCE
        return encoder.part(conversations[first : first + AT_ONCE], first).to_bytes()

    yield from map(Part.from_bytes, forked_map(work, -(-len(conversations) // AT_ONCE)))


def _read(folder: ArrayFolder) -> Encoded:
    about = folder.about
    lengths = folder.array("lengths", np.int32)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    kind = np.uint16 if about["id_bytes"] == 2 else np.uint32
    sparse = _read_sparse(about)
    columns = Columns(
        folder.array("ids", kind), folder.array("trained", np.bool_), offsets, folder.array("rows", np.int64), *sparse
    )
    first = about["first_lossy"]
    known = about["encoding"], about["trained_tokens"], about["counts"], tuple(first) if first else None
    return Encoded(columns, *known, dict(about["beyond"]))
