"""The training runs of a folder as their records and metrics tell them, finished or not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.reading import parse_json, read_text
from ptst.records import FILE, read_json

Curve = list[tuple[float, float]]  # of (optimizer step, loss)


@dataclass(frozen=True)
class StoredRun:
    """`way`: how it was trained, without its seed; `values`: what run.json has; `losses`, `validation`: by step;
    `problems`: what could not be read, in words; `peak_memory`: in bytes, 0 where it is not known."""

    name: str
    way: str
    values: Mapping[str, Any] = field(repr=False)
    losses: Curve = field(default_factory=list, repr=False)
    validation: Curve = field(default_factory=list, repr=False)
    problems: tuple[str, ...] = ()
    peak_memory: int = 0

    @property
    def finished(self) -> bool:
        return self.values.get("status") == "finished"

    def get(self, *keys: str) -> Any:
        """A value of the record by its path; None where there is none."""
        found: Any = self.values
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def read_run(folder: Path, name: str | None = None) -> StoredRun:
    """A run's folder; what is damaged is among its `problems`."""
    name, problems, values = name or folder.name, list[str](), {}
    try:
        found = read_json(folder / FILE)
        values = found if isinstance(found, dict) else {}
    except UserError as error:
        problems.append(str(error))
    losses: Curve = []
    validation: Curve = []
    peak = 0
    try:
        for row in _rows(folder / "metrics.jsonl"):
            curve, key = (losses, "loss") if row.get("kind") == "step" else (validation, "validation_loss")
            if isinstance(row.get("step"), int) and isinstance(row.get(key), (int, float)):
                curve.append((row["step"], row[key]))
            memory = row["time"].get("peak_memory") if isinstance(row.get("time"), Mapping) else None
            peak = max(peak, memory) if isinstance(memory, int) else peak
    except UserError as error:
        problems.append(str(error))
    return StoredRun(name, _way(values) or name, values, losses, validation, tuple(problems), peak)


def read_runs(folder: Path) -> list[StoredRun]:
    """Every run below `folder`/runs, in the order of their names."""
    return [read_run(path.parent) for path in sorted((folder / "runs").glob(f"*/{FILE}"))]


def _way(values: Mapping[str, Any]) -> str:
    """The training template, and the defence as the run's folder names it."""
    template = values.get("template")
    name = str(template.get("name", "")) if isinstance(template, Mapping) else ""
    settings = values.get("settings")
    out = str(settings.get("out") or "") if isinstance(settings, Mapping) else ""
    defense = Path(out).name.partition(".seed")[2].partition(".")[2]
    return f"{name}, {defense}" if name and defense else name


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The whole lines of a file of metrics. Raises UserError for one that is no row."""
    if not path.exists():
        return
    try:
        lines = read_text(path).split("\n")[:-1]  # a last line without its end is being written
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(f"cannot be read ({error})", where=path) from None
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError("is not a row of metrics", where=f"{path}:{number}")
        yield row
