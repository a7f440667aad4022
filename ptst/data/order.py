"""Which examples each optimizer step takes, from a seed alone: there is no state to save, and every rank and every
resumed run computes the same order.

An epoch is a pass over the first source, newly shuffled. Other sources (safety data, say) have their own numbers of
epochs and are spread evenly over the run: each epoch of the first source takes the next stretch of the others, and all
of it is shuffled together. A step is N examples, or at most N tokens in packs of whole examples, whatever the size of a
micro-batch. The last step of an epoch takes what is left.

Where the order of the data is asked for, nothing is shuffled: the first source is taken as it is, and the others' next
stretches stand evenly among its examples.

With phases, steps on the other sources and on the first take turns: a of those, b of these, and so on, until one side
has had its epochs; then the rest of the other follows. Here the other sources have an order of their own, pass after
pass, and the first one has that of a run without them.
"""

import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from ptst.errors import Setting, UserError

OrderName = Literal["random", "file"]
PACK = 4096  # tokens: a step of tokens is made of packs of this size, whatever the size of a micro-batch
WINDOW = 256  # examples among which the best fit for a pack is searched
MOST = 50_000_000  # examples that a plan takes of a source in all: the plan is in memory, some 20 bytes for each


@dataclass(frozen=True)
class SourcePlan:
    """`count` examples of one source, to be trained on `epochs` times (a fraction is fine). `replaces`: they take the
    place of examples of the first source."""

    count: int
    epochs: float
    replaces: bool = False

    @property
    def visits(self) -> int:
        return math.ceil(self.epochs * self.count)


@dataclass(frozen=True)
class Step:
    """Indices of a step's examples. `epoch`: passes over the first source before this step, with their fraction.
    `turn`: with phases, the number of the turn that it is in, from 0; the first is on the other sources."""

    epoch: float
    examples: list[int]
    turn: int = 0


def seed_of(order: OrderName, seed: int) -> int | None:
    """The seed of an order, as `plan` takes it."""
    return seed if order == "random" else None


def plan(
    lengths: Sequence[int],
    sources: Sequence[SourcePlan],
    seed: int | None = 0,
    examples_per_step: int = 8,
    tokens_per_step: int | None = None,
    max_steps: int | None = None,
    phases: tuple[int, ...] = (),
) -> Iterator[Step]:
    """Every step in order. `lengths`: tokens of each example, source after source. `seed`: of the shuffles; None: the
    order of the data. `phases`: () or the numbers of steps
    on the other sources and on the first, in turn. Raises UserError for these with a source that replaces examples, and
    for a source that is taken more than MOST times."""
    check_visits(sources if phases or max_steps is None else sources[1:])  # of the first, no more steps than asked for
    if phases and any(source.replaces for source in sources):
        cause = (Setting("phases"), " takes turns with the data mixed in, and rows that replace others are main data")
        raise UserError(cause, ("leave the share out of ", Setting("mix"), ", or these out"))

    def grouped(order: Iterable[int]) -> Iterator[list[int]]:
        return groups(lengths, order, examples_per_step, tokens_per_step)

    # Of each epoch, the number of its examples, and its steps with their turns.
    parts: Iterable[tuple[int, Iterable[tuple[int, list[int]]]]]
    if phases:
        parts = ((sum(len(group) for _, group in part), part) for part in _turns(sources, seed, phases, grouped))
    else:
        parts = ((len(order), ((0, group) for group in grouped(order))) for order in epochs(sources, seed))
    done = 0
    for number, (every, own) in enumerate(parts):
        taken = 0
        share = min(1.0, sources[0].epochs - number)  # the last pass may be a fraction of one
        for turn, group in own:
            if done == max_steps:
                return
            yield Step(number + share * taken / every, group, turn)
            taken += len(group)
            done += 1


def check_visits(sources: Iterable[SourcePlan]) -> None:
    """Raise UserError for a source that is taken more than MOST times."""
    for source in sources:
        if source.epochs * source.count > MOST:
            cause = f"{source.epochs:g} epochs of {source.count:,} examples are more than the {MOST:,} of a plan"
            raise UserError(cause, "give fewer epochs")


