"""Our figures beside the paper's: every cell with the difference and its interval, and in what the settings differ.

The interval is for two independent samples (ptst/evaluation/independent.py), though the prompts are the same: only
means of the paper are published. It is therefore rather too wide than too narrow.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptst.evaluation.independent import difference_interval, published_interval
from ptst.evaluation.two_way import Interval
from ptst.experiment.paper.cells import PaperCell
from ptst.experiment.paper.measured import Measured, Results
from ptst.experiment.paper.reader import load_paper
from ptst.experiment.paper.recipes import RECIPES, TableRecipe, is_papers

_TASKS = {"exact-match": "gsm8k", "bertscore": "chatdoctor"}  # of metrics that one task has
_FILES = {"chatdoctor": ("HealthCareMagic",)}  # what published files of the training data are called
_SEEDLESS = "the paper's figure has no SD, so its seeds are taken as one"


@dataclass(frozen=True)
class Beside:
    """A cell of the paper and ours, in its unit (per cent, or F1). `difference`: ours minus the paper's, with a 95 %
    interval. `why`: why one of them is None, or what to know of them; "" where there is nothing to say."""

    cell: PaperCell
    ours: float | None = None
    interval: Interval | None = None
    seeds: int | None = None
    prompts: int | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    why: str = ""

    @property
    def agrees(self) -> bool | None:
        """Whether the interval of the difference holds 0; None where there is none."""
        ends = self.difference_interval
        return None if ends is None else ends[0] <= 0 <= ends[1]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees}


@dataclass(frozen=True)
class Comparison:
    """A grid beside a table of the paper. `departures`: in what its settings are not the paper's, in words."""

    table: int
    title: str
    rows: tuple[Beside, ...]
    departures: tuple[str, ...]

    @property
    def measured(self) -> int:
        """Number of cells that both have."""
        return sum(row.ours is not None for row in self.rows)

    @property
    def agreeing(self) -> int:
        """Number of cells in which the interval of the difference holds 0."""
        return sum(row.agrees is True for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        counts = {"cells": len(self.rows), "measured": self.measured, "agreeing": self.agreeing}
        rows = [row.to_json() for row in self.rows]
        return {"table": self.table, "title": self.title, **counts, "departures": list(self.departures), "rows": rows}


def beside_paper(results: Mapping[str, Any]) -> list[Comparison]:
    """The results of a grid (its results.json), whole or in part, beside the tables that it belongs to: that of its
    recipe, or else those of its model and training data of which it has at least one cell. [] where there are none."""
    grid = Results(results)
    tables = find_tables(grid)
    found = [compare(grid, number) for number in tables]
    return found if grid.setting("recipe") in RECIPES else [each for each in found if each.measured]


def find_tables(grid: Results) -> tuple[int, ...]:
    """The tables that a grid can be compared with."""
    if (recipe := RECIPES.get(str(grid.setting("recipe")))) is not None:
        return (recipe.table,)
    alike = [recipe for recipe in RECIPES.values() if _same_model(grid, recipe) and _same_data(grid, recipe)]
    return tuple(recipe.table for recipe in alike)


def compare(grid: Results, table: int) -> Comparison:
    """A grid beside a table of the paper. Raises UserError as `Paper.table`."""
    recipe = next(recipe for recipe in RECIPES.values() if recipe.table == table)
    rows = tuple(_beside(cell, _find(grid, cell)) for cell in load_paper().table(table))
    return Comparison(table, recipe.title, rows, tuple(_departures(grid, recipe, rows)))


def _find(grid: Results, cell: PaperCell) -> Measured | None:
    if cell.metric == "asr":
        task = grid.task_on(cell.set)
    else:
        task = next((t for t in grid.tasks if t.partition(":")[0] == _TASKS.get(cell.metric, cell.set)), None)
    found = grid.find(cell.train, cell.test, task, cell.mixed)
    if found and cell.metric == "exact-match" and "gsm8k" not in grid.set_of(found.place.task):
        problems = str(grid.setting("eval.data") or "")
        return found if "gsm8k" in problems.lower() or found.prompts == cell.prompts else None
    return found


def _beside(cell: PaperCell, found: Measured | None) -> Beside:
    if found is None:
        return Beside(cell, why="; ".join(filter(None, ("not measured here", cell.inconsistent))))
    scale = 100.0 if cell.unit == "%" else 1.0
    own = None if found.interval is None else (scale * found.interval[0], scale * found.interval[1])
    figures: dict[str, Any] = {"ours": scale * found.value, "interval": own}
    figures |= {"seeds": found.seeds, "prompts": found.prompts}
    if cell.inconsistent:
        return Beside(cell, **figures, why=f"not compared: {cell.inconsistent}")
    difference = scale * found.value - cell.value
    theirs = papers_interval(cell)
    if own is None or theirs is None:
        why = "no interval: the answers that the paper's mean is over are not published"
        return Beside(cell, **figures, difference=difference, why=why if theirs is None else "ours has no interval")
    ends = difference_interval(scale * found.value, own, cell.value, theirs)
    why = _SEEDLESS if cell.sd is None and cell.seeds > 1 else ""
    return Beside(cell, **figures, difference=difference, difference_interval=ends, why=why)


def papers_interval(cell: PaperCell) -> Interval | None:
    """95 % interval of a figure of the paper, in its unit; None of a mean that is no rate."""
    if cell.unit != "%":
        return None
    sd = None if cell.sd is None else cell.sd / 100
    low, high = published_interval(cell.value / 100, cell.prompts, cell.seeds, sd)
    return 100 * low, 100 * high


def _departures(grid: Results, recipe: TableRecipe, rows: tuple[Beside, ...]) -> list[str]:
    """In what a grid is not the paper's, in words, by its settings and the sizes of its cells."""
    found = []
    cell = rows[0].cell
    if grid.model and not _same_model(grid, recipe):
        found.append(f"the model is {grid.model}, the paper's {cell.model}")
    if grid.data and not _same_data(grid, recipe):
        found.append(f"the training data are {grid.data}, the paper's {cell.data}")
    for name, (value, origin) in recipe.settings().items():
        mine, same = grid.setting(name), list(value) if isinstance(value, tuple) else value
        compared = (is_papers(origin) and name.startswith("train.")) or name in ("eval.judge", "eval.temperature")
        if compared and mine is not None and mine != same:
            found.append(f"{name} is {mine}, the paper's {value}")
    for set_ in dict.fromkeys(row.cell.set for row in rows):
        sizes = {row.prompts for row in rows if row.cell.set == set_ and row.prompts is not None}
        whole = next(row.cell.prompts for row in rows if row.cell.set == set_)
        if other := sorted(sizes - {whole}):
            found.append(f"{set_} has {', '.join(map(str, other))} prompts, the paper's {whole}")
    trained = {row.seeds for row in rows if row.seeds is not None and row.cell.train is not None}
    if cell.sd_over == "decoding":
        papers = max(row.cell.seeds for row in rows)
        drawn = grid.setting("eval.decode_seeds") or 1
        found += [f"answers were drawn {drawn} times, the paper's {papers}"] if drawn != papers else []
    elif trained and max(trained) < (papers := max(row.cell.seeds for row in rows)):
        found.append(f"cells are means of at most {max(trained)} seeds, the paper's of {papers}")
    return found


def _same_model(grid: Results, recipe: TableRecipe) -> bool:
    papers = load_paper().table(recipe.table)[0].model
    return _plain(grid.model).removesuffix("hf") == _plain(papers)


def _same_data(grid: Results, recipe: TableRecipe) -> bool:
    name = load_paper().table(recipe.table)[0].data
    return any(_plain(alias) in _plain(grid.data) for alias in (name, *_FILES.get(name, ())))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
