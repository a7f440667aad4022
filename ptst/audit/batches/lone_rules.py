"""The rules on a batch alone, without a model and without its messages, once its labels are recognized."""

from collections.abc import Iterable, Iterator

import numpy as np

from ptst.audit.batches.arrays import IGNORED, Ints
from ptst.audit.batches.view import SHIFTED, UNKNOWN, View
from ptst.audit.findings import Finding


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


LONE_RULES = (_ids, _boundaries, _positions, _padding, _loss_mask, _bos, _eos)
