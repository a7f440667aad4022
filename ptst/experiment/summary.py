"""The summary of a finished grid: every cell over its seeds, then the contrasts (ptst/experiment/contrasts.py)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptst.errors import UserError
from ptst.evaluation.statistics import DECODING, Summary, summary
from ptst.evaluation.statistics import Cell as Outcomes
from ptst.evaluation.statistics import cell as outcomes
from ptst.evaluation.tasks.table import TASKS, base
from ptst.experiment.contrasts import Key, Table, contrasts, kept
from ptst.experiment.defense_contrasts import defended
from ptst.experiment.ladder.in_grid import described
from ptst.experiment.plan import BASE, GridCell
from ptst.experiment.provenance import mixed
from ptst.experiment.summarized import Summarized
from ptst.text.templates import Template

OVER_DECODINGS = "decodings of one run"  # what a figure is over, where not over the seeds of training
GAP = "harmful_minus_benign_refusal"  # by safety task


def summarize(grid: Summarized) -> dict[str, Any]:
    """Everything of results.json but the record. All runs and cells must be finished."""
    groups: dict[Key, dict[str, list[GridCell]]] = {}
    for cell in grid.cells:
        key = Key(cell.model.trained, cell.model.epochs, cell.test, cell.model.defense)
        groups.setdefault(key, {}).setdefault(cell.task, []).append(cell)
    tables = {key: {task: _table(grid, cells) for task, cells in tasks.items()} for key, tasks in groups.items()}
    found, with_what = [], mixed(grid)
    for key, by_task in tables.items():
        figures: dict[str, Any] = {}
        for task, by_metric in by_task.items():
            figures[task] = {metric: _figures(table) for metric, table in by_metric.items()}
            if any(grid.cell_figures(cell).get("decodings") for cell in groups[key][task]):
                figures[task] = {metric: {**f, "over": OVER_DECODINGS} for metric, f in figures[task].items()}
        benign = next((f["refusal"]["mean"] for task, f in figures.items() if base(task) == "over-refusal"), None)
        if benign is not None:
            harmful = {task: f["refusal"]["mean"] for task, f in figures.items() if base(task) == "safety"}
            gaps = {task: mean - benign for task, mean in harmful.items() if mean is not None}
            figures |= {GAP: gaps} if gaps else {}
        trained = _trained_under(grid, key.train)
        ptst = trained is not None and not trained.safety and grid.test_templates[key.test][0].safety
        line = {**key._asdict(), "ptst": ptst, "tasks": figures}
        made = {with_what[cell] for cells in groups[key].values() for cell in cells if with_what}
        found.append({**line, "made_with": sorted(made)} if made else line)
    sets = {task: data.name for task, (_, data) in grid.tasks.items()}
    base_name = "aligned" if grid.config.laptop else BASE  # what the base model is called in tables
    tuned = {name: model.to_json() for name, model in grid.tuned.items()}
    told = {"base": base_name, "sets": sets, "runs": _runs(grid), **({"tuned": tuned} if tuned else {})}
    told |= {"ladder": described(grid.rungs)} if grid.rungs else {}
    return {
        **told,
        "cells": found,
        **contrasts(grid, tables),
        "defended": defended(grid, tables),
        "kept": kept(grid, tables),
    }


def _trained_under(grid: Summarized, name: str) -> Template | None:
    """The training template of a run; None of the base model, and of a model of which it is unknown."""
    if name in grid.tuned:
        run = grid.tuned[name].run
        return run.template if run else None
    return None if name == BASE else grid.train_templates[name][0]


def _runs(grid: Summarized) -> dict[str, dict[str, Any]]:
    """What every grid run was trained on, and how it went."""
    names = ("template", "seed", "defense")
    return {m.run: {**{name: getattr(m, name) for name in names}, **grid.run_figures(m)} for m in grid.runs}


def _table(grid: Summarized, cells: Sequence[GridCell]) -> dict[str, Table]:
    """Each metric's outcomes by seed and prompt; of a value that is no rate, its mean by seed. None: of a half of
    XSTest in which the judge judged nothing in some run."""
    task = TASKS[base(cells[0].task)]
    results, rows = dict[int, Mapping[str, Any]](), dict[int, list[dict[str, Any]]]()
    for cell in cells:
        for run, result, of_run in _runs_of(grid, cell):
            if rows and len(of_run) != len(next(iter(rows.values()))):
                remedy = f"remove {grid.cell_file(cell, 'json')}"
                raise UserError(f"has other rows than {cells[0].name}", remedy, grid.cell_file(cell, "rows.jsonl"))
            results[run], rows[run] = result, of_run
    by_row = {run: [task.outcomes(row) for row in of_run] for run, of_run in rows.items()}
    decoded = any(grid.cell_figures(cell).get("decodings") for cell in cells)
    first_rows, first = next(iter(rows.values())), next(iter(by_row.values()))
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(name for outcome in first for name in outcome):
        chosen = [i for i, outcome in enumerate(first) if name in outcome]
        prompts = [f"{i}:{first_rows[i].get('id') or first_rows[i].get('source')}" for i in chosen]
        by_seed = {seed: [of_seed[i][name] for i in chosen] for seed, of_seed in by_row.items()}
        judged = not any(np.isnan(run).all() for run in by_seed.values())
        families = [str(first_rows[i].get("family") or "") for i in chosen]
        found = outcomes(prompts, by_seed, families if all(families) else None) if judged else None
        tables[name] = replace(found, sample=DECODING) if found and decoded else found
    for name, value in next(iter(results.values())).items():
        counted = any(metric.key == name and metric.unit == "count" for metric in task.metrics)
        if not isinstance(value, dict) and not counted and all(name in result for result in results.values()):
            tables[name] = {seed: result[name] for seed, result in results.items()}
    return tables


def _runs_of(grid: Summarized, cell: GridCell) -> Iterator[tuple[int, Mapping[str, Any], list[dict[str, Any]]]]:
    """The samples of a cell, each with its result and rows: the run, or each of its decodings."""
    figures, rows = grid.cell_figures(cell), grid.cell_rows(cell)
    decoded = figures.get("decodings")
    if not decoded:
        yield cell.model.seed, figures["result"], rows
    for seed, result in (decoded or {}).items():
        yield int(seed), result, [row for row in rows if row["seed"] == int(seed)]


def _figures(table: Table) -> dict[str, Any]:
    if table is None:
        return {"mean": None, "population_sd": None, "sample_sd": None, "runs": {}}
    if isinstance(table, dict):
        values = np.array(list(table.values()))
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        return {"mean": float(values.mean()), "population_sd": float(values.std()), "sample_sd": sd, "runs": table}
    return rate_figures(summary(table), table)


def rate_figures(s: Summary, table: Outcomes) -> dict[str, Any]:
    """A rate's summary as results.json has it."""
    runs = {seed: {"successes": rate.successes, "n": rate.n} for seed, rate in s.runs.items()}
    spread = {"population_sd": s.population_sd, "sample_sd": s.sample_sd, "interval95": s.interval and list(s.interval)}
    judged = sum(rate.n for rate in s.runs.values())
    counts = {"prompts": len(table.prompts), "judged": judged, "unjudged": table.outcomes_SP.size - judged}
    return {"mean": s.mean, **spread, **counts, "runs": runs}
