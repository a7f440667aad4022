"""Heat maps in the paper's layout: what was trained in rows, under what it was tested in columns, a figure in each cell
with its interval and n. A cell without a figure says why: it never looks like a zero."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptst.defense_names import NONE
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import TASKS, base, shown
from ptst.evaluation.tasks.task import Metric
from ptst.experiment.plan import BASE, epoch_name, slug
from ptst.reporting.tables import Table

STEPS = 20  # of colour from none to full
HARM, GOOD, OTHER = "harm", "good", "other"
SAFETY = ("safety", "xstest")  # the tasks of harmful requests
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class HeatCell:
    """`value`: a share or a mean; None where there is none, and `why` says so. `n`: judged answers of all seeds."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int | None = None
    unjudged: int = 0
    seeds: int = 0
    ptst: bool = False
    why: str = ""
    note: str = ""
    percent: bool = True
    over: str = "seeds"

    @property
    def text(self) -> str:
        if self.value is None:
            return self.why
        return f"{100 * self.value:.1f}" if self.percent else f"{self.value:.3f}"

    @property
    def interval(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return ""
        return f"[{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def size(self) -> list[str]:
        """n and seeds in words."""
        if self.value is None:
            return []
        judged = [f"n {self.n}"] if self.n is not None else []
        unjudged = [f"{self.unjudged} unjudged"] if self.unjudged else []
        seeds = []
        if self.seeds > 1:
            digits, scale = (1, 100) if self.percent else (3, 1)
            spread = "" if self.sd is None else f" \u00b1 {scale * self.sd:.{digits}f}"
            seeds = [f"{self.seeds} {self.over}{spread}"]
        return [*judged, *unjudged, *seeds]


@dataclass(frozen=True)
class Heat:
    """A figure of a task as a matrix. `hue`: what much of it means; `scale`: the values of no and of full colour."""

    key: str
    task: str
    metric: str
    title: str
    set_name: str
    unit: str
    hue: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[HeatCell]]
    corner: str = "trained under \\ tested under"
    scale: tuple[float, float] = (0.0, 1.0)

    def step(self, cell: HeatCell) -> int:
        """The cell's place on the scale of colours."""
        low, high = self.scale
        assert cell.value is not None, "only a figure has a colour"
        share = (cell.value - low) / (high - low) if high > low else 0.0
        return round(STEPS * min(1.0, max(0.0, share)))

    @property
    def table(self) -> Table:
        """With the interval in each cell, and every number in the CSV."""
        rows, bold = [], set()
        long: list[Sequence[object]] = []
        for i, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True)):
            rows.append([row, *(" ".join(filter(None, (c.text, c.interval))) for c in cells)])
            bold |= {(i, j + 1) for j, c in enumerate(cells) if c.ptst}
            for column, c in zip(self.columns, cells, strict=True):
                figures = (c.value, c.low, c.high, c.sd, c.n, c.unjudged, c.seeds)
                long.append((row, column, *figures, c.ptst, c.why or c.note))
        head = ("row", "column", "value", "low", "high", "population_sd", "judged", "unjudged", "seeds", "ptst", "note")
        caption = f"{self.title}, {self.unit} ({self.set_name}). 95 % intervals in brackets; bold: PTST."
        return Table(self.key, caption, [self.corner, *self.columns], rows, frozenset(bold), values=(head, long))


def model_name(summary: Summary, cell: Mapping[str, Any]) -> str:
    """The name of a cell's model in tables."""
    name = str(summary["base"]) if cell["train"] == BASE else str(cell["train"])
    name += "" if cell.get("defense", NONE) == NONE else f", {cell['defense']}"
    return name + ("" if cell.get("epochs") is None else f", {epoch_name(cell['epochs'])}")


def hue_of(task: str, metric: str) -> str:
    """What much of a figure means: harm, good, or neither."""
    name = metric.rpartition(":")[2]
    if name in ("off-topic", "incoherent") or base(task) == "prompts":
        return OTHER
    if base(task) == "over-refusal" or metric.startswith("safe:"):
        return HARM if name == "refusal" else GOOD
    if base(task) in SAFETY:
        return GOOD if name == "refusal" else HARM
    return OTHER if base(task) in ("nll", "distance", "margin") else GOOD


def metrics(summary: Summary) -> list[tuple[str, Metric]]:
    """Every metric of every task that some cell has, in the order of TASKS."""
    tasks = dict.fromkeys(task for cell in summary["cells"] for task in cell["tasks"] if base(task) in TASKS)
    found = [m for m in shown(tasks, "grid") if m[1].unit != "count"]
    return [(t, m) for t, m in found if any(m.key in cell["tasks"].get(t, {}) for cell in summary["cells"])]


