"""Which rows a run must take of its data, by the rules of docs/data.md alone: shares nothing with
`ptst.data.selection`."""

from collections.abc import Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal
from hashlib import sha256
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.mixes import asked_mix

if TYPE_CHECKING:
    from ptst.data.examples import TrainingSource
    from ptst.data.sources import Source
    from ptst.training.config import TrainConfig


def expected_rows(settings: "TrainConfig", sizes: Sequence[int]) -> list[Sequence[int]]:
    """The numbers of the rows of each source, the main one first, that must be trained on; `sizes`: how many rows each
    has."""
    main: Sequence[int] = range(sizes[0])
    if settings.subsample is not None:
        points = {row: sha256(b"subsample %d %d" % (settings.seed, row)).hexdigest() for row in main}
        highest = sorted(points.values())[settings.subsample - 1]
        main = [row for row in main if points[row] <= highest]
    mixed, all_taken = list[Sequence[int]](), 0
    for text, size in zip(settings.mix, sizes[1:], strict=True):
        share, number = asked_mix(text).share, size
        if share is not None:
            number = int((share * len(main) / Decimal(100)).quantize(Decimal(1), ROUND_HALF_UP))
            all_taken += number
        mixed.append(range(number))
    if not all_taken:
        return [main, *mixed]
    points = {at: sha256(b"replaced %d" % at).hexdigest() for at in range(len(main))}
    replaced = set(sorted(points, key=points.__getitem__)[:all_taken])
    return [[row for at, row in enumerate(main) if at not in replaced], *mixed]


def check_selection(
    settings: "TrainConfig", whole: Sequence["Source"], training: Sequence["TrainingSource"]
) -> Iterator[Finding]:
    """Rule `selection`: each source has the rows that the settings leave it, in their order, and says of every other
    one that it is left out. `whole`: the sources with all rows that were read."""
    due = expected_rows(settings, [len(source.conversations) for source in whole])
    for number, (source, rows, found) in enumerate(zip(whole, due, training, strict=True)):
        every = range(len(source.conversations))
        if found.source.conversations is source.conversations and rows == every and not found.left_out:
            continue  # the very rows that were read, and all of them
        wanted, seen = [source.conversations[row] for row in rows], found.source.conversations
        place = next((b.source for a, b in zip(wanted, seen, strict=False) if a != b), "")
        if place or len(wanted) != len(seen):
            cause = f"{source.name}: the {len(seen)} rows that are taken are not the {len(wanted)} of the settings"
            yield Finding("selection", place, cause, expected=str(len(wanted)), seen=str(len(seen)))
        kept = {c.source for c in wanted}
        if number == 0 and set(found.left_out) != {c.source for c in source.conversations} - kept:
            cause = f"{source.name}: other rows are said to be left out than those that are"
            expected, seen_out = len(source.conversations) - len(kept), len(found.left_out)
            yield Finding("selection", "", cause, expected=str(expected), seen=str(seen_out))
