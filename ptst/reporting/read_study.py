"""The material of a study's folder: its outcomes where it is finished, else those of its parts so far."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.tasks.table import base
from ptst.evaluation.verdicts import AnswerClass
from ptst.experiment.ladder import report
from ptst.experiment.ladder.analyse import STUDY, study_parts
from ptst.experiment.ladder.analysis import ALIGNED, Study
from ptst.experiment.ladder.gather import Part, gather
from ptst.experiment.ladder.names import is_rung, parts, rung_name
from ptst.experiment.ladder.outcomes import ASR, Key, Outcomes
from ptst.experiment.plan import BASE
from ptst.experiment.summary import rate_figures
from ptst.records import FILE, read_json, record_kind
from ptst.reporting.material import Material, Note, mapping
from ptst.reporting.read_grid import read_grid
from ptst.text.templates import find_template

MEASURES = (ASR, *(c.value for c in AnswerClass))


def part_folders(folder: Path) -> list[Path]:
    """The grids of a study that is not finished."""
    return [path.parent for path in sorted(folder.glob(f"*/{FILE}")) if record_kind(path.parent) == "grid"]


def read_study(folder: Path) -> Material:
    """Raises UserError where there is neither a file of outcomes nor a part; all else is among the notes."""
    notes = list[Note]()
    parts = part_folders(folder)
    try:
        study = Study.of(_outcomes(folder, parts, notes))
        cells = [*_cells(study)]
    except UserError as error:
        if not parts:
            raise
        # What is damaged is in one part; each is a grid, which leaves out what cannot be read.
        found = read_grid(parts[0])
        words = f"The outcomes of the study cannot be gathered ({error})."
        found.notes.insert(0, Note(f"{words} The figures are those of {parts[0].name} alone."))
        for part in parts[1:]:
            _add_part(found, part)
        return replace(found, folder=folder, kind="study", finished=False)
    summary: dict[str, Any] = {"base": ALIGNED, "runs": {}, "cells": cells, "judge": study.judge}
    summary["sets"] = {task: task.partition(":")[2] or task for c in cells for task in c["tasks"]}
    summary["ladder"] = _ladder(study)
    found = Material(folder, "study", summary, notes=notes, study=study)
    found.finished = (folder / report.OUTCOMES).exists()
    for part in parts:
        _add_part(found, part)
    return found


def _add_part(found: Material, part: Path) -> None:
    """Runs, records, times and notes of a part."""
    try:
        of_part = read_grid(part)
    except UserError as error:
        found.notes.append(Note(f"The part {part.name} cannot be read: {error}"))
        return
    found.finished = found.finished and of_part.finished
    found.runs += of_part.runs
    found.records[part.name] = of_part.records["the grid"]
    for words, n in of_part.made_with.items():
        found.made_with[words] = found.made_with.get(words, 0) + n
    found.testing_joules += of_part.testing_joules
    found.seconds["testing"] = found.seconds.get("testing", 0.0) + of_part.seconds.get("testing", 0.0)
    found.parts.append((part, f"{part.name}: "))
    found.notes += [Note(f"{part.name}: {note.text}", note.level) for note in of_part.notes]


def _outcomes(folder: Path, parts: list[Path], notes: list[Note]) -> Outcomes:
    path = folder / report.OUTCOMES
    if path.exists():
        return Outcomes.read(path)
    notes.append(Note("The study is not finished: its outcomes are not gathered yet. Shown is what its parts have."))
    chosen = study_parts(folder) if (folder / STUDY).exists() else [_part(part) for part in parts]
    settings = mapping(mapping(read_json(parts[0] / FILE)).get("settings"))
    margin = settings.get("equivalence_margin")
    own = {} if margin is None else {"equivalence_margin": margin}
    return gather(chosen, {"judge": mapping(settings.get("eval")).get("judge"), "settings": own})


def _part(folder: Path) -> Part:
    """A part by the name of its folder: word-problems.seed0."""
    data, _, alignment = folder.name.rpartition(".")
    return Part(folder, alignment, data or folder.name)


def _cells(study: Study) -> Iterator[dict[str, Any]]:
    """Every model under every test prompt, as a grid's summary has them; of further training data, with their name."""
    by_line = dict[tuple[str, str, str, float | None], list[Key]]()
    for key in study.keys:
        train = key.train if key.data == study.data[0] or not key.train else f"{key.data}: {key.train}"
        if key.data == study.data[0] or key.train:
            by_line.setdefault((train, key.defense, key.test, key.epochs), []).append(key)
    for (train, defense, test, epochs), keys in by_line.items():
        tasks = {key.task: found for key in keys if (found := _figures(study, key))}
        ptst = bool(train) and _asks_safety(test) and not _asks_safety(train.rpartition(": ")[2])
        line = {"train": train or BASE, "epochs": epochs, "test": test, "defense": defense}
        yield {**line, "ptst": ptst, "tasks": tasks}


def _figures(study: Study, key: Key) -> dict[str, Any]:
    found: dict[str, Any] = {}
    measured = study.measured(key)
    if measured.judged.get(study.judge):
        for measure in MEASURES if base(key.task) == "safety" else MEASURES[1:]:
            try:
                found[measure] = rate_figures(study.shown(key, measure), study.table(key, measure))
            except UserError:
                found[measure] = {"mean": None, "population_sd": None, "sample_sd": None, "runs": {}}
    for name in [*measured.marks, *measured.values]:
        if (mean := study.mean(key, name)) is not None and name not in found:
            found[name] = {"mean": mean, "population_sd": None, "runs": dict.fromkeys(measured.runs(), mean)}
    return found


def _ladder(study: Study) -> dict[str, dict[str, str]]:
    """The rungs, nearest first where distances are known, as results.json of a grid has them."""
    from ptst.experiment.ladder.blocks import ordered_rungs

    found = {}
    for train in study.trains:
        for test, far in ordered_rungs(study, train):
            distance = "" if far is None else f" (distance {far:.2f})"
            found[test] = {"training": train, "rung": f"{rung_name(test)}{distance}", "sentence": ""}
    return found


def _asks_safety(name: str) -> bool:
    """Whether a template, or the rung that stands for one, asks the model to be safe."""
    if is_rung(name):
        short, rung = parts(name)
        if rung == "system-100":
            return True  # the safety prompt where training had none
        return rung == "identical" and _asks_safety(f"chat:{short}")
    try:
        return find_template(name).safety
    except UserError:
        return False