def heat_maps(summary: Summary, absent: Mapping[tuple[str, str, str], str]) -> Iterator[Heat]:
    """One for each figure of each task, of test templates; then of each ladder, rungs in rows. `absent`: why a cell has
    no figure, by names of model, test and task."""
    ladder = summary.get("ladder", {})
    plain = [c for c in summary["cells"] if c["test"] not in ladder]
    for task, metric in metrics(summary):
        lacking = [k for k in absent if k[2] == task and k[1] not in ladder]
        rows = list(dict.fromkeys([*(model_name(summary, c) for c in plain), *(k[0] for k in lacking)]))
        columns = list(dict.fromkeys([*(c["test"] for c in plain), *(k[1] for k in lacking)]))
        if rows and columns:
            yield _heat(summary, task, metric, rows, columns, absent)
        yield from _ladders(summary, task, metric, absent)


def _heat(
    summary: Summary, task: str, metric: Metric, rows: list[str], columns: list[str], absent: Mapping[Any, str]
) -> Heat:
    by_place = {(model_name(summary, c), c["test"]): c for c in summary["cells"]}
    cells = [[_cell(by_place.get((r, c)), task, metric, absent.get((r, c, task))) for c in columns] for r in rows]
    return _made(f"{slug(task)}.{slug(metric.key)}", summary, task, metric, rows, columns, cells)


def _ladders(summary: Summary, task: str, metric: Metric, absent: Mapping[Any, str]) -> Iterator[Heat]:
    """Of each training template: its rungs in rows, models in columns."""
    ladder = summary.get("ladder", {})
    trainings = dict.fromkeys(rung["training"] for rung in ladder.values())
    for training in trainings:
        tests = [full for full, rung in ladder.items() if rung["training"] == training]
        own = [c for c in summary["cells"] if c["test"] in tests and task in c["tasks"]]
        models = sorted((c for c in own if c["train"] in (BASE, training)), key=_base_and_plain_first)
        columns = list(dict.fromkeys(model_name(summary, c) for c in models))
        by_place = {(c["test"], model_name(summary, c)): c for c in own}
        rows = [t for t in tests if any((t, c) in by_place for c in columns)]
        if rows and any(metric.key in c["tasks"][task] for c in own):
            cells = [
                [_cell(by_place.get((t, c)), task, metric, absent.get((c, t, task))) for c in columns] for t in rows
            ]
            names = [ladder[t]["rung"] for t in rows]
            key = f"ladder.{slug(training)}.{slug(task)}.{slug(metric.key)}"
            heat = _made(key, summary, task, metric, names, columns, cells)
            yield replace(heat, corner=f"tested on \\ trained under {training}")


def _base_and_plain_first(cell: Mapping[str, Any]) -> tuple[bool, bool]:
    return cell["train"] != BASE, cell["defense"] != NONE


def _made(
    key: str,
    summary: Summary,
    task: str,
    metric: Metric,
    rows: list[str],
    columns: list[str],
    cells: list[list[HeatCell]],
) -> Heat:
    values = [c.value for line in cells for c in line if c.value is not None]
    scale = (0.0, 1.0) if metric.unit == "%" else (min(values, default=0.0), max(values, default=1.0))
    sets = str(summary["sets"].get(task, task))
    return Heat(
        key,
        task,
        metric.key,
        metric.label,
        sets,
        metric.unit,
        hue_of(task, metric.key),
        rows,
        columns,
        cells,
        scale=scale,
    )


def _cell(cell: Mapping[str, Any] | None, task: str, metric: Metric, why: str | None) -> HeatCell:
    if cell is None or task not in cell["tasks"]:
        return HeatCell(why=why or "not measured")
    f = cell["tasks"][task].get(metric.key)
    if f is None:
        return HeatCell(why="not measured", ptst=cell["ptst"])
    if f["mean"] is None:
        return HeatCell(why="nothing judged in some run", ptst=cell["ptst"])
    low, high = f.get("interval95") or (None, None)
    sd, n = f.get("population_sd"), f.get("judged")
    of, percent = (n, f.get("unjudged") or 0, len(f["runs"]), cell["ptst"]), metric.unit == "%"
    return HeatCell(f["mean"], low, high, sd, *of, note=why or "", percent=percent, over=f.get("over", "seeds"))


def asr_of(cell: Mapping[str, Any], task: str) -> Mapping[str, Any] | None:
    """A cell's attack success; None where nothing was judged or measured."""
    found = cell["tasks"].get(task, {}).get(ASR)
    return found if found and found["mean"] is not None else None
