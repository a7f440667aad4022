"""What `ptst status` tells of a folder: one `Report` for every kind of folder that ptst makes. Only reads, and loads
neither a model nor torch."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.status.at_work import holder
from ptst.experiment.status.observe import read_steps
from ptst.experiment.status.study_plan import StudyPlan, read_study
from ptst.experiment.status.watch import Part, Standing, Watch
from ptst.experiment.status.words import clock, one_worker
from ptst.progress import duration
from ptst.records import ERROR, FILE, HOSTED_TRAIN, VERSION, read_json
from ptst.storage import LOCK

_KINDS = {
    "grid": "grid",
    "train": "training run",
    "eval": "evaluation",
    "align": "alignment",
    HOSTED_TRAIN: "training job at an endpoint",
}


@dataclass
class Report:
    """A folder at one time. `state`: finished, running, stopped (nobody is at work), or unknown where the system does
    not tell who is. `done` of `total` (None: unknown) are `unit`; `lines`: more, in words."""

    folder: Path
    kind: str
    state: str
    unit: str = ""
    done: int = 0
    total: int | None = None
    running: dict[str, str] = field(default_factory=dict)
    """What is being done, by whom."""
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    error: str = ""
    """The last one."""
    seconds: float | None = None
    """Left, by the clock."""
    lines: list[str] = field(default_factory=list)
    parts: list["Report"] = field(default_factory=list)

    @property
    def head(self) -> str:
        counted = f"{self.done} of {self.total}" if self.total is not None else str(self.done)
        counts = f", {counted} {self.unit} done" if self.unit else ""
        return f"{self.folder}: {self.kind}, {self.state}{counts}"

    def words(self) -> list[str]:
        """All of it in lines."""
        found = [self.head, *(f"  {line}" for line in self.lines)]
        found += [f"  {part.head}" for part in self.parts]
        if self.seconds is not None:
            found.append(f"  about {duration(self.seconds)} left, until {clock(time.time() + self.seconds)}")
        found += [f"  failed: {what}: {error}" for what, error in self.failed.items()]
        found += [f"  last error: {self.error}"] if self.error else []
        return found + [f"  damaged: {words}" for words in self.damaged]

    def to_json(self) -> dict[str, Any]:
        names = ("kind", "state", "unit", "done", "total", "running", "left", "failed", "damaged")
        found: dict[str, Any] = {"folder": str(self.folder), **{name: getattr(self, name) for name in names}}
        until = None if self.seconds is None else time.time() + self.seconds
        found |= {"last_error": self.error or None, "seconds_left": self.seconds, "until": until, "lines": self.lines}
        return {**found, "parts": [part.to_json() for part in self.parts]}


def report(folder: Path) -> Report:
    """The report of a folder. Raises UserError where there is none, and where it holds nothing of ptst's."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "give that of a grid, a study, a run or an evaluation")
    if (folder / FILE).exists():
        return _of_record(folder)
    plan = read_study(folder)
    if plan is not None:
        return _study(plan)
    within = [p.parent for p in sorted(folder.glob(f"*/{FILE}"))]
    if not within:
        cause = f"{folder} holds nothing of ptst's: there is no {FILE} in it"
        raise UserError(cause, "give the folder of a grid, a study, a run or an evaluation")
    parts = [_of_record(path) for path in within]
    finished = sum(part.state == "finished" for part in parts)
    state = "running" if any(part.state == "running" for part in parts) else "nobody is at work"
    return Report(folder, "folder of runs", state, "folders", finished, len(parts), parts=parts)


def _of_record(folder: Path) -> Report:
    """Of a folder with a record. One that is damaged, or of another version, is told of in the report."""
    try:
        record = read_json(folder / FILE)
    except UserError as error:
        return Report(folder, "folder with a damaged record", "unknown", damaged=[str(error)])
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(record, dict) or kind not in _KINDS:
        wrong = f"{folder / FILE}: is not the record of a run"
        return Report(folder, "folder with a damaged record", "unknown", damaged=[wrong])
    how = {"grid": _grid, "train": _training, "eval": _evaluation, "align": _alignment, HOSTED_TRAIN: _job}[kind]
    found: Report = how(folder, record)
    if (version := record.get("version", 1)) != VERSION:
        found.lines.append(f"made by another version of ptst (format {version}, not {VERSION})")
    return found


# Grids and studies


def _grid(folder: Path, record: dict[str, Any]) -> Report:
    standing = Watch([Part(folder)]).look()
    found = _shared(Report(folder, "grid", ""), standing)
    if record.get("status") == "finished" and not standing.left and not standing.failed:
        found.state = "finished"
    return found


def _study(plan: StudyPlan) -> Report:
    standing = plan.watch().look()
    found = _shared(Report(plan.folder, "study", ""), replace(standing, planned=standing.planned and plan.whole))
    for name in plan.parts:
        done = sum(what.startswith(f"{name}: ") for what in standing.finished)
        known = standing.planned and plan.whole
        total = sum(what.startswith(f"{name}: ") for what in standing.items) if known else None
        running = any(what.startswith(f"{name}: ") for what in standing.running)
        state = "running" if running else "finished" if done == total else "left" if not done else "begun"
        found.parts.append(Report(plan.folder / name, "grid", state, "runs and cells", done, total))
    if (plan.folder / "outcomes.json").exists() and not standing.left:
        found.state = "finished"
    return found


