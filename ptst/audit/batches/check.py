"""One line in anybody's code: what is wrong with the batch that a model is about to get?

    from ptst.audit import check_batch

    check_batch(collator(rows), eos_id=tokenizer.eos_token_id).raise_for_errors()

No model and no tokenizer are needed, and a batch of 4,096 tokens takes less than a millisecond. What cannot be judged
without them is not guessed: `not_checked` names it.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from ptst.audit.batches.arrays import IGNORED, BatchArrays, Ints, read_arrays
from ptst.audit.batches.lone_rules import LONE_RULES
from ptst.audit.batches.view import ALIGNED, CONVENTIONS, SHIFTED, UNKNOWN, Known, View
from ptst.audit.findings import RULES, Finding
from ptst.errors import UserError


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
        number = f"{self.documents} document{'s' * (self.documents != 1)}"
        lines.append(f"{number}; {CONVENTIONS[self.labels]}; ignored: {self.ignore_index}")
        return "\n".join((*lines, *(f"not checked: {name}: {why}" for name, why in self.not_checked.items())))


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
    stops = None if eos_id is None else frozenset(_whole_numbers("eos_id", eos_id))
    given = {"bos_id": bos_id, "pad_id": pad_id, "vocab_size": vocab_size, "max_length": max_length}
    one = {name: None if value is None else _whole_number(name, value) for name, value in given.items()}
    known = Known(one["bos_id"], stops, one["pad_id"], one["vocab_size"], one["max_length"])
    ignored = _whole_number("ignore_index", ignore_index)
    return check_arrays(read_arrays(batch, ignored, known.pad_id, stops or ()), known, shifted)


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)  # of int, and of a number of numpy or torch
    except TypeError:
        raise UserError(f"{name} is {value!r}, not a whole number", "give the tokenizer's or the model's") from None


def _whole_numbers(name: str, value: Any) -> list[int]:
    values = [value]
    with suppress(TypeError):  # a number
        values = [value] if isinstance(value, str) else list(value)
    return [_whole_number(name, one) for one in values]


def check_arrays(arrays: BatchArrays, known: Known, shifted: bool | None = None) -> Checked:
    """As `check_batch`, of arrays that are read."""
    return check_view(*look(arrays, known, shifted))


def check_view(v: View, found: list[Finding]) -> Checked:
    """All rules on a batch whose labels are recognized. `found`: what `look` found of them."""
    findings = [*found, *(finding for rule in LONE_RULES for finding in rule(v))]
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
