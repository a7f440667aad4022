"""Packed sequences: a micro-batch is whole examples one after another, without padding, and no example is ever cut
to fit.

An example becomes a document of the packed sequence. `cu_seqlens` = [0, L1, L1 + L2, ...] are the bounds of documents
of L1, L2, ... tokens; `position_ids` count from 0 in each.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, nlargest
from itertools import accumulate, pairwise, takewhile

from ptst.data.example_arrays import lengths_of
from ptst.errors import UserError
from ptst.text.encode import Example

IGNORE_INDEX = -1
MIN_SHARED_PREFIX = 16  # tokens: a shorter one saves less than copying its keys and values costs


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the loss function gets it, T tokens in D documents: `tokens`, `position_ids` and `labels` (the
    id that a token must predict, or IGNORE_INDEX) of T, `cu_seqlens` of D + 1. `rows`: for each document, the row that
    it comes from. `shared_prefixes`, if there are any: for each document, where in `tokens` the prefix that
    it leaves out is found (start, length)."""

    tokens: list[int]
    position_ids: list[int]
    cu_seqlens: list[int]
    labels: list[int]
    rows: list[int]
    shared_prefixes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        bounds, size = self.cu_seqlens, len(self.tokens)
        if bounds[:1] != [0] or bounds[-1] != size or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"document bounds {bounds} must rise from 0 to the number of tokens, {size}")
        if not size == len(self.position_ids) == len(self.labels):
            raise ValueError(f"{size} tokens have {len(self.position_ids)} positions and {len(self.labels)} labels")

    def check_ids(self, vocabulary: int) -> None:
        """Raise UserError for a token or label outside a vocabulary of this size: kernels index memory with them."""
        for name, ids, lowest in (("token", self.tokens, 0), ("label", self.labels, IGNORE_INDEX)):
            wrong = next((i for i, t in enumerate(ids) if not lowest <= t < vocabulary), None)
            if wrong is not None:
                cause = f"{name} {ids[wrong]} at index {wrong} is not one of the model's {vocabulary} ids"
                raise UserError(cause, "does the tokenizer belong to the model?")

    @property
    def num_trained(self) -> int:
        return sum(t != IGNORE_INDEX for t in self.labels)


def to_batch(examples: Sequence[Example]) -> Batch:
    """Examples as one packed sequence. A token predicts the next of its own document; the last predicts nothing."""
    tokens: list[int] = []
    labels: list[int] = []
    for example in examples:
        tokens += example.ids
        labels += [i if flag else IGNORE_INDEX for i, flag in zip(example.ids[1:], example.loss_mask[1:], strict=True)]
        labels.append(IGNORE_INDEX)
    lengths = [len(example.ids) for example in examples]
    positions = [p for length in lengths for p in range(length)]
    return Batch(tokens, positions, [0, *accumulate(lengths)], labels, [example.row for example in examples])


def share_prefixes(batch: Batch) -> Batch:
    """The same loss from fewer tokens: of documents that begin with the same MIN_SHARED_PREFIX tokens or more (a system
    prompt), only the first keeps the shared prefix, and its keys and values serve all. No label within the prefix may
    be trained in a document that leaves it out."""
    documents = list(pairwise(batch.cu_seqlens))
    alike: dict[tuple[int, ...], list[int]] = {}  # documents by their first tokens
    for number, (start, end) in enumerate(documents):
        if end - start > MIN_SHARED_PREFIX:
            alike.setdefault(tuple(batch.tokens[start : start + MIN_SHARED_PREFIX]), []).append(number)
    left_out = [0] * len(documents)  # tokens
    owner = list(range(len(documents)))  # the document that keeps the prefix
    for first, *others in alike.values():
        ends = [documents[first][1]]
        for start, end in (documents[n] for n in others):  # before its first trained label, and never all of it
            ends.append(next((i for i in range(start, end) if batch.labels[i] != IGNORE_INDEX), end - 1))
        spans = [range(documents[n][0], end) for n, end in zip((first, *others), ends, strict=True)]
        # One set for each place in the documents: a single element where all have the same token and position.
        columns = ({(batch.tokens[i], batch.position_ids[i]) for i in places} for places in zip(*spans, strict=False))
        if (size := sum(1 for _ in takewhile(lambda found: len(found) == 1, columns))) >= MIN_SHARED_PREFIX:
            for number in others:
                left_out[number], owner[number] = size, first
    if not any(left_out):
        return batch
    spans = [range(start + size, end) for (start, end), size in zip(documents, left_out, strict=True)]
    remaining = [i for span in spans for i in span]
    bounds = [0, *accumulate(map(len, spans))]
    shared = Batch(
        tokens=[batch.tokens[i] for i in remaining],
        position_ids=[batch.position_ids[i] for i in remaining],
        cu_seqlens=bounds,
        labels=[batch.labels[i] for i in remaining],
        rows=batch.rows,
        shared_prefixes=[(bounds[first] if size else 0, size) for first, size in zip(owner, left_out, strict=True)],
    )
    assert _whole(shared) == (batch.tokens, batch.position_ids) and shared.num_trained == batch.num_trained
    return shared


