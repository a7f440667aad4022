"""Our figures beside the paper's, and its claims, of a grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptst.errors import UserError
from ptst.experiment.paper.beside import Beside, Comparison, beside_paper
from ptst.experiment.paper.claims import Claim, claims
from ptst.reporting.curves import safety_tasks
from ptst.reporting.material import Material
from ptst.reporting.tables import Table

HEAD = ("trained under", "tested under", "set", "the paper's", "ours", "difference", "95 % interval", "agrees", "note")
_LONG = ("train", "mixed", "test", "set", "metric", "unit", "papers", "papers_sd", "ours", "low", "high", "difference",
         "difference_low", "difference_high", "agrees", "note")  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables beside ours. `summary`: how many cells both have, and how many agree; `departures`: in
    what the settings are not the paper's; `notes`: what the last column numbers, from 1."""

    title: str
    summary: str
    departures: Sequence[str]
    notes: Sequence[str]
    table: Table


@dataclass(frozen=True)
class PaperSection:
    """`tables`: none of a grid of another model or other data; `claims`: the six."""

    tables: Sequence[PaperTable]
    claims: Sequence[Claim]


def paper_section(of: Material) -> PaperSection | None:
    """The section of a grid; None of anything else, and of a grid that has nothing to compare: no table of the paper is
    of its model and data, and no harmful requests. Raises UserError where the comparison cannot be made."""
    record = of.records.get("the grid")
    if of.kind != "grid" or record is None:
        return None
    results: Mapping[str, Any] = {**record, **of.summary}
    try:
        found, told = beside_paper(results), claims(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the results cannot be read for it ({error!r})") from None
    missing = all(check.outcome == "missing" for claim in told for check in claim.checks)
    if not found and (missing or not safety_tasks(of.summary)):
        return None
    return PaperSection([_shown(each) for each in found], told)


def _shown(comparison: Comparison) -> PaperTable:
    notes = list(dict.fromkeys(row.why for row in comparison.rows if row.why and row.ours is not None))
    # Cells that are not here are counted, and in the CSV; of a grid that has none of them, all are shown.
    rows = [_row(row, notes) for row in comparison.rows if row.ours is not None or not comparison.measured]
    head = f"{comparison.measured} of {len(comparison.rows)} cells were measured here"
    told = f"{head}; in {comparison.agreeing} of them the interval of the difference holds 0."
    caption = f"Table {comparison.table} of the paper beside ours: {comparison.title}."
    values = _LONG, [_values(row) for row in comparison.rows]
    table = Table(f"paper.table-{comparison.table}", caption, HEAD, rows, numbers=3, values=values)
    return PaperTable(f"Table {comparison.table}: {comparison.title}", told, comparison.departures, notes, table)


def _row(row: Beside, notes: Sequence[str]) -> list[str]:
    cell = row.cell
    train = (cell.train or "no fine-tuning") + (f" + {cell.mixed}" if cell.mixed else "")
    theirs = f"{cell.value:g}" + ("" if cell.sd is None else f" \u00b1 {cell.sd:g}")
    digits = 1 if cell.unit == "%" else 3
    ours = "not measured" if row.ours is None else f"{row.ours:.{digits}f}"
    difference = "-" if row.difference is None else f"{row.difference:+.{digits}f}"
    ends = row.difference_interval
    interval = "-" if ends is None else f"{ends[0]:+.{digits}f} to {ends[1]:+.{digits}f}"
    agrees = {True: "yes", False: "no", None: "-"}[row.agrees]
    note = str(notes.index(row.why) + 1) if row.why in notes else ""
    return [train, cell.test, f"{cell.set}, {cell.metric}", theirs, ours, difference, interval, agrees, note]


def _values(row: Beside) -> list[object]:
    cell = row.cell
    place = [cell.train or "", cell.mixed or "", cell.test, cell.set, cell.metric, cell.unit]
    ends = (*(row.interval or (None, None)), row.difference, *(row.difference_interval or (None, None)))
    return [*place, cell.value, cell.sd, row.ours, *ends, row.agrees, row.why]
