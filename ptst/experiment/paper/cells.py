"""The figures of the paper as data: every cell of its Tables 1 to 7, and what can be read of its Figures 2 and 3.

They are in `tables.json`, as blocks: one part of a table, on one set and one metric, with training templates in rows
(null: the model without fine-tuning) and test templates in columns. A value is [mean] or [mean, SD over the seeds].
Cells that contradict the paper's other figures, or the number of prompts, are flagged there, each with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ptst.errors import UserError

TABLES = range(1, 8)
METRICS = {"exact-match": "%", "accuracy": "%", "asr": "%", "bertscore": "F1"}
SAFETY_DATA = "safety"  # what `mixed` says of runs with safety data


@dataclass(frozen=True)
class PaperCell:
    """A figure of a table. `train` None: the model without fine-tuning. `mixed`: what was mixed into the training data
    (SAFETY_DATA or ""). `set`: what it was measured on, `prompts` of it. `value` and `sd`: in `unit`; the SD is the
    population SD over `seeds` runs or decodings (`sd_over`: "training" or "decoding"). `inconsistent`: why it should
    not be compared with ("": it may)."""

    table: int
    block: str
    model: str
    data: str
    train: str | None
    mixed: str
    test: str
    set: str
    metric: str
    unit: str
    value: float
    sd: float | None
    sd_over: str
    seeds: int
    prompts: int
    inconsistent: str = ""

    @property
    def place(self) -> tuple[str, str | None, str, str]:
        """Where it is printed: block, row (training template, and what was mixed in) and column."""
        return self.block, self.train, self.mixed, self.test


@dataclass(frozen=True)
class CurvePoint:
    """`at`: epochs or examples of training, 0 before it; None where the figure does not tell."""

    at: float | None
    helpfulness: float
    asr: float


@dataclass(frozen=True)
class Curve:
    """A line of Figure 2: a training, tested while it goes on. `unit` of `at`: epochs or examples."""

    figure: str
    model: str
    data: str
    unit: str
    train: str
    test: str
    points: tuple[CurvePoint, ...]
    note: str = ""


@dataclass(frozen=True)
class FigurePoint:
    """A mark of Figure 3, in per cent."""

    figure: str
    model: str
    data: str
    train: str
    test: str
    asr: float
    helpfulness: float


@dataclass(frozen=True)
class Paper:
    """Everything that `tables.json` holds. `left_out`: the reason by the number of a table that is not there; `notes`:
    on blocks, by their name. Figures 2 and 3 are read off the pictures, to about 0.2 points."""

    source: Mapping[str, str]
    cells: tuple[PaperCell, ...]
    curves: tuple[Curve, ...]
    points: tuple[FigurePoint, ...]
    left_out: Mapping[int, str]
    notes: Mapping[str, str]

    def table(self, number: int) -> tuple[PaperCell, ...]:
        """The cells of a table. Raises UserError for one that is not there."""
        if number not in TABLES:
            why = self.left_out.get(number, "the paper has no results in it")
            raise UserError(f"table {number} is not among the tables with results here: {why}", "choose one of 1 to 7")
        return tuple(cell for cell in self.cells if cell.table == number)
