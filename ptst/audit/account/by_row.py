"""What is known of each row, in a few bytes: of millions of rows, sets and lists would take more than all else."""

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np


class RowSet(Collection[int]):
    """Some of the rows from `first` on, `rows` in all, by their numbers from there."""

    def __init__(self, numbers: Iterable[int], first: int, rows: int):
        self._flags = bytearray(rows)
        for number in numbers:
            if 0 <= number - first < rows:
                self._flags[number - first] = 1

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and 0 <= number < len(self._flags) and self._flags[number] == 1

    def __iter__(self) -> Iterator[int]:
        return (number for number, flag in enumerate(self._flags) if flag)

    def __len__(self) -> int:
        return self._flags.count(1)


class StepsByRow(Mapping[int, Sequence[int]]):
    """The steps that took each row, in order."""

    def __init__(self) -> None:
        self._rows, self._steps = array("q"), array("q")
        self._order: np.ndarray | None = None  # of the times, by row; None while there may be more of them

    def add(self, row: int, step: int) -> None:
        """Note that a step took a row."""
        self._rows.append(row)
        self._steps.append(step)
        self._order = None

    def __getitem__(self, row: int) -> list[int]:
        rows, steps = np.asarray(self._rows), np.asarray(self._steps)
        if self._order is None:
            self._order = np.argsort(rows, kind="stable")
        start, end = (int(np.searchsorted(rows, row, side, sorter=self._order)) for side in ("left", "right"))
        if start == end:
            raise KeyError(row)
        return steps[self._order[start:end]].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(np.unique(np.asarray(self._rows)).tolist())

    def __len__(self) -> int:
        return len(np.unique(np.asarray(self._rows)))
