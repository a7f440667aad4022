"""How long the rest of a grid takes, from what was measured in its folder on this machine.

Every kind of work has its own speed, in seconds per token (`Item.amount`): each task, each defence of the training.
What has not been measured yet takes the speed of what is nearest: other runs, other tasks, then the training, then a
guess from the machine. Loading, composing and saving are counted by the model, not by the token. Answers are counted as
long as those that were given so far: by the same model, else by models of the same kind, else by any; so models that
stop early, or never, mislead no further than their own cells. What was measured last counts, because machines get busy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from ptst.experiment.status.items import Item, Items

RECENT = 8  # measurements of a kind that its speed is taken from
ANY_LENGTH = 0.7  # of the greatest length of an answer, before any was seen
_PARENT = 0.25  # how many cells' worth the next wider group counts in a length
_COMPOSING = 3.0  # times the time that loading a model takes, before any was composed


Group = tuple[str, ...]  # the first of `_group`'s words: fewer are a wider group


@dataclass(frozen=True)
class Seen:
    """What was measured of an item. `seconds` of computing, for `done`, a share of the item; `around`: seconds besides
    (loading, evaluations, saving), None where unknown, of which `evaluating` in evaluations. `answered`: tokens of all
    answers. `at`: when, in seconds."""

    seconds: float
    done: float = 1.0
    around: float | None = None
    evaluating: float = 0.0
    answered: int | None = None
    at: float = 0.0


@dataclass(frozen=True)
class Left:
    """Seconds that an item still takes (None: nothing is known of the machine), and whether these are not from work of
    its own kind."""

    seconds: float | None
    rough: bool


@dataclass(frozen=True)
class Forecast:
    """The rest of `items` (by any names), of which `finished` are done. `seen`: what was measured of these and of
    others. `guess`: seconds per token of one forward pass, before anything has been measured."""

    items: Items
    finished: frozenset[str]
    seen: Mapping[str, Seen]
    guess: float | None = None

    @cached_property
    def left(self) -> dict[str, Left]:
        """By the name of what is left. Loading a model counts with its first cell."""
        found, loaded = dict[str, Left](), set[str]()
        for name, item in self.items.items():
            if name not in self.finished:
                found[name] = self._left(name, item, item.kind == "test" and item.model not in loaded)
                loaded.add(item.model)
        return found

    @cached_property
    def seconds(self) -> float | None:
        """Of work, of all that is left; None where anything is unknown."""
        each = [left.seconds for left in self.left.values()]
        return None if None in each else sum(s for s in each if s is not None)

    def until_done(self, workers: int = 1) -> float | None:
        """Seconds until all is done by so many workers, none of which can take a part of an item."""
        if self.seconds is None:
            return None
        longest = max((left.seconds or 0.0 for left in self.left.values()), default=0.0)
        return max(self.seconds / max(1, workers), longest)

    def _left(self, name: str, item: Item, loads: bool) -> Left:
        speed, rough = self._speed(item)
        if speed is None:
            return Left(None, True)
        done = min(1.0, self.seen[name].done) if name in self.seen else 0.0
        around, known = self._around(item, loads, done > 0)
        # A token that is read before takes a pass forward alone, as the amount of a training has it.
        extra = 0.0 if known else speed * item.before
        return Left(speed * item.amount(self._length(name, item)) * (1 - done) + around + extra, rough)

    # Speed

    def _speed(self, item: Item) -> tuple[float | None, bool]:
        """Seconds per token, and whether they are of other work."""
        wider = [_group(item)[:n] for n in (3, 2, 1, 0)]
        for group in wider:
            if (measured := self._speeds.get(group)) is not None:
                return measured, len(group) < (1 if item.kind == "train" else 3)
        return self.guess, True

    @cached_property
    def _speeds(self) -> dict[Group, float]:
        """Seconds per token of every group of items, of each of whose kinds the last measurements count."""
        rows: dict[Group, list[tuple[float, float, float]]] = {}
        for name, seen in self.seen.items():
            item = self.items.get(name)
            if item is not None and seen.seconds > 0:
                amount = item.amount(self._length(name, item)) * min(1.0, seen.done)
                if amount > 0:
                    rows.setdefault(_group(item), []).append((seen.at, seen.seconds, amount))
        sums: dict[Group, list[float]] = {}
        for group, found in rows.items():
            for _, seconds, amount in sorted(found)[-RECENT:]:
                for n in range(4):
                    total = sums.setdefault(group[:n], [0.0, 0.0])
                    total[0], total[1] = total[0] + seconds, total[1] + amount
        return {group: seconds / amount for group, (seconds, amount) in sums.items()}

    # What does not depend on tokens

    def _around(self, item: Item, loads: bool, begun: bool) -> tuple[float, bool]:
        """Seconds besides computing, and whether they have all that such work needs. `loads`: a cell for which its
        model is loaded."""
        if item.kind == "test":
            return (self._loading(item.loads), True) if loads and item.loads else (0.0, True)
        if begun:  # it has been loaded
            return 0.0, True
        alike = self._arounds.get((item.kind, item.alike), [])
        return median(alike or self._arounds.get((item.kind, ""), [0.0])), bool(alike)

    @cached_property
    def _arounds(self) -> dict[tuple[str, str], list[float]]:
        """Seconds by kind and what is alike, and by kind alone (""); of cells by how a model is loaded."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, seen in self.seen.items():
            item = self.items.get(name)
            if item is not None and seen.around is not None:
                own = item.loads if item.kind == "test" else item.alike
                for key in {(item.kind, own), (item.kind, "")}:
                    found.setdefault(key, []).append(seen.around)
        return found

    def _loading(self, how: str) -> float:
        """Seconds of loading a model in this way: `read`, or `compose` by a defence."""
        if own := self._arounds.get(("test", how)):
            return fmean(own)
        # A training loads the model, too, and saves another.
        training = (
            min((s.around - s.evaluating for s in self.seen.values() if s.around and s.evaluating), default=0.0) / 2
        )
        read = fmean(self._arounds.get(("test", "read"), [training]))
        if how == "read":
            return read
        others = [
            s
            for (kind, other), each in self._arounds.items()
            if kind == "test" and other not in ("read", "")
            for s in each
        ]
        return fmean(others) if others else _COMPOSING * read

    # The length of answers

    def _length(self, name: str, item: Item) -> float:
        """The share of the greatest length that its answers have, as was seen or is expected."""
        if not item.answers:
            return 1.0
        seen = self.seen.get(name)
        if seen is not None and seen.answered is not None and seen.done >= 1:
            return min(1.0, seen.answered / item.answers)
        tuned, known = bool(item.needs), self._lengths
        length = _blend(ANY_LENGTH, 1.0, known.get((), []))
        length = _blend(length, _PARENT, known.get((item.alike,), []))
        if item.length is not None:
            length = 0.3 * length + 0.7 * item.length
        length = _blend(length, _PARENT, known.get((item.alike, tuned), []))
        return _blend(length, _PARENT, known.get((item.alike, item.model), []))

    @cached_property
    def _lengths(self) -> dict[tuple[str | bool, ...], list[float]]:
        """Shares of all cells, of those of a task, of base or tuned models there, and of a model there."""
        found: dict[tuple[str | bool, ...], list[float]] = {}
        for name, seen in self.seen.items():
            item = self.items.get(name)
            if item is not None and item.answers and seen.answered is not None and seen.done >= 1:
                for key in ((), (item.alike,), (item.alike, bool(item.needs)), (item.alike, item.model)):
                    found.setdefault(key, []).append(min(1.0, seen.answered / item.answers))
        return found


def _blend(parent: float, weight: float, own: list[float]) -> float:
    """The mean of what was seen, with a wider group's as `weight` more."""
    return (weight * parent + sum(own)) / (weight + len(own))


def _group(item: Item) -> Group:
    """What it is, whether it writes answers, and what it shares its speed with."""
    return (item.kind, "writes" if item.answers else "reads", item.alike)
