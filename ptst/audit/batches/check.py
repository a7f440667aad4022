"""One line in anybody's code: what is wrong with the batch that a model is about to get?

    from ptst.audit import check_batch

    check_batch(collator(rows), eos_id=tokenizer.eos_token_id).raise_for_errors()

No model and no tokenizer are needed, and a batch of 4,096 tokens takes less than a millisecond. What cannot be judged
without them is not guessed: `not_checked` names it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptst.audit.batches.arrays import IGNORED, BatchArrays, Ints, read_arrays
from ptst.audit.findings import RULES, Finding
from ptst.errors import UserError

ALIGNED, SHIFTED, UNKNOWN = "aligned", "shifted", "unknown"
CONVENTIONS = {
    ALIGNED: "labels are aligned with the tokens (the model shifts them, as in transformers)",
    SHIFTED: "labels are shifted by one (the model does not shift them)",
    UNKNOWN: "labels are neither the tokens nor the next ones",
}


class Checked(list[Finding]):
    """The findings of a batch. `not_checked`: what could not be judged, and why. `labels`: aligned, shifted or unknown.
    `ignore_index`: the number of ignored labels. `documents`: how many there are."""

    def __init__(self, findings: Iterable[Finding], labels: str, ignore_index: int, documents: int):
        super().__init__(findings)
        self.not_checked: dict[str, str] = {}
        self.labels, self.ignore_index, self.documents = labels, ignore_index, documents

    def raise_for_errors(self) -> None:
        """Raise UserError for the first finding of error level."""
        errors = [f for f in self if f.level == "error"]
        if errors:
            more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0].rule}: {errors[0].cause}{more}", RULES[errors[0].rule].remedy, errors[0].place)

    def __str__(self) -> str:
        lines = [str(f) for f in self] or ["no findings"]
        lines.append(f"{self.documents} documents; {CONVENTIONS[self.labels]}; ignored: {self.ignore_index}")
        return "\n".join((*lines, *(f"not checked: {name}: {why}" for name, why in self.not_checked.items())))


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


def check_batch(
    batch: Any,
    *,
    shifted: bool | None = None,
    ignore_index: int = -100,
    bos_id: int | None = None,
    eos_id: int | Iterable[int] | None = None,
    pad_id: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Checked:
    """What is wrong with a batch: a mapping with `input_ids` and `labels`, optionally `attention_mask`, `position_ids`
    and `cu_seqlens`, `seq_lens` or `seq_idx`, as tensors, arrays or lists; padded (B x T) or packed (1 x T, or T).

    `shifted`: whether labels are shifted by one already, as torchtune and NeMo give them, or aligned with the tokens,
    as transformers' models want them (None: told by the labels). `eos_id`: one or more ids that end an answer. Raises
    UserError for what is no batch: arrays of other lengths, labels that are neither ids nor the ignore index."""
    stops = None if eos_id is None else frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    known = Known(bos_id, stops, pad_id, vocab_size, max_length)
    return check_arrays(read_arrays(batch, ignore_index, pad_id, stops or ()), known, shifted)


def check_arrays(arrays: BatchArrays, known: Known, shifted: bool | None = None) -> Checked:
    """As `check_batch`, of arrays that are read."""
    return check_view(*look(arrays, known, shifted))


def check_view(v: View, found: list[Finding]) -> Checked:
    """All rules on a batch whose labels are recognized. `found`: what `look` found of them."""
    findings = [*found, *(finding for rule in _RULES for finding in rule(v))]
    checked = Checked(findings, v.convention, v.arrays.ignore_index, len(v.arrays.starts))
    checked.not_checked = dict(v.arrays.unread) | v.not_checked
    return checked


def look(a: BatchArrays, known: Known, shifted: bool | None = None) -> tuple[View, list[Finding]]:
    """The batch with the labels' convention recognized, and findings on the labels."""
    ids, labels, last = a.ids, a.labels, a.rows[1:] - 1
    after = np.append(ids[1:], IGNORED)
    after[last] = IGNORED
    counts = labels != IGNORED
    total = int(np.count_nonzero(counts))
    same, following = (np.count_nonzero(counts & (labels == other)) for other in (ids, after))
    open_ends = int(np.count_nonzero(counts[last]))  # of a row whose last label is the token behind it
    is_shifted = following + open_ends > same
    convention = (SHIFTED if is_shifted else ALIGNED) if 2 * max(same, following + open_ends) >= total else UNKNOWN
    if convention == UNKNOWN and (far := _far_off(a, counts, total)):
        v = View(a, known, UNKNOWN, counts, np.full(len(a.starts), IGNORED))
        return v, [v.found("labels", int(np.flatnonzero(counts)[0]), far[0], *far[1:])]
    if not total:
        convention = ALIGNED if not shifted else SHIFTED
    trained = counts.copy()
    over = np.full(len(a.starts), IGNORED)
    if convention == SHIFTED:
        trained[1:], trained[0] = counts[:-1], False
        trained[a.rows[:-1][np.diff(a.rows) > 0]] = False
        over = labels[a.ends - 1] if len(a.ends) else over
    v = View(a, known, convention, trained, over)
    if convention == UNKNOWN:
        v.not_checked["tokens"] = "the labels are not the batch's tokens"
    if not total:
        v.not_checked["labels"] = "no token has a label"
    findings = list(_contradicted(v, counts, shifted)) + list(_not_the_tokens(v, counts, ids, after))
    if convention == SHIFTED:  # what is behind a document is judged by its labels
        trained[a.ends[a.ends < len(ids)]] = False
    return v, findings


