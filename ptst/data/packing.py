"""Whole examples side by side in flat rows: no padding, and no example is ever cut to fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, pairwise, takewhile

from ptst.errors import UserError
from ptst.text.encode import Example

IGNORE_INDEX = -1
LEAST = 16  # tokens: a shorter beginning saves nothing worth the copies of its keys


@dataclass(frozen=True)
class Batch:
    """A flat row of documents, as the loss function gets it: token ids, each one's position in its document, where each
    document begins (`cu_seqlens` = [0, L1, L1 + L2, ...]), and for every token the id it must predict, or -1 where
    nothing is trained. `rows` tells which row of the data each document came from. `before`, where beginnings are
    shared: for every document the places (start, n) in this row of the tokens that it begins with and does not repeat.
    """

    tokens: list[int]
    position_ids: list[int]
    cu_seqlens: list[int]
    labels: list[int]
    rows: list[int]
    shared_prefixes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        bounds, size = self.cu_seqlens, len(self.tokens)
        if bounds[:1] != [0] or bounds[-1] != size or any(a > b for a, b in pairwise(bounds)):
            raise UserError(f"document boundaries {bounds} must rise from 0 to the {size} tokens that there are")
        if not size == len(self.position_ids) == len(self.labels):
            raise UserError(f"{size} tokens have {len(self.position_ids)} positions and {len(self.labels)} labels")

    def check_ids(self, vocabulary: int) -> None:
        """Raise UserError where a token or target is not in a vocabulary of so many ids: a kernel reads by them."""
        for name, ids, lowest in (("token", self.tokens, 0), ("label", self.labels, IGNORE_INDEX)):
            wrong = next((i for i, t in enumerate(ids) if not lowest <= t < vocabulary), None)
            if wrong is not None:
                raise UserError(
                    f"{name} {ids[wrong]} at place {wrong} is not one of the model's {vocabulary} ids; does the "
                    "tokenizer belong to the model?"
                )

    @property
    def num_trained(self) -> int:
        return sum(t != IGNORE_INDEX for t in self.labels)


def to_batch(examples: Sequence[Example]) -> Batch:
    """Lay examples side by side. Token t predicts token t + 1 of its own document; the last predicts nothing."""
    tokens: list[int] = []
    labels: list[int] = []
    for e in examples:
        tokens += e.ids
        flags = e.loss_mask[1:]
        labels += [i if flag else IGNORE_INDEX for i, flag in zip(e.ids[1:], flags, strict=True)] + [IGNORE_INDEX]
    positions = [p for e in examples for p in range(len(e.ids))]
    return Batch(tokens, positions, [0, *accumulate(len(e.ids) for e in examples)], labels, [e.row for e in examples])


def share_prefixes(batch: Batch) -> Batch:
    """The same loss from fewer tokens: documents that begin with the same LEAST tokens or more (a template's system
    text) leave their shared prefix out, but for the first of them, whose keys and values serve all. What a beginning
    predicts must be trained in none of those that leave it out."""
    documents = list(pairwise(batch.cu_seqlens))
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (a, b) in enumerate(documents):
        if b - a > LEAST:
            groups.setdefault(tuple(batch.tokens[a : a + LEAST]), []).append(number)
    left_out = [0] * len(documents)
    host = list(range(len(documents)))
    for first, *others in groups.values():
        ends = [documents[first][1]]
        for a, b in (documents[n] for n in others):
            ends.append(next((i for i in range(a, b) if batch.labels[i] != IGNORE_INDEX), b - 1))
        spans = [range(documents[n][0], end) for n, end in zip((first, *others), ends, strict=True)]
        columns = ({(batch.tokens[i], batch.position_ids[i]) for i in places} for places in zip(*spans, strict=False))
        if (size := sum(1 for _ in takewhile(lambda found: len(found) == 1, columns))) >= LEAST:
            for number in others:
                left_out[number], host[number] = size, first
    if not any(left_out):
        return batch
    kept = [i for (a, b), size in zip(documents, left_out, strict=True) for i in range(a + size, b)]
    bounds = [0, *accumulate(b - a - size for (a, b), size in zip(documents, left_out, strict=True))]
    shared = Batch(
        tokens=[batch.tokens[i] for i in kept],
        position_ids=[batch.position_ids[i] for i in kept],
        cu_seqlens=bounds,
        labels=[batch.labels[i] for i in kept],
        rows=batch.rows,
        shared_prefixes=[(bounds[first] if size else 0, size) for first, size in zip(host, left_out, strict=True)],
    )
    assert _whole(shared) == (batch.tokens, batch.position_ids) and shared.num_trained == batch.num_trained
    return shared


def _whole(batch: Batch) -> tuple[list[int], list[int]]:
    """Tokens and positions of whole documents again."""
    spans = zip(pairwise(batch.cu_seqlens), batch.shared_prefixes, strict=True)
    places = [i for (a, b), (start, size) in spans for i in (*range(start, start + size), *range(a, b))]
    return [batch.tokens[i] for i in places], [batch.position_ids[i] for i in places]


def pack(examples: Sequence[Example], micro_batch_tokens: int) -> list[Batch]:
    """Examples in as few rows of at most `micro_batch_tokens` tokens as `rows` finds."""
    return [to_batch([examples[i] for i in row]) for row in rows([len(e.ids) for e in examples], micro_batch_tokens)]


def rows(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `micro_batch_tokens` tokens; a longer example has a row of its own: the
    limit is a matter of memory, never of what is learned.

    The order given is tried first (a step of `order.fill` lies in it as whole packs), then best fit decreasing, the
    fuller of the two wins. Best fit: into the row with the least room that is enough.
    """
    in_order = _next_fit(lengths, micro_batch_tokens)
    if len(in_order) <= -(-sum(lengths) // micro_batch_tokens):
        return in_order
    best: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        free, row = room.pop(place) if place < len(room) else (micro_batch_tokens, len(best))
        if row == len(best):
            best.append([])
        best[row].append(index)
        insort(room, (free - lengths[index], row))
    return best if len(best) < len(in_order) else in_order


def _next_fit(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    out: list[list[int]] = []
    free = -1
    for index, length in enumerate(lengths):
        if length > free:
            out.append([])
            free = micro_batch_tokens
        out[-1].append(index)
        free -= length
    return out


def share(lengths: Sequence[int], micro_batch_tokens: int, rank: int, size: int) -> list[list[int]]:
    """The rows of one of `size` ranks. Every rank computes the same split, so none has to be told.

    The examples are spread evenly over as many rows as every rank must take anyway (longest first, into the emptiest);
    where that overflows a row, whole rows are dealt out instead. With few examples some ranks get nothing.
    """
    packed = rows(lengths, micro_batch_tokens)
    if size > 1:
        even: list[list[int]] = [[] for _ in range(-(-len(packed) // size) * size)]
        filled = [(0, row) for row in range(len(even))]
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            tokens, row = heappop(filled)
            even[row].append(index)
            heappush(filled, (tokens + lengths[index], row))
        if max(filled)[0] <= max(micro_batch_tokens, *lengths):
            packed = [row for row in even if row]
    return packed[rank::size]
