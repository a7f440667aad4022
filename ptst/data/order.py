"""Which examples each optimizer step takes, from a seed alone: there is no state to save, and every rank and every
resumed run computes the same order.

An epoch is a pass over the first source, newly shuffled. Other sources (safety data, say) have their own numbers of
epochs and are spread evenly over the run: each epoch of the first source takes the next stretch of the others, and all
of it is shuffled together. A step is N examples, or at most N tokens in packs of whole examples, whatever the size of a
micro-batch. The last step of an epoch takes what is left.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

PACK = 4096  # tokens: a step of tokens is made of packs of this size, whatever the size of a micro-batch
WINDOW = 256  # examples among which the best fit for a pack is searched


@dataclass(frozen=True)
class SourcePlan:
    """`count` examples of one source, to be trained on `epochs` times (a fraction is fine)."""

    count: int
    epochs: float

    @property
    def visits(self) -> int:
        return math.ceil(self.epochs * self.count)


@dataclass(frozen=True)
class Step:
    """Indices of a step's examples. `epoch`: passes over the first source before this step, with their fraction."""

    epoch: float
    examples: list[int]


def plan(
    lengths: Sequence[int],
    sources: Sequence[SourcePlan],
    seed: int = 0,
    examples_per_step: int = 8,
    tokens_per_step: int | None = None,
    max_steps: int | None = None,
) -> Iterator[Step]:
    """Every step in order. `lengths`: tokens of each example, source after source."""
    done = 0
    for number, order in enumerate(epochs(sources, seed)):
        taken = 0
        share = min(1.0, sources[0].epochs - number)  # the last pass may be a fraction of one
        groups: Iterable[list[int]]
        if tokens_per_step is not None:
            groups = fill(lengths, order, tokens_per_step)
        else:
            groups = (order[i : i + examples_per_step] for i in range(0, len(order), examples_per_step))
        for group in groups:
            if done == max_steps:
                return
            yield Step(number + share * taken / len(order), group)
            taken += len(group)
            done += 1


def epochs(sources: Sequence[SourcePlan], seed: int) -> Iterator[list[int]]:
    """The order of each epoch: indices of examples, counted through all sources."""
    first, *others = sources
    rng = random.Random(seed)
    streams, start = [], first.count
    for number, source in enumerate(others, 1):
        streams.append((source.visits, _stream(start, source.count, random.Random(f"{seed}:{number}"))))
        start += source.count
    done = 0
    while done < first.visits:
        order = list(range(first.count))
        rng.shuffle(order)
        order = order[: first.visits - done]
        after = done + len(order)
        for visits, stream in streams:
            order += [next(stream) for _ in range(visits * after // first.visits - visits * done // first.visits)]
        if streams:
            rng.shuffle(order)
        yield order
        done = after


def _stream(start: int, count: int, rng: random.Random) -> Iterator[int]:
    """`count` indices from `start` on, pass after pass, each newly shuffled."""
    while True:
        order = list(range(start, start + count))
        rng.shuffle(order)
        yield from order


def fill(lengths: Sequence[int], order: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Steps of at most `tokens` tokens, each made of packs of at most PACK tokens. A pack takes examples in order while
    they fit, then the longest of the next WINDOW that fits, until none does. No example waits long, as the next pack
    begins with the first one waiting. An example longer than a pack, or a step, gets one of its own."""
    waiting: list[int] = []
    rest = iter(order)
    step: list[int] = []
    left = tokens
    while True:
        pack: list[int] = []
        room = size = min(PACK, left)
        while True:
            waiting += [i for _, i in zip(range(WINDOW - len(waiting)), rest, strict=False)]
            if not waiting:
                break
            place, first = 0, lengths[waiting[0]]
            alone = not pack and (first <= left or not step)  # an example too long for any pack may open one
            if first > room and not alone:
                place = max(range(len(waiting)), key=lambda j: (lengths[waiting[j]] <= room) * lengths[waiting[j]])
                if lengths[waiting[place]] > room:
                    break
            room -= lengths[waiting[place]]
            pack.append(waiting.pop(place))
        step += pack
        left -= max(size, size - room)
        if step and (left <= 0 or not pack or not waiting):
            yield step
            step, left = [], tokens
        if not waiting:
            return
