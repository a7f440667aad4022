"""A batch of any trainer with its labels' convention, and which of its tokens are trained."""

from dataclasses import dataclass, field

import numpy as np

from ptst.audit.batches.arrays import BatchArrays, Ints
from ptst.audit.findings import Finding

ALIGNED, SHIFTED, UNKNOWN = "aligned", "shifted", "unknown"
CONVENTIONS = {
    ALIGNED: "labels are aligned with the tokens (the model shifts them, as in transformers)",
    SHIFTED: "labels are shifted by one (the model does not shift them)",
    UNKNOWN: "labels are neither the tokens nor the next ones",
}


@dataclass(frozen=True)
class Known:
    """What is known of the model: ids of control tokens (None: not known), rows of the embedding, the length limit."""

    bos_id: int | None = None
    eos_ids: frozenset[int] | None = None
    pad_id: int | None = None
    vocab_size: int | None = None
    max_length: int | None = None


@dataclass
class View:
    """A batch, which of its tokens are trained (are themselves a label), and what is not judged. `over`: for each
    document, the label behind its last token, which shifted labels may have (IGNORED: none)."""

    arrays: BatchArrays
    known: Known
    convention: str
    trained: Ints
    over: Ints
    not_checked: dict[str, str] = field(default_factory=dict)

    @property
    def documents(self) -> list[tuple[int, int]]:
        return list(zip(self.arrays.starts.tolist(), self.arrays.ends.tolist(), strict=True))

    def place(self, token: int) -> tuple[str, int]:
        """Where a token of the flat arrays is: row, with the document if the row has several, and index therein."""
        a = self.arrays
        row = int(np.searchsorted(a.rows, token, side="right")) - 1
        number = int(np.searchsorted(a.starts, token, side="right")) - 1
        if number < 0 or a.starts[number] < a.rows[row]:
            return f"row {row}", token - int(a.rows[row])
        first = int(np.searchsorted(a.starts, a.rows[row]))
        several = bool(np.searchsorted(a.starts, a.rows[row + 1]) - first > 1)
        document = f", document {number - first}" if several else ""
        return f"row {row}{document}", token - int(a.starts[number])

    def found(self, rule: str, token: int, cause: str, expected: object = "", seen: object = "") -> Finding:
        where, index = self.place(token)
        return Finding(rule, where, cause, index, expected=str(expected), seen=str(seen))

    def counts(self, flags: Ints) -> Ints:
        """How many of the flags are set in each document."""
        sums = np.concatenate(([0], np.cumsum(flags)))
        return sums[self.arrays.ends] - sums[self.arrays.starts]

    def inside(self) -> Ints:
        """Which tokens belong to a document."""
        a, change = self.arrays, np.zeros(len(self.arrays.ids) + 1, np.int64)
        np.add.at(change, a.starts, 1)
        np.add.at(change, a.ends, -1)
        return np.cumsum(change[:-1]) > 0

    def first_of_each_row(self, flags: Ints) -> list[tuple[int, int]]:
        """(first such token, how many) of each row with flags."""
        places = np.flatnonzero(flags)
        rows = np.searchsorted(self.arrays.rows, places, side="right") - 1
        _, first, number = np.unique(rows, return_index=True, return_counts=True)
        return list(zip(places[first].tolist(), number.tolist(), strict=True))
