"""The display of work that several processes share: what is done, what each of them does, when all will be done.

Every worker shows all of them. What it does itself it writes down for the others (`ptst.experiment.status.at_work`);
the rest it reads in the folder, every few seconds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import ProgressColumn, TextColumn, TimeElapsedColumn

from ptst.experiment.status.at_work import WorkerFile
from ptst.experiment.status.watch import Watch
from ptst.experiment.status.words import clock, one_worker
from ptst.progress import ProgressLine, console, duration, printable
from ptst.training.interrupt import Interrupted

LOOK = 5.0  # seconds between two looks at the folder


class Board(ProgressLine):
    """A progress line over runs and cells, with one line for every other worker. `folder` is the grid's, in which this
    process says what it does; `watch`: of all the folders that are shown."""

    def __init__(self, what: str, folder: Path, watch: Watch):
        self.watch, self.folder = watch, folder
        self.standing, self.looked = watch.look(), time.monotonic()
        super().__init__(what, len(self.standing.items), first=len(self.standing.finished))
        self.now = self.done  # finished when last looked
        self.others: dict[str, int] = {}  # rows of the bar, by worker

    @staticmethod
    def time_columns() -> tuple[ProgressColumn | str, ...]:
        return (TimeElapsedColumn(), TextColumn("{task.fields[eta]}", markup=False))

    def __enter__(self) -> "Board":
        self.file = WorkerFile(self.folder)
        self.bar.start()
        self.task = self.bar.add_task(printable(self.what), total=self.total, completed=self.done, note="", eta="")
        if self.inside is None:
            ProgressLine._outer = self
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        super().__exit__(*exc)

    @contextmanager
    def busy(self, *names: str) -> Iterator[None]:
        """While this process works on these items."""
        with self.file.busy([*names]):
            self.refresh()
            try:
                yield
            except Interrupted:
                raise
            except Exception as error:  # what the worker does not survive
                for name in names:
                    self.file.fail(name, f"{type(error).__name__}: {error}")
                raise
        self.refresh()

    def remaining(self) -> float | None:
        left = self.standing.until_done
        return None if left is None else max(0.0, left - (time.monotonic() - self.looked))

    def eta(self) -> str:
        left = self.remaining()
        words = [] if left is None else [f"{duration(left)} left, until {clock(time.time() + left)}"]
        if elsewhere := self._elsewhere():
            words.append(f"{len(elsewhere)} other worker{'s' * (len(elsewhere) > 1)}: {'; '.join(elsewhere.values())}")
        return "; ".join(words)

    def update(self, done: int | None = None, note: str = "") -> None:
        """`note`: how far the step at hand is. What is done is read from the folders."""
        self.file.tell(note)
        if time.monotonic() - self.looked > LOOK:
            self.refresh()
        super().update(self.now, note)

    def refresh(self) -> None:
        """Look at the folders again."""
        self.standing, self.looked = self.watch.look(), time.monotonic()
        self.total, self.now = len(self.standing.items), len(self.standing.finished)
        if self.inside is None and console.is_terminal:
            self._show_others()

    def _show_others(self) -> None:
        left = self.remaining()
        eta = "" if left is None else f"{duration(left)} left, until {clock(time.time() + left)}"
        self.bar.update(self.task, total=self.total, completed=self.now, eta=eta)
        elsewhere = self._elsewhere()
        for who in [who for who in self.others if who not in elsewhere]:
            self.bar.remove_task(self.others.pop(who))  # type: ignore[arg-type]
        for who, words in elsewhere.items():
            if who not in self.others:
                self.others[who] = self.bar.add_task("", total=None, note="", eta="")
            self.bar.update(self.others[who], note=printable(words))  # type: ignore[arg-type]

    def _elsewhere(self) -> dict[str, str]:
        """What the other workers do, in words."""
        own = self.file.note.who
        return {w.who: one_worker(w, self.standing) for w in self.standing.workers or () if w.who != own}
