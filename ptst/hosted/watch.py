"""A job as it goes: its state told, its events on the progress line and in the run folder.

`events.jsonl` and `metrics.jsonl` are made anew from what the endpoint has, so that they are the same whether or not
this process was there all the time.
"""

import csv
import io
import json
import math
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any, Self

from ptst.errors import UserError
from ptst.hosted.client import JobsClient, Json
from ptst.hosted.job import ENDED
from ptst.progress import ProgressLine, say
from ptst.storage import write_atomically

FIRST_POLL, LONGEST_POLL = 1.0, 15.0  # seconds between two looks at a job, which grow
_STATES = {"validating_files": "the endpoint validates the file", "queued": "the job waits", "running": "training"}
# Names of the endpoint, in events and in the results file, and ours.
_METRICS = {
    "train_loss": "loss",
    "train_mean_token_accuracy": "token_accuracy",
    "train_accuracy": "token_accuracy",
    "valid_loss": "validation_loss",
    "valid_mean_token_accuracy": "validation_token_accuracy",
    "full_valid_loss": "full_validation_loss",
    "full_valid_mean_token_accuracy": "full_validation_token_accuracy",
}


class Watch:
    """A job of a run folder, from `with` on until it ends."""

    def __init__(self, client: JobsClient, job: Json, folder: Path):
        self.client, self.job, self.folder = client, job, folder
        self.events: list[Json] = []
        self.line: ProgressLine | None = None
        self.said = ""
        self.deaf = False  # the endpoint does not tell the events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type | BaseException | TracebackType | None) -> None:
        if self.line is not None:
            self.line.__exit__(*error)

    def to_end(self) -> Json:
        """Wait until the job has ended; returns it. Raises UserError where the endpoint cannot be asked any more."""
        pause, id = FIRST_POLL, str(self.job["id"])
        while True:
            self.update()
            if self.job.get("status") in ENDED:
                return self.job
            sleep(pause)
            pause = min(pause * 1.5, LONGEST_POLL)
            if (found := self.client.job(id)) is None:
                raise UserError(f"{id} is no longer at {self.client.address.url}")
            self.job = found

    def update(self) -> None:
        """Fetch what is new, write it, and tell it."""
        status = str(self.job.get("status"))
        if status != self.said and status not in ENDED:
            self.said = status
            say(f"{self.job['id']}: {_STATES.get(status, f'its state is {status}')}")
        if self.fetch():
            self.write(metrics(self.events))
            self.tell()

    def fetch(self) -> bool:
        """Add the events that are not known yet; whether there were any. Without them a job goes on all the same: that
        is told, and they are asked for once more at its end."""
        if self.deaf and self.job.get("status") not in ENDED:
            return False
        known, new = set(map(_event_key, self.events)), dict[str, Json]()
        try:
            for event in self.client.events(str(self.job["id"])):  # newest first
                if (key := _event_key(event)) in known:
                    break
                new.setdefault(key, event)
        except UserError as error:
            if not self.deaf:
                say(f"note: the events of {self.job['id']} cannot be had ({error}); it is waited for without them")
            self.deaf = True
            return False
        self.events += reversed(new.values())
        return bool(new)

    def write(self, rows: list[Json]) -> None:
        _write_rows(self.folder / "events.jsonl", self.events)
        _write_rows(self.folder / "metrics.jsonl", rows)

    def finish(self) -> list[Json]:
        """Write all metrics of an ended job, with those of its results files; returns them."""
        rows = metrics(self.events)
        files = self.job.get("result_files")
        for id in files if isinstance(files, list) else ():
            if (text := self.client.text(str(id))) is None:
                say(f"note: the results file {id} cannot be had; the metrics are those of the events")
                continue
            write_atomically(self.folder / "results.csv", text.encode())
            rows = _merged(rows, read_results(text))
        self.write(rows)
        return rows

    def tell(self) -> None:
        """The last step on the progress line."""
        data = next((d for event in reversed(self.events) if (d := _data(event)).get("step") is not None), {})
        step, total = data.get("step"), data.get("total_steps")
        if type(step) is not int or type(total) is not int or not 0 < step <= total:
            return
        if self.line is None:
            self.line = ProgressLine("train", total, first=None).__enter__()
        loss = data.get("train_loss")
        self.line.update(step, f"loss {loss:.3f}" if isinstance(loss, int | float) else "")


def metrics(events: list[Json]) -> list[Json]:
    """Rows of metrics.jsonl, one for each step, from the events of a job."""
    rows = []
    for event in events:
        data = _data(event)
        if event.get("type") == "metrics" and type(data.get("step")) is int:
            row = {"kind": "step", "step": data["step"], "total": data.get("total_steps"), **_numbers(data)}
            rows.append({**row, "time": {"created_at": event.get("created_at")}})
    return _merged([], rows)


def read_results(text: str) -> list[Json]:
    """The same from a results file (CSV); [] for what is none."""
    try:
        table = list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        return []
    steps = [row for row in table if (row.get("step") or "").isdecimal()]
    return [{"kind": "step", "step": int(row["step"]), **_numbers(row)} for row in steps]


def _merged(rows: list[Json], more: list[Json]) -> list[Json]:
    """One row for each step, in order; what several sources say of a step is put together."""
    found: dict[int, Json] = {}
    for row in (*rows, *more):
        found[row["step"]] = {**row, **found.get(row["step"], {})}
    return [found[step] for step in sorted(found)]


def _event_key(event: Json) -> str:
    id = event.get("id")
    return id if isinstance(id, str) else json.dumps(event)


def _data(event: Json) -> Json:
    data = event.get("data")
    return data if isinstance(data, dict) else {}


def _numbers(data: Json) -> dict[str, float]:
    found = {}
    for name, ours in _METRICS.items():
        try:
            value = float(data[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(value):  # JSON has no other
            found[ours] = value
    return found


def _write_rows(path: Path, rows: list[Any]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
