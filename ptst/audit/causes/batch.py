"""Causes that concern a batch as a whole: where its documents begin and end, their positions, their labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ptst.audit.causes.compared import Cause
from ptst.data.packing import IGNORE_INDEX, Batch

_MISSING = "a boundary is missing, and the next document follows"
_MOVED = "the boundary is at another token"
_SPLIT = "the row is split into two documents"


@dataclass(frozen=True)
class Bounds:
    """Boundaries that are not where the rows end, by document. `explained`: the documents that differ from their rows
    for no other reason."""

    causes: dict[int, Cause]
    explained: set[int]


def why_bounds_differ(batch: Batch, expected: Sequence[Sequence[int]]) -> Bounds:
    """Which boundaries are wrong. `expected`: the ids of each document's row."""
    cu, bounds = batch.cu_seqlens, [0, *accumulate(map(len, expected))]
    if cu == bounds:
        return Bounds({}, set())
    if batch.tokens == [i for ids in expected for i in ids]:
        wrong = next(i for i, (a, b) in enumerate(zip([*cu, -1], bounds, strict=False)) if a != b)
        ours, theirs = bounds[wrong], cu[wrong] if wrong < len(cu) else len(batch.tokens)
        start = bounds[wrong - 1]
        words = _MISSING if ours not in cu and len(cu) < len(bounds) else _MOVED
        cause = _bounds_cause(words, ours - start, theirs - start)
        return Bounds({wrong - 1: cause}, set(range(len(expected))))
    empty = {n: Cause("boundaries", 0, "the document is empty") for n, (a, b) in enumerate(pairwise(cu)) if a == b}
    found = Bounds(empty, set(empty))
    if len(cu) != len(expected) + 1:
        return found
    for i in range(len(expected) - 1):
        start, middle, end = cu[i : i + 3]
        both, size = batch.tokens[start:end], len(expected[i])
        if i in found.explained or middle - start == size:
            continue
        if batch.rows[i] == batch.rows[i + 1] and both == list(expected[i]):
            found.causes[i] = _bounds_cause(_SPLIT, len(both), middle - start)
        elif both == [*expected[i], *expected[i + 1]]:
            found.causes[i] = _bounds_cause(_MOVED, size, middle - start)
        else:
            continue
        found.explained.update((i, i + 1))
    return found


def _bounds_cause(words: str, expected: int, seen: int) -> Cause:
    shown = f"a boundary before token {expected}", f"a boundary before token {seen}"
    return Cause("boundaries", min(expected, seen), words, *shown)


def why_positions_differ(batch: Batch) -> Iterator[tuple[int, Cause]]:
    """Each document whose positions do not count from 0; where they run on through the pack, the first of them."""
    runs_on = False
    for number, (start, end) in enumerate(pairwise(batch.cu_seqlens)):
        positions = batch.position_ids[start:end]
        wrong = next((i for i, p in enumerate(positions) if p != i), None)
        if wrong is None:
            continue
        seen = positions[wrong]
        if wrong == 0 and start and seen == batch.position_ids[start - 1] + 1:
            if runs_on:
                continue
            runs_on, words = True, "positions run on from the document before"
        elif wrong == 0 and all(p == i + seen for i, p in enumerate(positions)):
            words = f"positions count from {seen}"
        elif seen == 0:
            words = "positions begin anew inside the document"
        elif seen == positions[wrong - 1]:
            words = "a position is there twice"
        else:
            words = f"position {seen} instead of {wrong}"
        yield number, Cause("position-ids", wrong, words, str(wrong), str(seen))


def why_labels_differ(batch: Batch) -> Iterator[tuple[int, Cause | None]]:
    """Each document with a label that is not the next token; None where the same is wrong as in one before."""
    told: set[str] = set()
    for number, (start, end) in enumerate(pairwise(batch.cu_seqlens)):
        labels = batch.labels[start:end]
        following = [*batch.tokens[start + 1 : end], None][: len(labels)]
        wrong = [i for i, (a, b) in enumerate(zip(labels, following, strict=True)) if a not in (IGNORE_INDEX, b)]
        if not wrong:
            continue
        words, everywhere = _label_words(batch, number, wrong)
        if everywhere and words in told:
            yield number, None
            continue
        told.add(words)
        first = wrong[0]
        shown = "no label" if following[first] is None else f"label {following[first]}", f"label {labels[first]}"
        yield number, Cause("labels", first, words, *shown)


def _label_words(batch: Batch, number: int, wrong: list[int]) -> tuple[str, bool]:
    """What the wrong labels of a document are, and whether that is likely wrong in every document."""
    cu = batch.cu_seqlens
    start, end = cu[number : number + 2]
    tokens, labels = batch.tokens[start:end], batch.labels[start:end]
    labelled = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]

    def is_shifted(by: int) -> bool:
        hits = [i for i in labelled if i + by < len(tokens) and labels[i] == tokens[i + by]]
        return len(labelled) > 1 and len(hits) * 5 >= len(labelled) * 4

    if (lowest := min(labels)) < min(0, IGNORE_INDEX):
        return f"{lowest} is neither a token nor the ignore index, which is {IGNORE_INDEX}", True
    if is_shifted(0):
        return "the labels are the tokens themselves: they are not shifted", True
    if is_shifted(2):
        return "the labels are shifted twice", True
    if wrong == [len(tokens) - 1]:
        if end < len(batch.tokens) and labels[-1] == batch.tokens[end]:
            return "the last token has the next document's first token as its label", True
        return "the last token has a label, but nothing follows", True
    other = [n for n, (a, b) in enumerate(pairwise(cu)) if n != number and _labelled(batch, a, b, labels)]
    if other:
        return f"the labels are those of document {other[0]} of the batch", False
    return f"{len(wrong)} {'labels are' if len(wrong) > 1 else 'label is'} not the next token", False


def _labelled(batch: Batch, start: int, end: int, labels: list[int]) -> bool:
    """Whether the labels are what another document's are, or should be."""
    wanted = [i for i in labels if i != IGNORE_INDEX]
    following = [t for t in batch.labels[start:end] if t != IGNORE_INDEX]
    tokens = batch.tokens[start:end]
    spelled = " ".join(map(str, wanted))
    return bool(wanted) and (wanted == following or f" {spelled} " in f" {' '.join(map(str, tokens))} ")