def _far_off(a: BatchArrays, counts: Ints, total: int) -> tuple[str, str, str] | None:
    """Labels that are tokens at another distance, in words."""
    places = np.flatnonzero(counts)
    for distance, what in ((2, "they are shifted twice"), (-1, "they are shifted the wrong way")):
        there = places + distance
        fits = (there >= 0) & (there < len(a.ids))
        if np.count_nonzero(a.labels[places[fits]] == a.ids[there[fits]]) > 0.9 * total:
            cause = f"labels are the tokens {distance:+d} places away: {what}"
            at = int(places[fits][0])
            return cause, str(a.ids[at]), str(a.labels[at])
    return None


def _contradicted(v: View, counts: Ints, shifted: bool | None) -> Iterator[Finding]:
    """Labels of another convention than the one stated."""
    if shifted is None or not counts.any() or v.convention == UNKNOWN or (v.convention == SHIFTED) == shifted:
        return
    at = int(np.flatnonzero(counts)[0])
    cause = "labels are the tokens themselves, and nothing shifts them: every token predicts itself"
    if v.convention == SHIFTED:
        cause = "labels are shifted already, and the model shifts them again: every token predicts the next but one"
    yield v.found("labels", at, cause)


def _not_the_tokens(v: View, counts: Ints, ids: Ints, after: Ints) -> Iterator[Finding]:
    """Labels that are not the token (aligned), or not the next one (shifted), and labels across documents."""
    a, wanted = v.arrays, after if v.convention == SHIFTED else ids
    wrong = counts & (a.labels != wanted)
    if v.convention == SHIFTED:
        wrong[a.ends - 1] = False  # behind the last token there may be one more, which only the label has
        wrong[a.rows[1:] - 1] = False
        ends = a.ends[np.isin(a.ends, a.starts) & ~np.isin(a.ends, a.rows)] - 1
        stops = v.known.eos_ids or ()
        crossing = [int(e) for e in ends[counts[ends] & (after[ends] == a.labels[ends])] if int(after[e]) not in stops]
        first = "the last token of a document predicts the first of the next"
    else:
        inner = a.starts[~np.isin(a.starts, a.rows)]
        crossing = [int(at) for at in inner if counts[at]]
        first = "the first token of a document is trained, so the last of the one before predicts it"
    for at in crossing:
        yield v.found("crosses-documents", at, first)
    other, what = (ids, "token itself") if v.convention == SHIFTED else (after, "next token")
    for at, number in v.first_of_each_row(wrong):
        row = int(np.searchsorted(a.rows, at, side="right")) - 1
        here = slice(int(a.rows[row]), int(a.rows[row + 1]))
        others = np.count_nonzero(counts[here] & (a.labels[here] == other[here]))
        cause = f"the label is {a.labels[at]}, the token {wanted[at]}"
        if v.convention != UNKNOWN and others > number // 2 and number > 1:
            cause = f"labels of this row are the {what}, those of other rows are not"
        if a.ids[at] in (-100, IGNORED):
            cause = f"input_ids holds {a.ids[at]}, so it is the same array as the labels"
        yield v.found("labels", at, f"{cause} ({number} in the row)", wanted[at], a.labels[at])