def _shared(found: Report, standing: Standing) -> Report:
    """What several processes work on."""
    workers = standing.workers
    found.state = "unknown" if workers is None else "running" if workers else "stopped"
    found.unit, found.done = "runs and cells", len(standing.finished)
    found.total = len(standing.items) if standing.planned else None
    found.running = {what: busy.who for what, busy in standing.running.items()}
    found.left = [what for what in standing.left if what not in found.running]
    found.failed = dict(standing.failed)
    found.error = next(reversed([*standing.failed.values()]), "")
    found.damaged = [str(error) for error in standing.damaged]
    found.seconds = standing.until_done if standing.left else None
    for kind, what in (("align", "alignments"), ("train", "runs"), ("test", "cells")):
        names = [name for name, item in standing.items.items() if item.kind == kind]
        done = sum(name in standing.finished for name in names)
        if names:
            found.lines.append(f"{what}: {done}" + (f" of {len(names)}" if standing.planned else "") + " done")
    found.lines += [one_worker(busy, standing) for busy in workers or ()]
    if begun := [what for what in standing.begun if what not in found.running and what not in found.failed]:
        found.lines.append(f"begun, and left by their processes: {', '.join(sorted(begun)[:5])}")
    if not standing.planned:
        found.lines.append("how much there is to do was not written down (by an earlier version)")
    if found.seconds is not None and not workers:
        found.lines.append("nobody is at work; the time is that of one process")
    return found


# Single runs


def _single(folder: Path, record: dict[str, Any], unit: str) -> Report:
    """What all runs have that one process works on."""
    pid = holder(folder)
    finished = record.get("status") == "finished"
    found = Report(
        folder, _KINDS[record["kind"]], "finished" if finished else "running" if pid is not None else "stopped"
    )
    found.unit = unit
    if not finished and pid is not None:
        who = f"process {pid}" if pid else "a process that cannot be seen from here"
        found.running, found.lines = {found.kind: who}, [f"at work: {who}"]
    elif not finished:
        found.error = _error(folder)
        found.lines.append("no process works on it; the same command resumes it")
    return found


def _error(folder: Path) -> str:
    """Why the last process on a run stopped, where it could say so."""
    try:
        values = read_json(folder / ERROR) if (folder / ERROR).exists() else {}
    except UserError:
        return ""
    return str(values.get("error", "")) if isinstance(values, dict) else ""


def _training(folder: Path, record: dict[str, Any]) -> Report:
    found = _single(folder, record, "steps")
    path = folder / "metrics.jsonl"
    if not path.exists():
        found.lines.append("no step has been taken")
        return found
    steps = read_steps(path)
    found.done, found.total = steps.taken, steps.total or None
    speed = f", {steps.tokens / steps.seconds:.0f} tokens/s" if steps.seconds else ""
    loss = "" if steps.loss is None else f"loss {steps.loss:.3f}"
    found.lines.append(f"{loss}{speed}, last step at {clock(steps.at)}".removeprefix(", "))
    if found.state != "finished" and steps.taken and steps.total:
        found.seconds = steps.seconds / steps.taken * (steps.total - steps.taken)
    return found


def _evaluation(folder: Path, record: dict[str, Any]) -> Report:
    found = _single(folder, record, "answers")
    settings, data = record.get("settings"), record.get("data")
    settings = settings if isinstance(settings, dict) else {}
    items = {k: v.get("items", 0) for k, v in data.items() if isinstance(v, dict)} if isinstance(data, dict) else {}
    tuned = record.get("run") is not None or record.get("adapter") is not None
    models = (1 + bool(settings.get("baseline"))) if tuned else 1
    seeds = settings.get("decode_seeds")
    each = models * (seeds if isinstance(seeds, int) else 1)
    for key, number in items.items():
        lines = sum(p.read_bytes().count(b"\n") for p in sorted(folder.glob(f"answers/*.{key}.jsonl")))
        done = sum((folder / f"{name}.{key}.jsonl").exists() for name in ("untouched", "fine-tuned"))
        whole = f"; {done} of {models} models measured"
        found.lines.append(f"{key}: {lines} answers to {number} items{whole}")
        found.done += lines
        if done < models:
            found.left.append(key)
    began, last = _since(folder), max((p.stat().st_mtime for p in folder.glob("answers/*.jsonl")), default=0.0)
    total = sum(items.values()) * each
    if found.state == "running" and began is not None and 0 < found.done < total and last > began:
        found.seconds = (last - began) / found.done * (total - found.done)
    return found


def _since(folder: Path) -> float | None:
    """When a run's process began, where it is the only one so far: a later one writes the record anew."""
    try:
        first, record = (folder / LOCK).stat().st_mtime, (folder / FILE).stat().st_mtime
    except OSError:
        return None
    return first if abs(record - first) < 30 else None


def _alignment(folder: Path, record: dict[str, Any]) -> Report:
    found = _single(folder, record, "steps")
    settings = record.get("settings")
    most = settings.get("max_steps") if isinstance(settings, dict) else None
    path = folder / "metrics.jsonl"
    found.done = read_steps(path).taken if path.exists() else 0
    if found.state == "finished":
        met = record.get("met")
        found.lines.append("the stopping rule was met" if met else "the stopping rule was not met: no model was kept")
        return found
    lines = sum(p.read_bytes().count(b"\n") for p in sorted(folder.glob("answers/*.jsonl")))
    if not found.done:
        found.lines.append(f"{lines} own answers sampled")
    found.lines.append(f"it ends where its stopping rule is met, after {most} steps at most: its time is unknown")
    return found


def _job(folder: Path, record: dict[str, Any]) -> Report:
    found = _single(folder, record, "")
    job = record.get("job")
    if isinstance(job, dict):
        found.lines.append(f"job {job.get('id')} at {record.get('endpoint')}: {job.get('status')}")
        if found.state == "stopped":
            found.lines[0] = "no process waits for it; the job may go on: the same command waits for it again"
    else:
        found.lines.append("no job was started")
    if tuned := record.get("tuned_model"):
        found.lines.append(f"made {tuned}")
    return found