def _whole(batch: Batch) -> tuple[list[int], list[int]]:
    """Tokens and positions with every shared prefix repeated."""
    spans = zip(pairwise(batch.cu_seqlens), batch.shared_prefixes, strict=True)
    places = [i for (a, b), (start, size) in spans for i in (*range(start, start + size), *range(a, b))]
    return [batch.tokens[i] for i in places], [batch.position_ids[i] for i in places]


def pack(examples: Sequence[Example], micro_batch_tokens: int) -> list[Batch]:
    """Examples in as few micro-batches of at most `micro_batch_tokens` tokens as `assign_micro_batches` finds."""
    groups = assign_micro_batches([len(example.ids) for example in examples], micro_batch_tokens)
    return [to_batch([examples[i] for i in group]) for group in groups]


def assign_micro_batches(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Indices of `lengths` by micro-batch of at most `micro_batch_tokens` tokens. A longer example gets a micro-batch
    of its own: the limit is about memory, never about what is learned.

    The better of two packings: next fit in the given order (in which a step of `order.fill` is whole packs already),
    and best fit decreasing, which puts each example into the micro-batch with the least room that is enough."""
    in_order = _next_fit(lengths, micro_batch_tokens)
    if len(in_order) <= -(-sum(lengths) // micro_batch_tokens):
        return in_order
    best: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, micro-batch), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        free, number = room.pop(place) if place < len(room) else (micro_batch_tokens, len(best))
        if number == len(best):
            best.append([])
        best[number].append(index)
        insort(room, (free - lengths[index], number))
    return best if len(best) < len(in_order) else in_order


def _next_fit(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    free = -1
    for index, length in enumerate(lengths):
        if length > free:
            groups.append([])
            free = micro_batch_tokens
        groups[-1].append(index)
        free -= length
    return groups


def rank_micro_batches(lengths: Sequence[int], micro_batch_tokens: int, rank: int, size: int) -> list[list[int]]:
    """The micro-batches of one of `size` ranks. Every rank computes the same split, so nothing is communicated.

    The examples are spread evenly over the smallest number of micro-batches that gives every rank the same number
    (longest first, into the emptiest); if that overflows one, whole micro-batches of `assign_micro_batches` are dealt
    out instead. With few examples some ranks get none."""
    packed = assign_micro_batches(lengths, micro_batch_tokens)
    if size > 1:
        even: list[list[int]] = [[] for _ in range(-(-len(packed) // size) * size)]
        filled = [(0, number) for number in range(len(even))]
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            tokens, number = heappop(filled)
            even[number].append(index)
            heappush(filled, (tokens + lengths[index], number))
        if max(filled)[0] <= max(micro_batch_tokens, *lengths):
            packed = [group for group in even if group]
    return packed[rank::size]


def largest_micro_batch(examples: Sequence[Example], steps: Iterable[Sequence[int]], micro_batch_tokens: int) -> int:
    """Tokens that the largest micro-batch of any step computes, shared prefixes counted once. `steps`: indices of each
    step's examples. Of all micro-batches those with the most tokens are looked at, as sharing is found by comparing
    tokens."""
    lengths = lengths_of(examples)
    groups = (
        [step[i] for i in group]
        for step in steps
        for group in assign_micro_batches([lengths[i] for i in step], micro_batch_tokens)
    )
    largest = nlargest(16, groups, key=lambda group: sum(lengths[i] for i in group))
    batches = (share_prefixes(to_batch([examples[i] for i in group])) for group in largest)
    return max((len(batch.tokens) for batch in batches), default=0)
