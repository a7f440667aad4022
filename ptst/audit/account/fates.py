"""What must become of every row, by length and loss mask of its reference, and whether preparing it did that."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from ptst.audit.account.document_check import document_hash
from ptst.audit.findings import Finding
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.records import DataRecord


@dataclass(frozen=True)
class Fate:
    """`kind`: bad (it cannot be trained on), dropped, untrained (nothing of it is trained), cut, or whole. `tokens`,
    `trained`: of the example, 0 where there is none; `document`: its hash. `long`: above the limit."""

    kind: str
    tokens: int = 0
    trained: int = 0
    document: int | None = None
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
    ids, loss_mask, limit = reference.ids, reference.loss_mask, setup.max_length
    long = limit is not None and len(ids) > limit
    counted = Fate("dropped", long=long, boundaries=len(reference.token_boundaries), lossy=bool(reference.lossy))
    if long and setup.too_long != "cut":
        return counted if setup.too_long == "drop" else Fate("bad")
    ids, loss_mask = ids[:limit], loss_mask[:limit]
    if not any(loss_mask):
        return replace(counted, kind="untrained")
    own = document_hash(ids, loss_mask)
    return replace(counted, kind="cut" if long else "whole", tokens=len(ids), trained=sum(loss_mask), document=own)


def check_prepared(
    record: DataRecord, places: Sequence[str], fates: Sequence[Fate], made: Collection[int], bad: Collection[int]
) -> Iterator[Finding]:
    """A source's rows that were left out though they can be trained on, and counts that are not those of its rows.
    `places`: names of its rows. `made`: indices of those that became examples; `bad`: of those with an error."""
    for row, fate in enumerate(fates):
        if fate.is_example and row not in made and row not in bad:
            cause = f"it has {fate.tokens} tokens, {fate.trained} of them trained, and no example"
            yield Finding("left-out", places[row], cause)
    good = [fate for row, fate in enumerate(fates) if row not in bad]
    examples = [fate for fate in good if fate.is_example]
    counted = {
        "rows": len(places),
        "examples": len(examples),
        "dropped": sum(fate.kind == "dropped" for fate in good),
        "cut": sum(fate.long and fate.kind in ("cut", "untrained") for fate in good),
        "untrained": sum(fate.kind == "untrained" for fate in good),
        "token_boundaries": sum(fate.boundaries for fate in good),
        "lossy": sum(fate.lossy for fate in good),
        "tokens": sum(fate.tokens for fate in examples),
        "trained_tokens": sum(fate.trained for fate in examples),
    }
    for name, number in counted.items():
        if (recorded := getattr(record, name)) != number:
            yield Finding("miscounted", record.name, f"{name} is {recorded}, and by the rows {number}")
    if not examples:
        yield Finding("no-example", record.name, f"none of its {len(places)} rows is left to train on")
