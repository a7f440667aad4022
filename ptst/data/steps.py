"""The steps of a run in a few arrays: a long run has millions."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

import numpy as np

from ptst.data.order import Step

_BLOCK = 1 << 16  # steps that are looked at together


class Steps(Sequence[Step]):
    """Steps in order. `taken`: the indices of their examples, step after step."""

    def __init__(self, steps: Iterable[Step] = ()):
        self.taken, self._ends = array("q"), array("q", [0])
        self._epochs, self._turns = array("d"), array("i")
        for step in steps:
            self.taken.extend(step.examples)
            self._ends.append(len(self.taken))
            self._epochs.append(step.epoch)
            self._turns.append(step.turn)

    def __len__(self) -> int:
        return len(self._epochs)

    @overload
    def __getitem__(self, at: int) -> Step: ...
    @overload
    def __getitem__(self, at: slice) -> "Steps": ...
    def __getitem__(self, at: int | slice) -> "Step | Steps":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self._between(start, max(start, stop)) if step == 1 else Steps(self[i] for i in range(len(self))[at])
        at = range(len(self))[at]
        return Step(self._epochs[at], self.taken[self._ends[at] : self._ends[at + 1]].tolist(), self._turns[at])

    def __iter__(self) -> Iterator[Step]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def fingerprint(self) -> str:
        """sha256 over all of the steps."""
        digest = hashlib.sha256()
        for column in (self.taken, self._ends, self._epochs, self._turns):
            digest.update(column)
        return digest.hexdigest()

    @property
    def most(self) -> int:
        """The most examples that a step takes."""
        ends = np.frombuffer(self._ends, np.int64)
        blocks = range(0, len(self), _BLOCK)
        return max((int(np.diff(ends[at : at + _BLOCK + 1]).max()) for at in blocks), default=0)

    def _between(self, start: int, stop: int) -> Self:
        found, first = type(self)(), self._ends[start]
        found.taken = self.taken[first : self._ends[stop]]
        found._ends = array("q", [end - first for end in self._ends[start : stop + 1]])
        found._epochs, found._turns = self._epochs[start:stop], self._turns[start:stop]
        return found


def taken_by(steps: Iterable[Step]) -> array:
    """The indices of the examples that steps take, one after another."""
    return steps.taken if isinstance(steps, Steps) else array("q", [i for step in steps for i in step.examples])


def most_taken(steps: Iterable[Step]) -> int:
    """The most examples that a step takes."""
    return steps.most if isinstance(steps, Steps) else max((len(step.examples) for step in steps), default=0)
