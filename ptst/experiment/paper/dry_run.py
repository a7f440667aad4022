"""The plan of a table of the paper, without a model and data, too: what would be trained and tested, how much that is,
and what is missing here.

Where all data and the model are on this machine, tokens and time are counted as for any grid (ptst.experiment.run);
else they are unknown, but for the longest that the answers can be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptst.api.names import hosted_model
from ptst.experiment import plan
from ptst.experiment.config import GridConfig
from ptst.experiment.estimate import Estimate
from ptst.experiment.paper.needs import Need, missing, model_folder
from ptst.experiment.paper.outline import answer_tokens, outline
from ptst.experiment.paper.reader import load_paper
from ptst.experiment.paper.recipes import RECIPES, TableRecipe
from ptst.experiment.run import plan_grid
from ptst.records import FILE, read_json


@dataclass(frozen=True)
class TablePlan:
    """`lines`: a line for every run and cell. `models` and `cells`: what the grid tests; `paper`: the cells that the
    table has. `answers`: tokens of all answers at their longest (None: of a task whose size is unknown)."""

    recipe: TableRecipe
    lines: list[Estimate]
    models: int
    cells: int
    paper: int
    answers: int | None
    missing: list[Need]
    device: str
    note: str
    decodings: int = 1
    """Of which each cell is a mean, where not of seeds."""

    def told(self, spell: Callable[[str], str] = str) -> list[str]:
        """The plan in lines of words. `spell`: a setting as the reader knows it."""
        runs = sum(line.what.startswith("train ") for line in self.lines)
        lines = [
            f"Table {self.recipe.table} of the paper, {self.recipe.title}: {runs} trainings, {self.models} models, "
            f"{self.cells} cells to measure, which give the paper's {self.paper} ({self._each})"
        ]
        if self.answers is not None:
            lines.append(f"answers: at most {self.answers:,} tokens")
        lines.append(f"time on this machine ({self.device}): {self._time()}")
        lines += [f"missing here: {need.tell(spell)}" for need in self.missing]
        lines += [f"assumed, since the paper does not say: {words}" for words in self.recipe.assumptions()]
        lines += [f"not measured: {self.recipe.left_out}"] if self.recipe.left_out else []
        return [*lines, self.note] if self.note else lines

    @property
    def _each(self) -> str:
        times = self.decodings
        return f"each a mean over {times} decodings" if times > 1 else "each a mean over seeds"

    def to_json(self, spell: Callable[[str], str] = str) -> dict[str, Any]:
        """The same as JSON values, without the lines."""
        needs = [{"kind": n.kind, "what": n.what, "counts": n.counts, "told": n.tell(spell)} for n in self.missing]
        counts = {"models": self.models, "cells": self.cells, "paper_cells": self.paper, "answer_tokens": self.answers}
        told = {"missing": needs, "assumed": self.recipe.assumptions(), "not_measured": self.recipe.left_out}
        return {"table": self.recipe.table, "title": self.recipe.title, **counts, "device": self.device, **told}

    def _time(self) -> str:
        left = [line for line in self.lines if not line.finished]
        seconds = [line.seconds for line in left if line.seconds is not None]
        if len(seconds) < len(left):
            why = ", ".join(need.what for need in self.missing if need.counts)
            return f"unknown, without {why}" if why else "unknown"
        return f"{'roughly ' * any(line.rough for line in left)}{sum(seconds) / 3600:.1f} hours"


def plan_table(config: GridConfig) -> TablePlan:
    """The plan of a table's recipe, with the changes that the settings make to it. Raises UserError as
    `GridConfig.check`, `load_templates` and `plan_grid`."""
    config.check()
    recipe, needs = RECIPES[config.recipe or ""], missing(config)
    models, cells = outline(config)
    if any(need.counts for need in needs):
        lines = _lines(config, models, cells)
        note = "rungs of the ladder are not counted: they are made from the data" if config.ladder else ""
    else:
        folder = None if hosted_model(config.model) is not None else model_folder(config.model)
        lines, note = plan_grid(replace(config, model=str(folder)) if folder else config, judged=False)
    table = load_paper().table(recipe.table)
    tested, answers = len({cell.model for cell in cells}), answer_tokens(config, cells, table)
    return TablePlan(
        recipe, lines, tested, len(cells), len(table), answers, needs, _device(config), note, config.eval.decode_seeds
    )


def _lines(config: GridConfig, models: list[plan.GridModel], cells: list[plan.GridCell]) -> list[Estimate]:
    """Every run and cell, without tokens and time; finished ones are told by their files."""
    folder, lines = config.folder, list[Estimate]()
    for run in dict.fromkeys(model.run for model in models if model.template is not None):
        path = folder / "runs" / run / FILE
        done = path.exists() and read_json(path).get("status") == "finished"
        lines.append(_line(f"train {run}", done))
    return lines + [_line(f"test {c.name}", (folder / "cells" / f"{c.name}.json").exists()) for c in cells]


def _line(what: str, done: bool) -> Estimate:
    return Estimate(what, done, None, 0.0 if done else None, False, None)


def _device(config: GridConfig) -> str:
    if hosted_model(config.model) is not None:
        return "the models are behind an endpoint"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
