"""Grid folders as they are now: what is done, who does what, what failed, how long the rest takes. Only reads."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ptst.errors import UserError
from ptst.experiment.status.at_work import Note, held_names, holder, read_notes
from ptst.experiment.status.forecast import Forecast, Seen
from ptst.experiment.status.items import Item, Items, read_items
from ptst.experiment.status.observe import Observed, Observer
from ptst.records import FILE, read_json

_LOCKED = {"train": "run", "test": "cell"}  # how locks call what items are called


@dataclass(frozen=True)
class Busy:
    """A process and what it works on. `note`: what it says of itself, where it does; `pid` 0: one of another
    machine, or that cannot be seen."""

    pid: int
    doing: tuple[str, ...]
    note: Note | None = None

    @property
    def who(self) -> str:
        if self.note is not None:
            return self.note.who
        return f"process {self.pid}" if self.pid else "a process that cannot be seen from here"


@dataclass(frozen=True)
class Standing:
    """A folder at one time. `items`: all that is known to be there to do, by name; `planned`: whether workers wrote
    that down, so that it is all. `begun`: unfinished, with something on the disk. `failed`: errors of items that are
    not finished. `workers` None: the system does not tell."""

    items: Mapping[str, Item]
    planned: bool
    finished: frozenset[str]
    begun: frozenset[str]
    seen: Mapping[str, Seen]
    failed: Mapping[str, str]
    damaged: Sequence[UserError]
    workers: tuple[Busy, ...] | None
    at: float = field(default_factory=time.time)

    @cached_property
    def running(self) -> dict[str, Busy]:
        """Items that a process works on."""
        doing = ((name, worker) for worker in self.workers or () for name in worker.doing)
        return {name: worker for name, worker in doing if name not in self.finished}

    @property
    def left(self) -> list[str]:
        """Neither finished nor failed."""
        return [name for name in self.items if name not in self.finished and name not in self.failed]

    @cached_property
    def forecast(self) -> Forecast:
        return Forecast(self.items, self.finished | self.failed.keys(), self.seen)

    @property
    def until_done(self) -> float | None:
        """Seconds, with as many workers as are there now (none: with one). None where something is unknown."""
        return self.forecast.until_done(len(self.workers or ())) if self.planned else None


@dataclass(frozen=True)
class Part:
    """A grid's folder as part of something: `prefix` in the names of its items."""

    folder: Path
    prefix: str = ""
    items: Items = field(default_factory=dict)
    """What is to do there, besides what its own file says."""


class Watch:
    """Looks at grid folders again and again, and at alignments (by their items' names). `only`: of the parts' items
    these alone, not all that is in the folders. `whole`: the folder that the parts are in, if workers say there that
    they are at work."""

    def __init__(
        self,
        parts: Sequence[Part],
        alignments: Mapping[str, tuple[Item, Path]] | None = None,
        only: Collection[str] | None = None,
        whole: Path | None = None,
    ):
        self.parts, self.only, self.whole = parts, only, whole
        self.alignments = alignments or {}
        self._observers = {part.folder: Observer(part.folder) for part in parts}

    def look(self) -> Standing:
        items, planned = dict[str, Item](), True
        finished, begun, seen = set[str](), set[str](), dict[str, Seen]()
        failed, damaged, workers = dict[str, str](), list[UserError](), list[Busy]()
        seeing = True
        for name, (item, folder) in self.alignments.items():
            items[name] = item
            state, found = _alignment(folder)
            (finished if state == "finished" else begun if state == "begun" else set()).add(name)
            if found is not None:
                seen[name] = found
            if (pid := holder(folder)) is not None:
                workers.append(Busy(pid, (name,)))
        if self.whole is not None:
            workers += [Busy(n.pid if n.is_here else 0, (), n) for n in read_notes(self.whole) if n.alive]
        for part in self.parts:
            own, observed = self._part(part, damaged)
            planned = planned and bool(own)
            names = {**dict.fromkeys(own), **dict.fromkeys(sorted(observed.finished | observed.begun))}
            if self.only is not None:
                names = {what: None for what in names if part.prefix + what in self.only}
            for what in names:
                item = own.get(what) or _bare(what)
                items[part.prefix + what] = replace(item, model=part.prefix + item.model)
            finished |= {part.prefix + what for what in observed.finished}
            begun |= {part.prefix + what for what in observed.begun}
            seen |= {part.prefix + what: found for what, found in observed.seen.items()}
            damaged += observed.damaged
            here = _workers(part, list(names))
            seeing = seeing and here is not None
            workers += here or []
            for note in read_notes(part.folder):
                failed |= {part.prefix + what: error for what, error in note.failed.items()}
        finished, begun = finished & items.keys(), begun & items.keys()
        failed = {what: error for what, error in failed.items() if what in items and what not in finished}
        return Standing(
            items,
            planned,
            frozenset(finished),
            frozenset(begun),
            seen,
            failed,
            damaged,
            tuple(_merged(workers)) if seeing else None,
        )

    def _part(self, part: Part, damaged: list[UserError]) -> tuple[Items, Observed]:
        own = dict(part.items)
        try:
            own |= read_items(part.folder)
        except UserError as error:
            damaged.append(error)
        return own, self._observers[part.folder].look(own)


def _bare(what: str) -> Item:
    """An item of which nothing but the name is known."""
    kind, _, name = what.partition(" ")
    return Item("train" if kind == "train" else "test", name)


def _workers(part: Part, names: Sequence[str]) -> list[Busy] | None:
    """The processes that hold locks of a part or say that they work there. None where the system does not tell, and
    nobody says so."""
    held, notes = held_names(part.folder), [note for note in read_notes(part.folder) if note.alive]
    if held is None and not notes:
        return None
    by_lock = {f"{_LOCKED[what.partition(' ')[0]]}.{what.partition(' ')[2].replace('/', '.')}": what for what in names}
    by_pid: dict[int, list[str]] = {}
    for lock, pid in (held or {}).items():
        kind, _, name = lock.partition(".")
        if kind in _LOCKED.values():
            what = by_lock.get(lock, f"{'train' if kind == 'run' else 'test'} {name}")
            by_pid.setdefault(pid, []).append(part.prefix + what)
    found = []
    for note in notes:
        doing = tuple(part.prefix + what for what in note.doing)
        if note.is_here:
            by_pid.pop(note.pid, None)
        found.append(Busy(note.pid if note.is_here else 0, doing, note))
    if any(not busy.note.is_here for busy in found if busy.note):
        by_pid.pop(0, None)
    return [*found, *(Busy(pid, tuple(doing)) for pid, doing in sorted(by_pid.items()))]


def _merged(workers: Sequence[Busy]) -> Iterator[Busy]:
    """Each process once: one that notes are left of in several parts is where it works."""
    by_who: dict[str, Busy] = {}
    for busy in workers:
        if busy.who not in by_who or not by_who[busy.who].doing:
            by_who[busy.who] = busy
    yield from by_who.values()


def _alignment(folder: Path) -> tuple[str, Seen | None]:
    """The state of an alignment, and its time."""
    if not (folder / FILE).exists():
        return "left", None
    try:
        record = read_json(folder / FILE)
    except UserError:
        return "begun", None
    if not isinstance(record, dict) or record.get("status") != "finished":
        return "begun", None
    spent = record.get("time")
    seconds = spent.get("seconds") if isinstance(spent, dict) else None
    return "finished", Seen(float(seconds)) if isinstance(seconds, int | float) else None
