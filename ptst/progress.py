"""Words on a terminal: lines of progress on standard error, a progress bar, and consoles that obey no text of others.

Data, answers and names of files may hold escape sequences, which could change the terminal's title or its clipboard,
and rich's markup. Everything for people is printed through `open_console` or `printable`.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text


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


# Control characters but line feed and tab, signs that reverse the direction of writing, characters that show nothing
# (joiners stay between letters or pictures that need them), and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
    "|(?<=[\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?=[\x00-\x7f])"
)


def replace_unprintable(text: str, escape: Callable[[str], str]) -> str:
    """The text with an escape for each character that could command a terminal, or would not be seen."""
    return _UNPRINTABLE.sub(lambda found: escape(found[0]), text)


def printable(text: str) -> str:
    """The text for a terminal, such characters as U+...., as in U+001B."""
    return replace_unprintable(text, lambda character: f"U+{ord(character):04X}")


def printable_json(value: Any) -> str:
    """A value as JSON on one line, with such characters escaped: the same value, and no command."""
    text = json.dumps(value, ensure_ascii=False)
    return replace_unprintable(text, lambda character: json.dumps(character)[1:-1])


class _Printable:
    """Anything that rich prints, with its text made `printable`."""

    def __init__(self, content: ConsoleRenderable):
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.content, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class _ObeyNothing(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(content) for content in renderables]


def open_console(**options: Any) -> Console:
    """A console (`options` of rich's) that prints text as it is: no markup, no emoji codes, no control characters."""
    new = (_Words if options.get("stderr") else Console)(highlight=False, emoji=False, markup=False, **options)
    new.push_render_hook(_ObeyNothing())
    return new


console = open_console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """One line of progress."""
    console.print(text)


@cache
def say_once(text: str) -> None:
    """The same, once however often it is said."""
    say(text)


def duration(seconds: float) -> str:
    """`1:05`, or from an hour on `2:01:05`."""
    whole = max(0, int(seconds))
    minutes = f"{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{whole // 3600}:" * (whole >= 3600) + f"{minutes}:{whole % 60:02d}"


class _Counts(MofNCompleteColumn):
    """3/15; nothing where there is no total."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class ProgressLine:
    """A progress bar on a terminal, a line every few seconds elsewhere. One inside another is told on the outer one.
    `first`: how much was done before (None: what the first update says). Whoever knows better how long the rest takes
    overrides `remaining`."""

    _outer: ClassVar["ProgressLine | None"] = None

    def __init__(self, what: str, total: int, every: float = 10.0, first: int | None = 0):
        self.what, self.total, self.every, self.first = what, total, every, first
        self.inside = ProgressLine._outer
        self.done = first or 0
        self.start = time.monotonic()
        self.said = -1e9
        what_column, note_column = (
            TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[note]")
        )
        columns = (what_column, BarColumn(), _Counts(), note_column)
        hidden = not console.is_terminal or self.inside is not None
        self.bar = Progress(*columns, *self.time_columns(), console=console, disable=hidden)

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task(printable(self.what), total=self.total, completed=self.done, note="")
        if self.inside is None:
            ProgressLine._outer = self
        return self

    def __exit__(self, *_exc: object) -> None:
        self.bar.stop()
        if self.inside is None:
            ProgressLine._outer = None

    @staticmethod
    def time_columns() -> tuple[ProgressColumn | str, ...]:
        """The last columns of the bar."""
        return (TimeElapsedColumn(), "ETA", TimeRemainingColumn())

    def remaining(self) -> float | None:
        """Seconds, if what is left goes on as what was done here; None until something was."""
        new = self.done - (self.first or 0)
        return (time.monotonic() - self.start) / new * (self.total - self.done) if new > 0 else None

    def eta(self) -> str:
        left = self.remaining()
        return "" if left is None else f"ETA {duration(left)}"

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total, and a few words: loss, tokens per second."""
        complete = done == self.total and done != self.done
        self.done = done
        if self.first is None:
            self.first = done
        if self.inside is not None:
            self.inside.update(self.inside.done, f"{self.what} {done}/{self.total}  {note}")
            return
        self.bar.update(self.task, completed=done, note=printable(note))
        now = time.monotonic()
        if not console.is_terminal and (now - self.said >= self.every or complete):
            self.said = now
            eta = self.eta()
            say(f"{self.what} {done}/{self.total}  {note}{'  ' * bool(eta)}{eta}")