def _ids(v: View) -> Iterator[Finding]:
    """Ids outside of the vocabulary, and arrays of another type."""
    a, size = v.arrays, v.known.vocab_size
    for name in a.floats:
        yield Finding("dtype", "row 0", f"{name} is floating-point", 0)
    outside = (a.ids < 0) | (a.ids >= size) if size is not None else a.ids < 0
    if size is None:
        v.not_checked["token-ids"] = "the size of the vocabulary is not known (vocab_size)"
    for at, number in v.first_of_each_row(outside) if outside.any() else ():
        if a.ids[at] == a.ignore_index:
            cause = f"input_ids holds the ignore index {a.ids[at]}: it is the same array as the labels"
        elif a.ids[at] < 0:
            cause = f"the id is {a.ids[at]}"
        else:
            cause = f"the id is {a.ids[at]}, the embedding has {size} rows"
        yield v.found("token-ids", at, f"{cause} ({number} in the row)", seen=a.ids[at])
    if size is not None and (a.labels >= size).any():
        at = int(np.flatnonzero(a.labels >= size)[0])
        yield v.found("token-ids", at, f"the label is {a.labels[at]}, the output has {size} rows")


def _boundaries(v: View) -> Iterator[Finding]:
    a = v.arrays
    if a.wrong:
        yield Finding("boundaries", "row 0", a.wrong, 0)
    if v.known.max_length is not None:
        lengths = v.counts(np.ones(len(a.ids), bool)) if len(a.rows) > 2 else np.diff(a.rows)
        starts = a.starts if len(a.rows) > 2 else a.rows[:-1]
        for start, length in zip(starts, lengths, strict=True):
            if length > v.known.max_length:
                cause = f"{length} tokens, the limit is {v.known.max_length}"
                yield v.found("too-long", int(start) + v.known.max_length, cause)


def _positions(v: View) -> Iterator[Finding]:
    """Positions that are not the token's index in its document; a whole row may begin anywhere, as rotary positions are
    relative."""
    a = v.arrays
    if a.positions is None:
        return
    lengths = a.ends - a.starts
    index = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = index + np.repeat(a.starts, lengths)
    alone = ~np.isin(a.starts, a.starts[np.flatnonzero(np.diff(a.row_of) == 0)]) if not a.parted else None
    offset = np.where(alone, a.positions[a.starts], 0) if alone is not None else np.zeros(len(a.starts), np.int64)
    wrong = np.flatnonzero(a.positions[places] != index + np.repeat(offset, lengths))
    if not len(wrong):
        return
    numbers = np.repeat(np.arange(len(lengths)), lengths)[wrong]
    _, first = np.unique(numbers, return_index=True)
    for at in first:
        place, expected = int(places[wrong[at]]), int(index[wrong[at]])
        seen = int(a.positions[place])
        yield v.found("position-ids", place, f"position {seen} instead of {expected}", expected, seen)


def _padding(v: View) -> Iterator[Finding]:
    """Padding that is trained or lies inside of a document, tokens that are trained and not attended."""
    a, pad = v.arrays, v.known.pad_id
    if a.real is None:
        if not a.parted and len(a.rows) > 2:
            v.not_checked["padding"] = "there is no attention mask, and the padding's id is not known (pad_id)"
        return
    inside = v.inside()
    trained = v.trained & ~inside
    if v.convention == SHIFTED:  # a label behind the document's end may be its terminator
        padded = a.labels != IGNORED
        trained = padded & ~inside
    for at, number in v.first_of_each_row(trained) if trained.any() else ():
        yield v.found("padding-trained", at, f"{number} {'token' if number == 1 else 'tokens'} of padding")
    holes = inside & ~a.real
    if a.mask is not None:
        for at, number in v.first_of_each_row(holes & v.trained) if holes.any() else ():
            yield v.found("attention-mask", at, f"{number} trained tokens have the attention mask 0")
    for at, number in v.first_of_each_row(holes & ~v.trained) if holes.any() else ():
        if a.mask is None and pad in (v.known.eos_ids or ()):
            continue  # terminators of earlier answers
        yield v.found("padding-inside", at, f"{number} tokens with tokens of the document behind them")
    first = np.searchsorted(a.starts, a.rows[:-1])
    left = [(int(r), int(a.starts[i])) for r, i in zip(a.rows, first, strict=False) if i < len(a.starts)]
    for row, start in left:
        if start > row and not inside[row:start].any() and row == a.rows[np.searchsorted(a.rows, start, "right") - 1]:
            yield Finding("left-padding", v.place(row)[0], f"{start - row} tokens of padding before the text", 0)
            break