def groups(
    lengths: Sequence[int], order: Iterable[int], examples_per_step: int, tokens_per_step: int | None = None
) -> Iterator[list[int]]:
    """The examples of each step, from their order; of that, no more is asked for than the steps so far need."""
    if tokens_per_step is not None:
        yield from fill(lengths, order, tokens_per_step)
        return
    rest = iter(order)
    while group := list(islice(rest, examples_per_step)):
        yield group


def _turns(
    sources: Sequence[SourcePlan],
    seed: int | None,
    phases: tuple[int, ...],
    grouped: Callable[[Iterable[int]], Iterator[list[int]]],
) -> Iterator[list[tuple[int, list[int]]]]:
    """The steps of each epoch of the first source, each with the number of its turn. An epoch ends with the first
    source's last step in it; the last one has all that is left of the others."""
    first, *others = sources
    mixed = deque(
        grouped(first.count + i for order in epochs(others, None if seed is None else f"{seed}:others") for i in order)
    )
    orders = list(epochs([first], seed))
    turn, side, left = 0, 0, phases[0]  # side 0: the other sources, 1: the first
    for number, order in enumerate(orders, 1):
        waiting = (mixed, deque(grouped(order)))
        over = number == len(orders)
        steps: list[tuple[int, list[int]]] = []
        while waiting[1] or (over and mixed):
            wanted = side if left else 1 - side
            wanted = wanted if waiting[wanted] else 1 - wanted
            if wanted != side:
                turn, side, left = turn + 1, wanted, phases[wanted]
            steps.append((turn, waiting[side].popleft()))
            left = left - 1 if left else phases[side] - 1
        yield steps


def uneven_turns(steps: Sequence[Step], phases: tuple[int, ...], count: int) -> str | None:
    """A sentence where one side's steps are used up before the other's, so that they do not take turns to the end.
    `count`: examples of the first source."""
    sizes = [0, 0]
    for step in steps:
        sizes[step.examples[0] < count] += 1
    last = sum(step.turn == steps[-1].turn for step in steps)
    side = steps[-1].examples[0] < count
    if last <= phases[side]:
        return None
    needed = -(-sizes[1] // phases[1]) * phases[0]
    advice = f"they take turns to the end with about {needed / max(1, sizes[0]):.3g} times their epochs"
    if side:
        return f"the data mixed in are used up, and the last {last} steps are on the main data alone; {advice}"
    return f"the main data are used up, and the last {last} steps are on the data mixed in alone; {advice}"


def epochs(sources: Sequence[SourcePlan], seed: int | str | None) -> Iterator[Sequence[int]]:
    """The order of each epoch: indices of examples, counted through all sources. `seed` None: that of the data."""
    if seed is None:
        yield from _as_they_come(sources)
        return
    first, *others = sources
    rng = random.Random(seed)
    streams, start = [], first.count
    for number, source in enumerate(others, 1):
        streams.append((source.visits, _stream(start, source.count, random.Random(f"{seed}:{number}"))))
        start += source.count
    done = 0
    while done < first.visits:
        order = array("q", range(first.count))  # shuffled as a list is, in a fifth of the memory
        rng.shuffle(order)
        order = order[: first.visits - done]
        after = done + len(order)
        for visits, stream in streams:
            order.extend(islice(stream, visits * after // first.visits - visits * done // first.visits))
        if streams:
            rng.shuffle(order)
        yield order
        done = after


def _as_they_come(sources: Sequence[SourcePlan]) -> Iterator[Sequence[int]]:
    """The same without a shuffle. An epoch of one source alone is a range, of which nothing is in memory."""
    first, *others = sources
    done = 0
    while done < first.visits:
        own = range(min(first.count, first.visits - done))
        after = done + len(own)
        parts, start = [np.array(own)] if others else [], first.count
        for source in others:
            begin, end = (source.visits * at // first.visits for at in (done, after))
            parts.append(start + np.arange(begin, end) % source.count)
            start += source.count
        if others:
            places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
            yield np.concatenate(parts)[np.argsort(places, kind="stable")].tolist()
        else:
            yield own
        done = after


def _stream(start: int, count: int, rng: random.Random) -> Iterator[int]:
    """`count` indices from `start` on, pass after pass, each newly shuffled."""
    while True:
        order = array("q", range(start, start + count))
        rng.shuffle(order)
        yield from order


def fill(lengths: Sequence[int], order: Iterable[int], tokens: int) -> Iterator[list[int]]:
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
