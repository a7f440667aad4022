"""Words on standard error: lines of progress, a progress bar on a terminal."""

import os
import sys
import time
from typing import Any, ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


class _Words(Console):
    """A console whose reader may go away: the words are lost then, the work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:  # the terminal was closed
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


console = _Words(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """One line of progress."""
    console.print(text, markup=False)


class ProgressLine:
    """A progress bar on a terminal, a line every few seconds elsewhere. One inside another is told on the outer one.
    `first`: how much was done before (None: what the first update says)."""

    _outer: ClassVar["ProgressLine | None"] = None

    def __init__(self, what: str, total: int, every: float = 10.0, first: int | None = 0):
        self.what, self.total, self.every, self.first = what, total, every, first
        self.inside = ProgressLine._outer
        self.done = first or 0
        self.start = time.monotonic()
        self.said = -1e9
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
        times = (TimeElapsedColumn(), "ETA", TimeRemainingColumn())
        hidden = not console.is_terminal or self.inside is not None
        self.bar = Progress(*columns, *times, console=console, disable=hidden)

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, note="")
        if self.inside is None:
            ProgressLine._outer = self
        return self

    def __exit__(self, *_exc: object) -> None:
        self.bar.stop()
        if self.inside is None:
            ProgressLine._outer = None

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total, and a few words: loss, tokens per second."""
        complete = done == self.total and done != self.done
        self.done = done
        if self.first is None:
            self.first = done
        if self.inside is not None:
            self.inside.update(self.inside.done, f"{self.what} {done}/{self.total}  {note}")
            return
        self.bar.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if not console.is_terminal and (now - self.said >= self.every or complete):
            self.said = now
            new = done - self.first
            left = (now - self.start) / new * (self.total - done) if new > 0 else None
            eta = "" if left is None else f"  ETA {int(left) // 60}:{int(left) % 60:02d}"
            say(f"{self.what} {done}/{self.total}  {note}{eta}")
