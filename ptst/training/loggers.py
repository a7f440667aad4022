"""The metrics of a run in the experiment loggers that the user keeps: TensorBoard, trackio, Weights & Biases, MLflow.

metrics.jsonl is the record; a logger is a copy of it. What a logger lacks when a run begins or resumes is sent from
there, and what it has is not sent again, so that a run that was killed has each step once. A logger that fails is left
out with a warning, and catches up when the run is resumed. Metrics and settings are sent: no answers, no keys.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from ptst.errors import Setting
from ptst.packages import check_package
from ptst.progress import say
from ptst.reading import parse_json
from ptst.records import TrainRecord, bare, read_json
from ptst.settings import LoggerName
from ptst.storage import write_json
from ptst.training.interrupt import Interrupted

LOGGERS: tuple[str, ...] = get_args(LoggerName)
NOTES = "loggers.json"  # in the run folder: under which names the loggers know the run
PROJECT = "ptst"  # the project or experiment in which loggers file a run
_SECONDS = 1.0  # rows are sent together, as many as come in this time
Row = Mapping[str, Any]  # of metrics.jsonl


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for a logger whose package is not installed, before anything is computed."""
    for name in names:
        check_package(name, (Setting("log"), f" {name} needs"), name)


@dataclass
class LoggedRun:
    """A run as its loggers see it. `done`: optimizer steps that were taken before. `params`: its settings. `notes`:
    what a logger must know of it when it is resumed; `keep` writes them down."""

    folder: Path
    done: int
    params: Mapping[str, Any]
    notes: dict[str, Any]
    keep: Callable[[], None]

    @property
    def name(self) -> str:
        """The folder's; of a grid's run, with the grid's."""
        folder = self.folder.absolute()
        return f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == "runs" else folder.name


class Backend(Protocol):
    """A package that logs. `last`: the last step that it has, of rows of each kind. All may raise what they like."""

    last: dict[str, int]

    def write(self, rows: Sequence[tuple[int, str, dict[str, float]]]) -> None:
        """Log rows: step, kind and values."""

    def close(self, status: str) -> None:
        """The end of the run, or of this process's part: `finished`, `interrupted` or `failed`."""


class Loggers:
    """The loggers of a run, each of which may fail on its own."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}
        self._waiting: list[Row] = []
        self._sent = time.monotonic()

    def open(self, name: str, run: LoggedRun) -> None:
        """Begin with a logger, or go on with it, and send what it lacks."""
        from ptst.training.log_backends import BACKENDS

        try:
            with _quiet():
                self._backends[name] = BACKENDS[name](run)
        except Exception as error:  # whatever the package raises: training does not need it
            self._fail(name, error)
        else:
            self._send(list(_rows(run.folder / "metrics.jsonl")), [name])

    def add(self, row: Row) -> None:
        """Log a row of metrics.jsonl, a second later at most."""
        if self._backends:
            self._waiting.append(row)
            if row["kind"] != "step" or time.monotonic() - self._sent >= _SECONDS:
                self._flush()

    def close(self, status: str) -> None:
        """As of a backend. Each logger then has all rows."""
        self._flush()
        for name, backend in list(self._backends.items()):
            try:
                with _quiet():
                    backend.close(status)
            except Exception as error:
                self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        self._backends.pop(name, None)
        words = " ".join(str(error).split())[:300] or type(error).__name__
        say(f"warning: {name} failed ({words}); the run goes on without it, and metrics.jsonl has everything")

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        self._send(rows, list(self._backends))
        self._sent = time.monotonic()

    def _send(self, rows: Sequence[Row], names: Sequence[str]) -> None:
        for name in names:
            backend = self._backends[name]
            try:
                new = [_values(row) for row in rows if row["step"] > backend.last.get(row["kind"], -1)]
                if new:
                    backend.write(new)
                    backend.last |= {kind: step for step, kind, _ in new}
            except Exception as error:
                self._fail(name, error)


@contextlib.contextmanager
def open_loggers(names: Sequence[str], folder: Path, record: TrainRecord, done: int) -> Iterator[Loggers]:
    """The loggers of a run, with all rows of its metrics.jsonl, which ends at step `done`; closed at the end, with how
    it ended."""
    path, loggers = folder / NOTES, Loggers()
    notes = read_json(path) if names and path.exists() else {}
    for name in names:
        own = notes.setdefault(name, {})
        loggers.open(name, LoggedRun(folder, done, params(record), own, lambda: write_json(path, notes)))
    status = "failed"
    try:
        yield loggers
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        loggers.close(status)


def _rows(path: Path) -> Iterator[Row]:
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from (parse_json(line) for line in file)


def _values(row: Row) -> tuple[int, str, dict[str, float]]:
    """What is logged of a row: the figures that a chart can show."""
    if row["kind"] == "eval":
        return row["step"], "eval", {"validation_loss": row["validation_loss"]}
    values = {key: row[key] for key in ("loss", "lr", "grad_norm")} | row["time"]
    return row["step"], row["kind"], {key: value for key, value in values.items() if value is not None}


def params(record: TrainRecord) -> dict[str, Any]:
    """The settings of a run and what they came to. Files and folders are named by their last names: loggers may send
    this elsewhere."""
    found = {**record.settings, "template": record.template.name, "template_family": record.family.name}
    found |= {"chat_format": record.chat_format, "dtype": record.dtype, "model": record.model}
    found |= {"data": record.data.name, "data_fingerprint": record.data.fingerprint, "weights": record.weights}
    found |= {"micro_batch_tokens": record.micro_batch_tokens}
    found |= {f"versions.{name}": version for name, version in record.environment.get("versions", {}).items()}
    found |= {name: record.environment.get(name) for name in ("device", "ranks", "git_commit")}
    own = {"log", "out", "resume", "dry_run", "template_file"}
    return {key: _bare(json.loads(json.dumps(value))) for key, value in found.items() if key not in own}


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_bare(v) for v in value]
    return bare(value) if isinstance(value, str) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What packages print goes to standard error: standard output carries the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
