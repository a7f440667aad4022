"""The material of a grid's folder."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.gather import gather, part_of
from ptst.experiment.plan import BASE, GridCell
from ptst.experiment.provenance import versions
from ptst.experiment.stored_grid import StoredGrid
from ptst.experiment.summary import summarize
from ptst.reporting.heat import model_name
from ptst.reporting.material import Material, Note
from ptst.reporting.runs import StoredRun, read_runs

_SAME = ("base", "tokenizer", "dtype")  # of what every cell of a grid is made
_OWN = ("out", "seed", "template", "template_file", "mix", "phases", "proximal", "average", "token_constraint", "betas",
        "reference", "threads", "config", "json", "debug")  # fmt: skip  # what runs of one grid differ in
_LISTED = 5  # names in a sentence


def read_grid(folder: Path) -> Material:
    """Raises UserError for a folder without the record of a grid; all else that is wrong is among the notes."""
    grid = StoredGrid(folder)
    summary = _summary(grid)
    found = Material(folder, "grid", {**summary, "judge": _judge(grid)}, finished=not grid.missing)
    found.runs = read_runs(folder)
    found.records = {"the grid": grid.record}
    found.made_with = dict(Counter(versions(grid.cell_figures(c)) for c in grid.cells))
    times = [grid.cell_figures(c)["time"] for c in grid.cells]
    found.seconds = {"testing": sum(each["seconds"] for each in times)}
    found.testing_joules = [each.get("joules") for each in times]
    found.parts = [(folder, "")]
    found.absent = _absent(grid, summary)
    found.notes += [Note(text) for text in grid.notes]
    found.notes += [Note(f"Left out, because it is damaged: {d.what} ({d.why}).") for d in grid.damaged]
    found.notes += [*_unfinished(grid, found.runs), *_unlike(grid), *_unlike_runs(found.runs)]
    found.notes += _against_results(grid, summary)
    if grid.rungs and grid.cells:
        found.study = _ladder(folder, found)
    return found


def _summary(grid: StoredGrid) -> dict[str, Any]:
    """Of the cells; of a folder without them what results.json says, which is then all there is."""
    told = grid.results
    recorded = {"sets", "base", "runs"} <= told.keys() and isinstance(told.get("cells"), list)
    try:
        if grid.cells or not recorded:
            return summarize(grid)
        grid.notes.append("The folder has no cells: the figures are those of results.json and cannot be checked.")
    except UserError as error:
        grid.notes.append(f"The cells cannot be summarized: {error}")
        if not recorded:
            return {"base": BASE, "sets": {}, "runs": {}, "cells": []}
    for cell in told["cells"]:
        cell.setdefault("defense", NONE)
    return dict(told)


def _judge(grid: StoredGrid) -> str:
    names = Counter(str(f["judge"].get("name")) for f in map(grid.cell_figures, grid.cells) if _is_dict(f.get("judge")))
    names |= Counter() if names else Counter([str((grid.settings.get("eval") or {}).get("judge", "rules-v3"))])
    return ", ".join(names)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _place(summary: Mapping[str, Any], cell: GridCell) -> tuple[str, str, str]:
    own = {"train": cell.model.trained, "defense": cell.model.defense, "epochs": cell.model.epochs}
    return model_name(summary, own), cell.test, cell.task


def _absent(grid: StoredGrid, summary: Mapping[str, Any]) -> dict[tuple[str, str, str], str]:
    """Why cells of the matrix lack seeds, or all of them."""
    there, lacking = Counter(_place(summary, c) for c in grid.cells), dict[tuple[str, str, str], list[str]]()
    for cell in grid.missing:
        lacking.setdefault(_place(summary, cell), []).append("not finished")
    measured = set(grid.cells)
    for cell in grid.planned:
        if cell not in measured and grid.is_measured(cell):
            lacking.setdefault(_place(summary, cell), []).append("damaged")
    found = {}
    for place, why in lacking.items():
        words = "damaged" if "damaged" in why else "not finished"
        found[place] = f"{len(why)} of {len(why) + there[place]} seeds {words}" if there[place] else words
    return found


def _unfinished(grid: StoredGrid, runs: list[StoredRun]) -> Iterator[Note]:
    if grid.missing:
        begun = sum(grid.cell_file(c, "answers.jsonl").exists() for c in grid.missing)
        some = f" ({begun} of them have some answers)" if begun else ""
        names = _some([c.name for c in grid.missing])
        words = f"Not finished: {len(grid.missing)} of {len(grid.planned)} cells are missing{some}: {names}."
        yield Note(f"{words} Everything here is of the cells that there are; the command that began goes on.")
    trained = {run.name for run in runs if run.finished}
    if left := [m.run for m in grid.runs if m.run not in trained]:
        yield Note(f"{len(left)} of {len(grid.runs)} runs are not trained to their end: {_some(left)}.")
    for run in runs:
        yield from (Note(f"Of run {run.name}: {problem}") for problem in run.problems)


def _unlike(grid: StoredGrid) -> Iterator[Note]:
    """Cells that were made of, judged or measured with different things."""
    made = {c: f["made_of"] for c in grid.cells if _is_dict((f := grid.cell_figures(c)).get("made_of"))}
    if old := len(grid.cells) - len(made):
        yield Note(f"{old} cells are of an earlier version, which did not record what they were made of.")
    for name in _SAME:
        if len(values := Counter(str(m.get(name)) for m in made.values())) > 1:
            yield Note(f"The cells have different values of {name}: {_counts(values)}.")
    plain = Counter(str(m.get("chat_format")) for c, m in made.items() if c.test not in grid.rungs)  # rungs have others
    if len(plain) > 1:
        yield Note(f"The cells have different values of chat_format: {_counts(plain)}.")
    for name, of in (("template", "test"), ("data", "task")):
        by = dict[str, Counter[str]]()
        for cell, m in made.items():
            by.setdefault(cell.asked if of == "test" else cell.task, Counter())[str(m.get(name))] += 1
        what = "words of the template" if name == "template" else "prompts of the task"
        yield from (Note(f"The {what} {key} differ between cells.") for key, found in by.items() if len(found) > 1)
    judges = Counter(_version(f["judge"]) for c in grid.cells if _is_dict((f := grid.cell_figures(c)).get("judge")))
    if len(judges) > 1:
        yield Note(f"The cells were judged by different judges: {_counts(judges)}.")
    if len(with_what := Counter(versions(grid.cell_figures(c)) for c in grid.cells)) > 1:
        yield Note(f"The cells were made with different versions or devices: {_counts(with_what)}.", "info")


def _version(judge: Mapping[str, Any]) -> str:
    return f"{judge.get('name')}" + (f" version {judge['version']}" if "version" in judge else "")


def _unlike_runs(runs: list[StoredRun]) -> Iterator[Note]:
    """Settings in which runs of one way of training differ."""
    by_way = dict[str, list[StoredRun]]()
    for run in runs:
        by_way.setdefault(run.way, []).append(run)
    for way, alike in by_way.items():
        settings = [s if isinstance(s := run.get("settings"), Mapping) else {} for run in alike]
        for name in dict.fromkeys(key for s in settings for key in s):
            values = Counter(str(s[name]) for s in settings if name in s)
            if name not in _OWN and len(values) > 1:
                yield Note(f"Runs of {way} were trained with different values of {name}: {_counts(values)}.")


def _against_results(grid: StoredGrid, summary: Mapping[str, Any]) -> Iterator[Note]:
    """Whether results.json says what the cells say."""
    told = grid.results
    if not told or told.get("cells") is summary.get("cells") or not grid.cells:
        return
    if (found := told.get("version", 1)) != grid.record.get("version", 1):
        yield Note(f"results.json is of another format ({found}) than run.json.")
    theirs, ours = _means(told), _means(summary)
    both = theirs.keys() & ours.keys()
    differing = [" ".join(map(str, key)) for key in both if abs(theirs[key] - ours[key]) > 1e-9]
    if differing:
        words = f"results.json has other values than the cells in {len(differing)} of {len(both)} figures"
        yield Note(f"{words} ({_some(sorted(differing))}). The figures here are computed from the cells.")
    elif both:
        words = f"All {len(both)} figures of results.json were computed again from the judged answers and agree."
        yield Note(words, "info")
    else:
        yield Note("results.json has no figures as this version writes them. Those here are computed from the cells.")


def _means(summary: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    found = {}
    cells = summary.get("cells")
    for cell in cells if isinstance(cells, list) else ():
        try:
            key = (cell["train"], cell.get("epochs"), cell["test"], cell.get("defense", "none"))
            for task, metrics in cell["tasks"].items():
                for metric, f in metrics.items():
                    if isinstance(f, Mapping) and isinstance(f.get("mean"), (int, float)):
                        found[(*key, task, metric)] = float(f["mean"])
        except (KeyError, TypeError, AttributeError):
            continue
    return found


def _ladder(folder: Path, found: Material) -> Study | None:
    """The outcomes of a grid with rungs, for the curve over their distances."""
    try:
        part = part_of(folder)
        return Study.of(gather([part], {"judge": found.judge, "settings": {}}))
    except UserError as error:
        found.notes.append(Note(f"The curve of the ladder cannot be computed: {error}"))
        return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _counts(values: Counter[str]) -> str:
    return "; ".join(f"{value[:120]} ({n})" for value, n in values.most_common())
