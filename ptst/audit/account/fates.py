"""What must become of every row, by length and loss mask of its reference, and whether preparing it did that."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ptst.audit.account.document_check import document_hash
from ptst.audit.findings import Finding
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.records import DataRecord


@dataclass(frozen=True)
class Fate:
    """`kind`: bad (it cannot be trained on), dropped, untrained (nothing of it is trained), cut, or whole. `tokens`,
    `trained`: of the example, 0 where there is none. `long`: above the limit."""

    kind: str
    tokens: int = 0
    trained: int = 0
    long: bool = False
    boundaries: int = 0
    lossy: bool = False

    @property
    def is_example(self) -> bool:
        return self.kind in ("cut", "whole")


def find_fate(reference: Reference | UserError, setup: Setup) -> Fate:
    """What must become of a row under a setup."""
    if isinstance(reference, UserError):
        return Fate("bad")
    size, loss_mask, limit = len(reference.ids), reference.loss_mask, setup.max_length
    told = len(reference.token_boundaries), bool(reference.lossy)
    long = limit is not None and size > limit
    if long and setup.too_long != "cut":
        return Fate("dropped", 0, 0, long, *told) if setup.too_long == "drop" else Fate("bad")
    if long:
        size, loss_mask = limit or 0, loss_mask[:limit]
    if not (trained := loss_mask.count(True)):
        return Fate("untrained", 0, 0, long, *told)
    return Fate("cut" if long else "whole", size, trained, long, *told)


def expected_document(reference: Reference | UserError, setup: Setup) -> int:
    """The hash of the document that a row must become; of one that becomes an example."""
    assert isinstance(reference, Reference)
    return document_hash(reference.ids[: setup.max_length], reference.loss_mask[: setup.max_length])


@dataclass
class Counted:
    """Fates of a source's rows, counted as its record has them."""

    rows: int = 0
    examples: int = 0
    dropped: int = 0
    cut: int = 0
    untrained: int = 0
    token_boundaries: int = 0
    lossy: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, fates: Sequence[Fate], bad: Collection[int] = ()) -> None:
        """Count rows; `bad`: indices of those with an error, which only count as rows."""
        good = [fate for row, fate in enumerate(fates) if row not in bad]
        examples = [fate for fate in good if fate.is_example]
        self.rows += len(fates)
        self.examples += len(examples)
        self.dropped += sum(fate.kind == "dropped" for fate in good)
        self.cut += sum(fate.long and fate.kind in ("cut", "untrained") for fate in good)
        self.untrained += sum(fate.kind == "untrained" for fate in good)
        self.token_boundaries += sum(fate.boundaries for fate in good)
        self.lossy += sum(fate.lossy for fate in good)
        self.tokens += sum(fate.tokens for fate in examples)
        self.trained_tokens += sum(fate.trained for fate in examples)

    def merge(self, other: "Counted") -> None:
        """Add what was counted elsewhere."""
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)

    def check(self, record: DataRecord) -> Iterator[Finding]:
        """Counts of a record that are not those of the rows."""
        for name, number in vars(self).items():
            if (recorded := getattr(record, name)) != number:
                yield Finding("miscounted", record.name, f"{name} is {recorded}, and by the rows {number}")
        if not self.examples:
            yield Finding("no-example", record.name, f"none of its {self.rows} rows is left to train on")


def check_left_out(
    places: Sequence[str], fates: Sequence[Fate], made: Collection[int], bad: Collection[int] = ()
) -> Iterator[Finding]:
    """Rows that were left out though they can be trained on. `places`: their names. `made`: indices of those that
    became examples; `bad`: of those with an error."""
    for row, fate in enumerate(fates):
        if fate.is_example and row not in made and row not in bad:
            cause = f"it has {fate.tokens} tokens, {fate.trained} of them trained, and no example"
            yield Finding("left-out", places[row], cause)


def check_prepared(
    record: DataRecord, places: Sequence[str], fates: Sequence[Fate], made: Collection[int], bad: Collection[int]
) -> Iterator[Finding]:
    """A source's rows that were left out though they can be trained on, and counts that are not those of its rows.
    `places`: names of its rows. `made`: indices of those that became examples; `bad`: of those with an error."""
    yield from check_left_out(places, fates, made, bad)
    counted = Counted()
    counted.add(fates, bad)
    yield from counted.check(record)
