"""The material of an evaluation's folder, as a matrix with one test template."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation.rates import Rate
from ptst.evaluation.stored_answers import BASE, places, read_rows
from ptst.evaluation.tasks.table import TASKS, base
from ptst.evaluation.tasks.task import rates
from ptst.records import FILE, VERSION, read_json
from ptst.reporting.material import Material, Note, mapping
from ptst.reporting.runs import read_run

Figures = dict[str, Any]


def read_evaluation(folder: Path) -> Material:
    """Raises UserError for a record that is damaged; all else that is wrong is among the notes."""
    record = read_json(folder / FILE)
    notes = list[Note]()
    if (version := record.get("version", 1)) != VERSION:
        notes.append(Note(f"run.json was made by another version of ptst (format {version}, not {VERSION})."))
    results = _results(folder, notes)
    try:
        cells = [*_cells(results)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        notes.append(Note(f"results.json is damaged ({error!r}); the judged answers are counted instead."))
        results, cells = {}, []
    if not results:
        notes.append(Note("Not finished: there is no results.json to go by. Shown is what has been judged so far."))
        cells = [*_so_far(folder, record, notes)]
    data = mapping(record.get("data"))
    name = mapping(results.get("judge")).get("name") or mapping(record.get("settings")).get("judge")
    sets = {task: str(mapping(data.get(task)).get("name", task)) for c in cells for task in c["tasks"]}
    summary = {"base": BASE, "sets": sets, "runs": {}, "cells": cells, "judge": name}
    found = Material(folder, "eval", summary, notes=notes, finished=bool(results))
    found.records, found.parts = {"the evaluation": record}, [(folder, "")]
    if remark := results.get("remark"):
        found.notes.append(Note(str(remark)))
    run = Path(str(record.get("run") or ""))
    if record.get("run") and (run / FILE).exists():
        found.runs = [read_run(run)]
        found.notes += [Note(f"Of run {run.name}: {problem}") for problem in found.runs[0].problems]
    environment = mapping(record.get("environment"))
    made = mapping(environment.get("versions"))
    words = f"ptst {made.get('ptst')}, torch {made.get('torch')}, {environment.get('device')}"
    found.made_with = {words: len(cells)} if cells else {}
    return found


def _results(folder: Path, notes: list[Note]) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if isinstance(found, dict) and isinstance(found.get("results"), dict) and "test_template" in found:
            return found
        notes.append(Note("results.json is not as this version writes it; the judged answers are counted instead."))
    except UserError as error:
        notes.append(Note(f"results.json is damaged ({error}); the judged answers are counted instead."))
    return {}


def _cells(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for model, by_task in results.get("results", {}).items():
        tuned = results.get("train_template") or results.get("adapter") or model
        ptst = bool(results.get("ptst")) and model != BASE
        tasks = {}
        for task, figures in by_task.items():
            unjudged = int(figures.get("unjudged") or 0)
            tasks[task] = {name: f for name, value in figures.items() if (f := _figure(name, value, figures, unjudged))}
        yield _line(BASE if model == BASE else str(tuned), str(results["test_template"]), ptst, tasks)


def _line(train: str, test: str, ptst: bool, tasks: Mapping[str, Any]) -> dict[str, Any]:
    return {"train": train, "epochs": None, "test": test, "defense": NONE, "ptst": ptst, "tasks": tasks}


def _figure(name: str, value: Any, figures: Mapping[str, Any], unjudged: int) -> Figures | None:
    if name.endswith("_sd") or name == "unjudged":
        return None
    if isinstance(value, Mapping):
        each = value.get("decodings") or [value]
        runs = {str(i): {"successes": one["successes"], "n": one["n"]} for i, one in enumerate(each)}
        ends = value.get("wilson95") if value.get("rate") is not None else None
        numbers = [value["rate"], *(ends or ())]
        if not all(n is None or (isinstance(n, (int, float)) and 0 <= n <= 1) for n in numbers) or len(numbers) == 2:
            raise ValueError(f"{name} is no rate: {value}")
        told = {"population_sd": value.get("sd"), "sample_sd": value.get("sample_sd"), "interval95": ends}
        judged = sum(one["n"] for one in each)
        return {"mean": value["rate"], **told, "judged": judged, "unjudged": unjudged, "runs": runs}
    if isinstance(value, (int, float)):
        return {"mean": float(value), "population_sd": figures.get(f"{name}_sd"), "runs": {"0": value}}
    return None


def _so_far(folder: Path, record: Mapping[str, Any], notes: list[Note]) -> Iterator[dict[str, Any]]:
    """The models of an unfinished evaluation, from the rows that were judged."""
    by_model = dict[str, dict[str, Any]]()
    for place in places(folder):
        if not place.rows.exists() or base(place.task) not in TASKS:
            continue
        try:
            rows = list(read_rows(place))
            counted = rates(rows, TASKS[base(place.task)].outcomes)
        except (UserError, KeyError, TypeError, ValueError) as error:
            notes.append(Note(f"Left out, because it is damaged: {place.name} ({error})."))
            continue
        tasks = by_model.setdefault(place.model, {})
        tasks[place.task] = {name: _rate(rate, len(rows)) for name, rate in counted.items()}
    template = mapping(record.get("template"))
    for model, tasks in by_model.items():
        yield _line(model, str(template.get("name", "unknown")), False, tasks)


def _rate(rate: Rate, rows: int) -> Figures:
    found = rate.to_json()
    runs = {"0": {"successes": rate.successes, "n": rate.n}}
    ends = found["wilson95"] if rate.n else None
    told = {"population_sd": None, "sample_sd": None, "interval95": ends}
    return {"mean": found["rate"], **told, "judged": rate.n, "unjudged": rows - rate.n, "runs": runs}