def _loss_mask(v: View) -> Iterator[Finding]:
    """Documents without a trained token, with nothing but trained tokens, or that begin in the middle of an answer."""
    a = v.arrays
    if not len(a.starts) or v.convention == UNKNOWN:
        return
    lengths, number = a.ends - a.starts, v.counts(v.trained)
    for at in np.flatnonzero((number == 0) & (v.over == IGNORED)):
        yield v.found("nothing-trained", int(a.starts[at]), f"none of {lengths[at]} tokens is trained")
    begins = (lengths > 2) & v.trained[np.minimum(a.starts + 1, a.ends - 1)]
    begins &= v.trained[np.minimum(a.starts + 2, a.ends - 1)]
    if not begins.any():
        return
    untrained = np.flatnonzero(~v.trained)
    marks = np.concatenate((v.trained, [False]))
    last = np.array(
        [s + np.flatnonzero(marks[s:e])[-1] + 1 for s, e in zip(a.starts[begins], a.ends[begins], strict=True)]
    )
    gaps = np.searchsorted(untrained, last) - np.searchsorted(untrained, a.starts[begins] + 1)
    others = int(np.count_nonzero(~begins & (number > 0)))
    for start, length, gap in zip(a.starts[begins], lengths[begins], gaps, strict=True):
        if gap == 0:
            yield v.found("all-trained", int(start), f"all of {length} tokens are trained, from the first on")
        elif others or v.trained[start]:
            yield v.found("split-document", int(start), "the document begins with trained tokens: a prompt is missing")


def _bos(v: View) -> Iterator[Finding]:
    a, bos = v.arrays, v.known.bos_id
    if bos is None:
        v.not_checked["double-bos"] = v.not_checked["missing-bos"] = "the id of BOS is not known (bos_id)"
        return
    is_bos = a.ids == bos
    twice = np.flatnonzero(is_bos[1:] & is_bos[:-1]) + 1
    if bos == v.known.pad_id or (bos in (v.known.eos_ids or ()) and len(twice)):
        twice = twice[np.isin(twice - 1, a.starts)]
    inside = v.inside() if len(twice) else is_bos
    for at in twice[inside[twice] & ~np.isin(twice, a.starts)] if len(twice) else ():
        yield v.found("double-bos", int(at), f"tokens {v.place(int(at) - 1)[1]} and {v.place(int(at))[1]} are {bos}")
    begins = is_bos[a.starts]
    if not begins.any():
        v.not_checked["missing-bos"] = "no document begins with BOS, and the model may want none"
    elif 2 * np.count_nonzero(begins) >= len(begins):
        for start in a.starts[~begins]:
            yield v.found("missing-bos", int(start), "other documents begin with BOS", bos, a.ids[start])
    else:
        v.not_checked["missing-bos"] = "few documents begin with BOS"


def _eos(v: View) -> Iterator[Finding]:
    """Terminators that are not trained behind a trained answer, and answers that end without one."""
    a, stops = v.arrays, v.known.eos_ids
    if stops is None:
        why = "the ids that end an answer are not known (eos_id)"
        v.not_checked["terminator-untrained"] = v.not_checked["unfinished-answer"] = why
        return
    if v.convention == UNKNOWN:
        return
    is_stop = is_any(a.ids, stops)
    untrained = is_stop & ~v.trained
    untrained[1:] &= v.trained[:-1]
    untrained[0] = False
    untrained[a.starts] = False
    if a.mask is not None:
        untrained &= a.mask != 0
    places = np.flatnonzero(untrained)
    numbers = np.searchsorted(a.starts, places, side="right") - 1
    _, first, totals = np.unique(numbers, return_index=True, return_counts=True)
    for at, total in zip(places[first].tolist(), totals.tolist(), strict=True):
        more = f", and {total - 1} more in the document" if total > 1 else ""
        yield v.found("terminator-untrained", at, f"no label has the {a.ids[at]} behind the answer{more}", a.ids[at])
    ends = a.ends - 1
    if not len(ends):
        return
    seen = np.where(v.over != IGNORED, v.over, a.ids[ends])
    open_end = (v.trained[ends] | (v.over != IGNORED)) & ~is_any(seen, stops)
    for number in np.flatnonzero(open_end):
        last = slice(max(int(a.starts[number]), int(ends[number]) - 2), int(ends[number]))
        if (is_stop[last] & v.trained[last]).any():
            continue  # a line break behind the terminator, which some trainers train, too
        behind = int(a.ends[number])
        if a.mask is None and behind < len(a.ids) and is_stop[behind] and behind not in a.starts:
            continue  # reported above
        cause = "its last token is trained and does not end an answer"
        yield v.found("unfinished-answer", behind - 1, cause, seen=seen[number])


def is_any(ids: Ints, wanted: Iterable[int]) -> Ints:
    """Which ids are one of a few."""
    found = np.zeros(len(ids), bool)
    for one in wanted:
        found |= ids == one
    return found


_RULES = (_ids, _boundaries, _positions, _padding, _loss_mask, _bos, _eos)
