"""Whole examples side by side in flat rows: no padding, and no example is ever cut to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ptst.text.encode import Encoded

UNTRAINED = -1


@dataclass(frozen=True)
class Batch:
    """A flat row of documents, as the loss function gets it: token ids, each one's position in its document, where each
    document begins (`cu_seqlens` = [0, L1, L1 + L2, ...]), and for every token the id it must predict, or -1 where
    nothing is trained. `rows` tells which row of the data each document came from."""

    tokens: list[int]
    positions: list[int]
    cu_seqlens: list[int]
    targets: list[int]
    rows: list[int]

    def __post_init__(self) -> None:
        bounds, size = self.cu_seqlens, len(self.tokens)
        if bounds[:1] != [0] or bounds[-1] != size or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"document boundaries {bounds} must rise from 0 to the {size} tokens that there are")
        if not size == len(self.positions) == len(self.targets):
            raise ValueError(f"{size} tokens have {len(self.positions)} positions and {len(self.targets)} targets")

    def check_ids(self, vocabulary: int) -> None:
        """Raise ValueError where a token or target is not in a vocabulary of so many ids: a kernel reads by them."""
        for name, ids, lowest in (("token", self.tokens, 0), ("target", self.targets, UNTRAINED)):
            wrong = next((i for i, t in enumerate(ids) if not lowest <= t < vocabulary), None)
            if wrong is not None:
                raise ValueError(
                    f"{name} {ids[wrong]} at place {wrong} is not one of the model's {vocabulary} ids; does the "
                    "tokenizer belong to the model?"
                )

    @property
    def num_trained(self) -> int:
        return sum(t != UNTRAINED for t in self.targets)


def to_batch(examples: Sequence[Encoded]) -> Batch:
    """Lay examples side by side. Token t predicts token t + 1 of its own document; the last predicts nothing."""
    tokens: list[int] = []
    targets: list[int] = []
    for e in examples:
        tokens += e.ids
        flags = e.trained[1:]
        targets += [i if flag else UNTRAINED for i, flag in zip(e.ids[1:], flags, strict=True)] + [UNTRAINED]
    positions = [p for e in examples for p in range(len(e.ids))]
    return Batch(tokens, positions, [0, *accumulate(len(e.ids) for e in examples)], targets, [e.row for e in examples])


def pack(examples: Sequence[Encoded], micro_tokens: int) -> list[Batch]:
    """Examples in as few rows of at most `micro_tokens` tokens as first-fit decreasing finds.

    An example longer than that gets a row of its own: the limit is a matter of memory, never of what is learned.
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for e in sorted(examples, key=lambda e: -len(e.ids)):
        place = next((i for i, free in enumerate(room) if free >= len(e.ids)), None)
        if place is None:
            rows.append([])
            room.append(micro_tokens)
            place = len(rows) - 1
        rows[place].append(e)
        room[place] -= len(e.ids)
    return [to_batch(row) for row in rows]


def steps(
    lengths: Sequence[int], order: Sequence[int], *, examples_per_step: int, tokens_per_step: int | None = None
) -> Iterator[list[int]]:
    """Group example indices into optimizer steps: so many examples each, or as many as fit `tokens_per_step`."""
    group: list[int] = []
    size = 0
    for index in order:
        full = len(group) == examples_per_step if tokens_per_step is None else size + lengths[index] > tokens_per_step
        if group and full:
            yield group
            group, size = [], 0
        group.append(index)
        size += lengths[index]
    if group:
        yield group
