"""What a grid would take, before anything is computed: tokens by the tokenizer, time by what is finished already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptst.data.mix import Mixture
from ptst.evaluation.margin import COMPLYING, REFUSING
from ptst.experiment.measure import base
from ptst.experiment.plan import Cell, Row
from ptst.experiment.run import Grid
from ptst.model.config import read_json

UNKNOWN = "unknown"


def estimate(grid: Grid, with_model: bool) -> list[dict[str, Any]]:
    """For every training run and cell its name, whether it is finished, tokens (trained on, or read and at most
    written) and seconds; UNKNOWN without a model, and seconds until something of the kind is finished."""
    runs = list({row.run: row for row in grid.rows if row.template is not None}.values())
    trained: dict[str, Any] = {}
    tested: dict[tuple[str, str], int] = {}
    if with_model:
        trained = {name: _trained_tokens(grid.mixture(name)) for name in grid.train_templates}
        tested = {(c.test, c.task): 0 for c in grid.cells}
        tested = {key: _tested_tokens(grid, *key) for key in tested}
    rate_trained = _rate([_spent(grid, row, trained) for row in runs])
    rates = {task: _rate([_measured(grid, c, tested) for c in grid.cells if c.task == task]) for _, task in tested}
    lines = []
    for row in runs:
        tokens = trained.get(row.template or "", UNKNOWN)
        lines.append(_line(f"train {row.run}", grid.trained(row), tokens, rate_trained))
    for cell in grid.cells:
        tokens = tested.get((cell.test, cell.task), UNKNOWN)
        lines.append(_line(f"test {cell.name}", grid.measured(cell), tokens, rates.get(cell.task)))
    return lines


def _line(what: str, finished: bool, tokens: Any, rate: float | None) -> dict[str, Any]:
    seconds: Any = UNKNOWN if rate is None or tokens == UNKNOWN else rate * tokens
    return {"what": what, "finished": finished, "tokens": tokens, "seconds": 0.0 if finished else seconds}


def _trained_tokens(mixture: Mixture) -> int:
    return round(sum(part["tokens"] * part["epochs"] for part in mixture.counts))


def _tested_tokens(grid: Grid, test: str, task: str) -> int:
    asked = grid.tests.encoded(task, grid.subjects[test])
    new = 0
    if base(task) == "margin":
        new = 3 * (len(REFUSING) + len(COMPLYING))  # an opening has some 3 tokens
    elif grid.tests.tasks[task][0].sampled:
        new = grid.tests.sampling(task).max_new_tokens
    return sum(map(len, asked)) + new * len(asked)


def _spent(grid: Grid, row: Row, trained: dict[str, Any]) -> tuple[float, int] | None:
    if not trained or not grid.trained(row):
        return None
    run = read_json(grid.out / "rows" / row.run / "run.json")
    return run["time"]["seconds"], trained[row.template or ""]


def _measured(grid: Grid, cell: Cell, tested: dict[tuple[str, str], int]) -> tuple[float, int] | None:
    if not grid.measured(cell):
        return None
    return read_json(grid.file(cell, "json"))["time"]["seconds"], tested[cell.test, cell.task]


def _rate(known: Sequence[tuple[float, int] | None]) -> float | None:
    """Seconds per token over all that is finished."""
    pairs = [k for k in known if k is not None]
    tokens = sum(n for _, n in pairs)
    return sum(s for s, _ in pairs) / tokens if tokens else None
