"""What a grid's folder shows: which runs and cells are done, how long they took, how far the others are. Only reads."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.status.forecast import Seen
from ptst.experiment.status.items import Item, Items
from ptst.reading import parse_json
from ptst.records import FILE, HOSTED_TRAIN, read_json

_ANSWERS = ".answers.jsonl"


@dataclass(frozen=True)
class Observed:
    """What is known of a folder's items. `begun`: of those that are not finished, all of which something is on the
    disk. `damaged`: files that cannot be read."""

    finished: frozenset[str]
    begun: frozenset[str]
    seen: dict[str, Seen]
    damaged: list[UserError] = field(default_factory=list)


@dataclass
class Observer:
    """Reads a grid's folder, files that have not changed once only."""

    folder: Path
    _known: dict[Path, tuple[tuple[int, int], Any]] = field(default_factory=dict)

    def look(self, items: Items) -> Observed:
        """Runs and cells of `items`, and those that are in the folder besides."""
        finished, begun, seen, damaged = set[str](), set[str](), dict[str, Seen](), list[UserError]()
        for item in {**{item.what: item for item in self._on_disk()}, **items}.values():
            try:
                state, found = self._run(item) if item.kind == "train" else self._cell(item)
            except UserError as error:
                damaged.append(error)
                continue
            if state == "finished":
                finished.add(item.what)
            elif state == "begun":
                begun.add(item.what)
            if found is not None:
                seen[item.what] = found
        return Observed(frozenset(finished), frozenset(begun), seen, damaged)

    def _on_disk(self) -> Iterator[Item]:
        """Runs and finished cells by their files, whatever workers wrote of them."""
        for path in sorted(self.folder.glob(f"runs/*/{FILE}")):
            yield Item("train", path.parent.name)
        for path in sorted(self.folder.glob("cells/*/[!.]*.json")):
            yield Item("test", f"{path.parent.name}/{path.stem}", path.stem.rpartition(".")[2], model=path.parent.name)

    def _run(self, item: Item) -> tuple[str, Seen | None]:
        folder = self.folder / "runs" / item.name
        record = self._read(folder / FILE, _values)
        if record is None:
            return "left", None
        finished = record.get("status") == "finished"
        spent, at = record.get("time"), record.get("finished_at")
        whole = spent.get("seconds") if isinstance(spent, dict) else None
        state = "finished" if finished else "begun"
        if record.get("kind") == HOSTED_TRAIN:
            return state, Seen(float(whole), at=float(at or 0)) if finished and whole else None
        steps = self._read(folder / "metrics.jsonl", read_steps) or Steps()
        if not steps.seconds:
            return state, Seen(float(whole), at=float(at or 0)) if finished and whole else None
        # Where a process was killed, the record has the time of the rest alone.
        rest = float(whole) - steps.seconds if finished and whole else -1.0
        around = rest if rest >= 0 else None
        return state, Seen(
            steps.seconds, 1.0 if finished else steps.done, around, steps.evaluating, at=float(at or steps.at)
        )

    def _cell(self, item: Item) -> tuple[str, Seen | None]:
        path = self.folder / "cells" / f"{item.name}.json"
        figures = self._read(path, _cell_time)
        if figures is not None:
            if figures.answered is None and item.answers:
                answered = self._read(path.with_name(path.stem + _ANSWERS), count_tokens)
                figures = replace(figures, answered=answered)
            return "finished", figures
        lines = self._read(path.with_name(path.stem + _ANSWERS), _count_lines)
        if not lines:
            return "left", None
        return "begun", Seen(0.0, min(1.0, lines / item.parts) if item.parts else 0.0)

    def _read(self, path: Path, how: Any) -> Any:
        """What `how` makes of a file, None where there is none; read again where it has changed."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        mark = (status.st_mtime_ns, status.st_size)
        if path not in self._known or self._known[path][0] != mark:
            try:
                self._known[path] = (mark, how(path))
            except FileNotFoundError:
                return None
            except OSError as error:
                raise UserError(f"cannot be read ({error.strerror})", "check the file", path) from None
        return self._known[path][1]


@dataclass(frozen=True)
class Steps:
    """What the metrics of a training say: optimizer steps taken, of how many, seconds and tokens of them, seconds of
    evaluations; `at`: when the last was written."""

    taken: int = 0
    total: int = 0
    seconds: float = 0.0
    tokens: int = 0
    evaluating: float = 0.0
    loss: float | None = None
    at: float = 0.0

    @property
    def done(self) -> float:
        return self.taken / self.total if self.total else 0.0


def read_steps(path: Path) -> Steps:
    """The steps in a metrics.jsonl; lines that are not whole are left out, as one that is just being written."""
    seconds, tokens, evaluating, last = 0.0, 0, 0.0, dict[str, Any]()
    for row in _rows(path):
        spent = row.get("time")
        own = spent.get("seconds") if isinstance(spent, dict) else None
        own = own if isinstance(own, int | float) else 0.0
        if row.get("kind") == "eval":
            evaluating += own
        elif row.get("kind") == "step" and isinstance(row.get("step"), int):
            last = row
            tokens += row["tokens"] if isinstance(row.get("tokens"), int) else 0
            seconds += own
    total, loss = last.get("total"), last.get("loss")
    return Steps(
        last.get("step", 0),
        total if isinstance(total, int) else 0,
        seconds,
        tokens,
        evaluating,
        loss if isinstance(loss, int | float) else None,
        path.stat().st_mtime,
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = parse_json(line.decode())
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _values(path: Path) -> dict[str, Any]:
    """A record. Raises UserError for one that is damaged."""
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise UserError("is not the record of a run", "the run is damaged", path)
    return values


def _cell_time(path: Path) -> Seen:
    remedy = "remove it, and the cell is measured again"
    values = read_json(path, remedy)
    spent = values.get("time") if isinstance(values, dict) else None
    seconds = spent.get("seconds") if isinstance(spent, dict) else None
    if (
        not isinstance(spent, dict)
        or not isinstance(seconds, int | float)
        or not isinstance(values.get("result"), dict)
    ):
        raise UserError("is damaged: it has no result, or no time", remedy, path)
    around, answered = spent.get("loading"), spent.get("tokens")
    return Seen(
        float(seconds),
        around=float(around) if isinstance(around, int | float) else None,
        answered=answered if isinstance(answered, int) else None,
        at=path.stat().st_mtime,
    )


def count_tokens(path: Path) -> int:
    """Tokens of the answers in a file."""
    return sum(len(row["token_ids"]) for row in _rows(path) if isinstance(row.get("token_ids"), list))


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
