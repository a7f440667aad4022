"""Examples as columns: the ids of all examples in one array, their loss masks in another, and where each begins.

An `Example` is made when it is asked for, so that millions of them need a few bytes for each token. The arrays may lie
in memory or in files that are mapped into it (`ptst.data.encode_rows`); nothing here writes to them.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, overload

import numpy as np

from ptst.text.encode import Example, Lossy

SMALL = 1 << 16  # ids below it take two bytes, others four
_BLOCK = 4096  # examples that are read at once


def id_type(vocab_size: int) -> np.dtype:
    """The type of ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size <= SMALL else np.uint32)


@dataclass(frozen=True, eq=False)
class Columns:
    """N examples of T tokens in all. `ids`, `trained` (the loss mask): of T. `offsets`: of N + 1, where each example
    begins. `rows`: of N, the index of each one's conversation, ascending. `token_boundaries`, `lossy`: of examples that
    have any, by index."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    token_boundaries: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    lossy: Mapping[int, tuple[Lossy, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Columns":
        """Examples as columns in memory."""
        ids = np.array(array("q", [*chain.from_iterable(e.ids for e in examples)]), np.int64)
        trained = np.frombuffer(bytes([*chain.from_iterable(e.loss_mask for e in examples)]), np.bool_)
        return cls(
            ids.astype(id_type(int(ids.max(initial=0)) + 1)),
            trained,
            np.array([0, *accumulate(len(e.ids) for e in examples)], np.int64),
            np.array([e.row for e in examples], np.int64),
            {at: e.token_boundaries for at, e in enumerate(examples) if e.token_boundaries},
            {at: e.lossy for at, e in enumerate(examples) if e.lossy},
        )

    @classmethod
    def joined(cls, parts: Sequence["Columns"]) -> "Columns":
        """Several one after another, in memory."""
        starts = [0, *accumulate(len(part) for part in parts)]
        tokens = [0, *accumulate(len(part.ids) for part in parts)]
        return cls(
            _concatenated([part.ids for part in parts], np.uint16),
            _concatenated([part.trained for part in parts], np.bool_),
            _concatenated(
                [np.zeros(1, np.int64), *(p.offsets[1:] + at for p, at in zip(parts, tokens, strict=False))], np.int64
            ),
            _concatenated([part.rows for part in parts], np.int64),
            {at + s: v for part, s in zip(parts, starts, strict=False) for at, v in part.token_boundaries.items()},
            {at + s: v for part, s in zip(parts, starts, strict=False) for at, v in part.lossy.items()},
        )

    def example(self, at: int, first_row: int = 0) -> Example:
        """The example at an index; `first_row` is added to its row."""
        start, end = int(self.offsets[at]), int(self.offsets[at + 1])
        return Example(
            self.ids[start:end].tolist(),
            self.trained[start:end].tolist(),
            self.token_boundaries.get(at, ()),
            self.lossy.get(at, ()),
            int(self.rows[at]) + first_row,
        )


def _concatenated(arrays: Sequence[np.ndarray], empty: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, empty)


class ExampleArrays(Sequence[Example]):
    """The examples of one or more sources in turn. `parts`: the columns of each, with the index of its first row among
    those of all."""

    def __init__(self, *parts: tuple[Columns, int]):
        self.parts = parts
        self._starts = [0, *accumulate(len(columns) for columns, _ in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"example {at} of {len(self)}")
        columns, first_row, at = self._place(at)
        return columns.example(at, first_row)

    def _place(self, at: int) -> tuple[Columns, int, int]:
        number = bisect_right(self._starts, at % len(self)) - 1
        return (*self.parts[number], at % len(self) - self._starts[number])

    def length(self, at: int) -> int:
        """Tokens of the example at an index."""
        columns, _, at = self._place(at)
        return int(columns.offsets[at + 1] - columns.offsets[at])

    def __iter__(self) -> Iterator[Example]:
        for columns, first_row in self.parts:
            for at in range(len(columns)):
                yield columns.example(at, first_row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> array:
        """Tokens of each example."""
        return _array((columns.offsets[1:] - columns.offsets[:-1] for columns, _ in self.parts), "i")

    @property
    def rows(self) -> array:
        """The row of each example, ascending."""
        last = max((int(columns.rows.max(initial=0)) + first for columns, first in self.parts), default=0)
        return _array((columns.rows + first for columns, first in self.parts), "i" if last < 1 << 31 else "q")

    def blocks(self) -> Iterator[Columns]:
        """The examples, some thousands at a time, with their rows among those of all sources. Nothing that belongs to
        single examples alone (`token_boundaries`, `lossy`) is in them."""
        for columns, first_row in self.parts:
            for at in range(0, len(columns), _BLOCK):
                offsets = columns.offsets[at : at + _BLOCK + 1]
                start, end = int(offsets[0]), int(offsets[-1])
                rows = columns.rows[at : at + _BLOCK] + first_row
                yield Columns(columns.ids[start:end], columns.trained[start:end], offsets - start, rows)

    def between(self, first_row: int, end_row: int) -> list[Example]:
        """The examples of the rows from `first_row` up to `end_row`, in order."""
        found: list[Example] = []
        for (columns, first), ascending in zip(self.parts, self._ascending, strict=True):
            rows, wanted = columns.rows, (first_row - first, end_row - first)
            if ascending:
                numbers: Iterable[int] = range(*map(int, np.searchsorted(rows, wanted)))
            else:
                numbers = np.flatnonzero((rows >= wanted[0]) & (rows < wanted[1])).tolist()
            found += [columns.example(at, first) for at in numbers]
        return found

    @cached_property
    def _ascending(self) -> list[bool]:
        return [bool((np.diff(columns.rows) >= 0).all()) for columns, _ in self.parts]


def _array(parts: Iterable[np.ndarray], kind: str) -> array:
    """Whole numbers in as few bytes as they need: several of these are kept for each example."""
    found = array(kind)
    for part in parts:
        found.frombytes(np.ascontiguousarray(part, kind).data.cast("B"))
    return found


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Tokens of each example."""
    return examples.lengths if isinstance(examples, ExampleArrays) else [len(e.ids) for e in examples]


def rows_of(examples: Sequence[Example]) -> Sequence[int]:
    """The row of each example."""
    return examples.rows if isinstance(examples, ExampleArrays) else [e.row for e in examples]


def example_length(examples: Sequence[Example], at: int) -> int:
    """Tokens of one example."""
    return examples.length(at) if isinstance(examples, ExampleArrays) else len(examples[at].ids)


def trained_of(examples: Sequence[Example]) -> Sequence[int]:
    """The tokens of each example that the loss is over: nothing predicts its first."""
    if not isinstance(examples, ExampleArrays):
        return [sum(e.loss_mask[1:]) for e in examples]
    found = array("q")
    for block in examples.blocks():
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(block.trained, dtype=np.int64)])
        starts = np.minimum(block.offsets[:-1] + 1, block.offsets[1:])
        found.frombytes((before[block.offsets[1:]] - before[starts]).tobytes())
    return found
