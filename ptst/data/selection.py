"""Which rows of its data a run takes: a subsample of the training data, and a share of them that give way to other
data.

Rows are ranked by the sha256 of a text with their number in the data, from 0: of "subsample SEED NUMBER" for a
subsample, which keeps the lowest, and of "replaced NUMBER" for what is replaced, the lowest of what is left. So every
seed draws another sample, and the rows that a share replaces are the same for every seed, and are replaced by any
larger share, too. Rows that stay keep their order.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from ptst.data.examples import TrainingSource
from ptst.data.kept_rows import chosen_rows, place_of
from ptst.errors import Setting, UserError

UNDRAWN, REPLACED = "undrawn", "replaced"  # what became of a row that is left out


def select(asked: Sequence[TrainingSource], count: int | None = None, seed: int = 0) -> list[TrainingSource]:
    """The sources of a run, the main one first, with the rows that are trained on: `count` of the main one's, drawn
    with `seed`; the rows of a source with a share take the place of so many of these, for as many epochs unless they
    have their own. Rows left out are named in `TrainingSource.left_out`.

    Raises UserError for more rows than there are, and for a share of no row."""
    main, others = asked[0], []
    if count is not None:
        total = len(main.source.conversations)
        if count > total:
            cause = (Setting("subsample"), f" is {count}, and {main.source.name} has {total} rows")
            raise UserError(cause, "draw no more than there are")
        main = _without(main, _lowest(f"subsample {seed}", total)[count:], UNDRAWN)
    rows, taken = len(main.source.conversations), 0
    for other in asked[1:]:
        if other.share:
            number = _rows_of_share(other, rows, main.source.name)
            chosen = replace(other.source, conversations=other.source.conversations[:number])
            other, taken = replace(other, source=chosen, epochs=other.epochs or main.epochs), taken + number
        others.append(other)
    if taken and taken >= rows:
        cause = (Setting("mix"), f" replaces {taken} rows, and {main.source.name} has {rows}")
        raise UserError(cause, "leave at least one of them")
    replaced = _lowest("replaced", rows)[:taken] if taken else []
    return [_without(main, replaced, REPLACED), *others]


def selection_notes(sources: Sequence[TrainingSource]) -> list[str]:
    """What was left out, in lines of words."""
    lines = []
    for each in sources:
        kinds, stay = list(each.left_out.values()), len(each.source.conversations)
        if undrawn := kinds.count(UNDRAWN):
            total = stay + len(kinds)
            lines.append(f"{each.source.name}: {total - undrawn} of {total} rows are drawn with the run's seed")
        if replaced := kinds.count(REPLACED):
            by = ", ".join(f"{len(s.source.conversations)} of {s.source.name}" for s in sources if s.share)
            lines.append(f"{each.source.name}: {replaced} of {stay + replaced} rows are replaced by {by}")
    return lines


def _rows_of_share(other: TrainingSource, rows: int, main: str) -> int:
    """How many of `rows` rows a share is, to the nearest, halves up."""
    asked, available = f"{other.share:g}%", len(other.source.conversations)
    number = math.floor(Fraction(repr(other.share)) * rows / 100 + Fraction(1, 2))
    name = f"{other.source.name}:{asked}"
    if number == 0:
        cause = (Setting("mix"), f" {name} is no row: {main} has {rows} rows")
        raise UserError(cause, f"leave it out for none, or give at least {math.ceil(5000 / max(1, rows)) / 100:g}%")
    if number > available:
        cause = (Setting("mix"), f" {name} is {number} of {rows} rows, and {other.source.name} has {available}")
        raise UserError(cause, "give a smaller share, or other data")
    return number


def _lowest(text: str, rows: int) -> list[int]:
    """All row numbers, in the order of their hashes."""
    return sorted(range(rows), key=lambda row: hashlib.sha256(f"{text} {row}".encode()).digest())


def _without(each: TrainingSource, rows: Iterable[int], kind: str) -> TrainingSource:
    """A source without these rows."""
    conversations, out = each.source.conversations, set(rows)
    if not out:
        return each
    left_out = {**each.left_out, **{place_of(conversations, row): kind for row in sorted(out)}}
    kept = chosen_rows(conversations, (row for row in range(len(conversations)) if row not in out))
    return replace(each, source=replace(each.source, conversations=kept), left_out=left_out)
