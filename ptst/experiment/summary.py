"""What a finished grid says: every cell over its seeds, the contrast that was named beforehand, others after Holm.

Between cells the seed is the unit and prompts are a sample, too (ptst/evaluation/statistics.py). The contrast: trained
and tested with a safety prompt, against tested with it only. Its measure is the share of harmful requests that are
answered on topic, without a refusal: a model that answers everything with arithmetic is broken, not unsafe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptst.evaluation.contrast import Contrast, paired_contrast, ptst_contrast
from ptst.evaluation.statistics import Cell as Outcomes
from ptst.evaluation.statistics import cell as outcomes
from ptst.evaluation.statistics import holm, summary
from ptst.evaluation.tasks.table import TASKS, base
from ptst.experiment.plan import UNTOUCHED, Cell
from ptst.experiment.run import Grid
from ptst.model.config import read_json

MEASURE = "the share of harmful requests answered on topic without refusing"
PURE, SAFE = "chat:vanilla", "chat:llama"  # the paper's recommended pair, where a grid has it
GAP = "harmful_minus_benign_refusal"  # by safety task
Key = tuple[str, float | None, str]  # train template, epochs, test template


def summarize(grid: Grid) -> dict[str, Any]:
    """Everything of results.json but settings and times. All rows and cells must be finished."""
    runs = {}
    for row in grid.rows:
        if row.template is not None and row.run not in runs:
            record = read_json(grid.out / "rows" / row.run / "run.json")
            counts = {k: record["data"][k] for k in ("examples", "tokens", "trained_tokens")}
            loss = {k: record["validation_loss"][k] for k in ("before", "after")}
            runs[row.run] = {"template": row.template, "seed": row.seed, "steps": record["steps"], **counts}
            runs[row.run] |= {"validation_loss": loss}
    groups: dict[Key, dict[str, list[Cell]]] = {}
    for cell in grid.cells:
        key = (cell.row.template or UNTOUCHED, cell.row.epochs, cell.test)
        groups.setdefault(key, {}).setdefault(cell.task, []).append(cell)
    tables = {key: {task: _table(grid, cells) for task, cells in tasks.items()} for key, tasks in groups.items()}
    found = []
    for (train, epochs, test), by_task in tables.items():
        figures: dict[str, Any] = {}
        for task, by_metric in by_task.items():
            figures[task] = {metric: _figures(table) for metric, table in by_metric.items()}
        benign = next((f["refusal"]["mean"] for task, f in figures.items() if base(task) == "over-refusal"), None)
        if benign is not None:
            gaps = {task: f["refusal"]["mean"] - benign for task, f in figures.items() if base(task) == "safety"}
            figures |= {GAP: gaps} if gaps else {}
        entry = {"train": train, "epochs": epochs, "test": test, "ptst": is_ptst(grid, train, test)}
        found.append({**entry, "tasks": figures})
    sets = {task: data.name for task, (_, data) in grid.tests.tasks.items()}
    base_name = "aligned" if grid.config.laptop else UNTOUCHED  # what row zero is
    return {"base": base_name, "sets": sets, "rows": runs, "cells": found, **_contrasts(grid, tables)}


def is_ptst(grid: Grid, train: str, test: str) -> bool:
    """Trained without a safety prompt, tested with one."""
    return train != UNTOUCHED and not grid.train_templates[train][0].safety and grid.test_templates[test][0].safety


Table = Outcomes | dict[int, float] | None


def _table(grid: Grid, cells: Sequence[Cell]) -> dict[str, Table]:
    """Each metric's outcomes by seed and prompt; of a value that is no rate, its mean by seed. None: of a half of
    XSTest in which the judge judged nothing in some run."""
    task = TASKS[base(cells[0].task)]
    results = {c.row.seed: read_json(grid.file(c, "json"))["result"] for c in cells}
    rows = {c.row.seed: _read_rows(grid, c) for c in cells}
    by_row = {seed: [task.outcomes(row) for row in of_seed] for seed, of_seed in rows.items()}
    first_rows, first = next(iter(rows.values())), next(iter(by_row.values()))
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(name for outcome in first for name in outcome):
        chosen = [i for i, outcome in enumerate(first) if name in outcome]
        prompts = [f"{i}:{first_rows[i].get('id') or first_rows[i].get('source')}" for i in chosen]
        by_seed = {seed: [of_seed[i][name] for i in chosen] for seed, of_seed in by_row.items()}
        judged = not any(np.isnan(run).all() for run in by_seed.values())
        families = [str(first_rows[i].get("family") or "") for i in chosen]
        tables[name] = outcomes(prompts, by_seed, families if all(families) else None) if judged else None
    for name, value in next(iter(results.values())).items():
        counted = (metric := task.metric(name)) is not None and metric.unit == "count"
        if not isinstance(value, dict) and not counted and all(name in result for result in results.values()):
            tables[name] = {seed: result[name] for seed, result in results.items()}
    return tables


def _read_rows(grid: Grid, cell: Cell) -> list[dict[str, Any]]:
    return [json.loads(line) for line in grid.file(cell, "rows.jsonl").read_text("utf-8").split("\n")[:-1]]


def _figures(table: Table) -> dict[str, Any]:
    if table is None:
        return {"mean": None, "population_sd": None, "sample_sd": None, "runs": {}}
    if isinstance(table, dict):
        values = np.array(list(table.values()))
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        runs: dict[int, Any] = table
        return {"mean": float(values.mean()), "population_sd": float(values.std()), "sample_sd": sd, "runs": runs}
    s = summary(table)
    runs = {seed: {"successes": rate.successes, "n": rate.n} for seed, rate in s.runs.items()}
    spread = {"population_sd": s.population_sd, "sample_sd": s.sample_sd, "interval95": s.interval and list(s.interval)}
    judged = sum(rate.n for rate in s.runs.values())
    counts = {"prompts": len(table.prompts), "judged": judged, "unjudged": table.outcomes_SP.size - judged}
    return {"mean": s.mean, **spread, **counts, "runs": runs}


def _contrasts(grid: Grid, tables: Mapping[Key, Mapping[str, Mapping[str, Table]]]) -> dict[str, Any]:
    """The pre-named contrast at the last look, and all others against the cell trained and tested with the prompt."""
    safe = [n for n, (t, _) in grid.train_templates.items() if t.safety and n in grid.test_templates]
    pure = [n for n, (t, _) in grid.train_templates.items() if not t.safety]
    task = next((t for t in grid.tests.tasks if base(t) == "safety"), None)  # of several sets, the first
    missing = [
        *(["no training template with a safety prompt that is tested, too"] if not safe else []),
        *(["no training template without one"] if not pure else []),
        *(["no task safety"] if task is None else []),
    ]
    if missing:
        sentence = f"The contrast cannot be computed: this grid has {' and '.join(missing)}."
        return {"contrast": {"sentence": sentence, "named": False, "effect": None}, "others": {}}
    prompt, plain = SAFE if SAFE in safe else safe[0], PURE if PURE in pure else pure[0]
    last = max(grid.config.at_epochs, default=None)

    def on_topic(train: str, test: str) -> Outcomes:
        table = tables[train, last, test][task]["on-topic"]
        assert isinstance(table, Outcomes)
        return table

    both = on_topic(prompt, prompt)
    names = (f"{prompt} -> {prompt}", f"{plain} -> {prompt}")
    # Other templates are in its place where a grid lacks the paper's pair.
    named: dict[str, Any] = {"measure": MEASURE, "task": task, "cells": list(names)}
    named["named"] = (prompt, plain) == (SAFE, PURE)
    try:
        found, sentence = ptst_contrast(both, on_topic(plain, prompt), MEASURE, names)
        named |= {"sentence": sentence, **_plain(found)}
    except ValueError as error:
        named |= {"sentence": f"{names[0]} minus {names[1]} cannot be computed: {error}.", "effect": None}
    # Another pure template; and the reverse cross, which tells "another template" from "safety prompt".
    pairs = [(name, prompt) for name in pure if name != plain]
    pairs += [(prompt, name) for name in grid.test_templates if name in pure]
    others: dict[str, dict[str, Any]] = {}
    p_values = {}
    for a, b in pairs:
        other = f"{a} -> {b}"
        others[other] = {"cells": [names[0], other]}
        try:
            c = paired_contrast(both, on_topic(a, b))
            others[other] |= _plain(c)
            p_values[other] = c.test.p if c.test else c.mcnemar
        except ValueError as error:
            others[other] |= {"effect": None, "sentence": f"cannot be computed: {error}"}
    adjusted = holm(p_values)
    return {"contrast": named, "others": {name: {**c, "p_holm": adjusted.get(name)} for name, c in others.items()}}


def _plain(contrast: Contrast) -> dict[str, Any]:
    return {**dataclasses.asdict(contrast), "effect": contrast.effect}
