"""The account of a run's data: what became of every row of every source, and in which steps it was trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ptst.audit.account.by_row import RowSet
from ptst.audit.account.fates import Fate
from ptst.audit.account.ledger import Account, LedgerSource
from ptst.data.selection import REPLACED, UNDRAWN

COLUMNS = {
    "read": "rows that were read",
    "undrawn": "rows not drawn for the sample",
    "replaced": "rows replaced by those of another source",
    "bad": "rows that cannot be trained on",
    "dropped": "rows too long, left out",
    "untrained": "rows without a trained token",
    "cut": "rows cut to the length limit",
    "examples": "rows that became an example",
    "trained": "examples in a batch of a step",
    "taken": "times that examples were in one",
    "epochs": "epochs as asked",
    "steps": "optimizer steps with such a batch",
    "first": "the first of them",
    "last": "the last of them",
}


@dataclass(frozen=True)
class SourceAccount:
    """The account of one source. Numbers of rows, as `COLUMNS` says; `read_rows`: of each row, by its place, the steps
    that took it, or what became of it. `template`: the source's own; None: that of the run."""

    name: str
    part: str
    read: int
    undrawn: int
    replaced: int
    bad: int
    dropped: int
    untrained: int
    cut: int
    examples: int
    trained: int
    taken: int
    epochs: float
    steps: int
    first: int | None
    last: int | None
    read_rows: Callable[[], dict[str, Sequence[int] | str]]
    template: str | None = None

    @property
    def rows(self) -> dict[str, Sequence[int] | str]:
        """Of each row, by its place, the steps that took it, or what became of it. Made anew: of millions of rows it is
        large."""
        return self.read_rows()

    @property
    def title(self) -> str:
        """The source's name, with what sets it apart from the main data."""
        part = f" ({self.part})" * (self.part != "training")
        return self.name + part + (f" under {self.template}" if self.template else "")

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in vars(self).items() if name not in ("read_rows", "template")}
        return {**known, "rows": self.rows, "template": self.template}


def write_account(
    source: LedgerSource,
    part: str,
    account: Account,
    fates: Sequence[Fate],
    places: Sequence[str],
    steps_of: Mapping[int, Sequence[int]],
    left_out: Mapping[str, str],
    template: str | None = None,
) -> SourceAccount:
    """The account of a source from its ledger. `fates`, `places`: of its rows. `left_out`: what became of its other
    rows, by place: "bad" (it could not be read), "undrawn" or "replaced". `template`: of its own, by its name."""
    examples, kinds = RowSet(source.examples, source.first, source.rows), [fate.kind for fate in fates]
    others = list(left_out.values())

    def read_rows() -> dict[str, Sequence[int] | str]:
        rows: dict[str, Sequence[int] | str] = dict(left_out)
        for row, place in enumerate(places):
            without = kinds[row] if kinds[row] in ("dropped", "untrained") else "bad"
            rows[place] = steps_of.get(source.first + row, []) if row in examples else without
        return rows

    too_long = kinds.count("dropped") + kinds.count("untrained")
    return SourceAccount(
        name=source.name,
        part=part,
        read=len(kinds) + len(others),
        undrawn=others.count(UNDRAWN),
        replaced=others.count(REPLACED),
        bad=len(kinds) + others.count("bad") - len(examples) - too_long,
        dropped=kinds.count("dropped"),
        untrained=kinds.count("untrained"),
        cut=sum(kind == "cut" and n in examples for n, kind in enumerate(kinds)),
        examples=len(examples),
        trained=sum(row in examples for row in RowSet(steps_of, source.first, source.rows)),
        taken=account.visits,
        epochs=source.epochs,
        steps=account.steps,
        first=account.first_step,
        last=account.last_step,
        read_rows=read_rows,
        template=template,
    )


def account_table(accounts: Sequence[SourceAccount]) -> Table:
    """The accounts as a table for a terminal: a column for each source, as there are more numbers than sources."""
    out = Table(title="account of the rows", title_justify="left", box=None, pad_edge=False)
    out.add_column("")
    for account in accounts:
        out.add_column(Text(account.title), justify="right")
    for name, meaning in COLUMNS.items():
        values = (getattr(account, name) for account in accounts)
        out.add_row(meaning, *("" if v is None else f"{v:g}" for v in values))
    return out
