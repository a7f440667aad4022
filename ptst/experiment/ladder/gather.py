"""Outcomes from the folders of grids: the verdicts of all judges so far, marks and figures; no answer is copied."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.evaluation.judging import all_verdicts
from ptst.evaluation.stored_answers import Place, places, read_folder, read_rows
from ptst.evaluation.tasks.table import TASKS, base
from ptst.evaluation.verdicts import UNJUDGED
from ptst.experiment.ladder.outcomes import Key, Measured, Outcomes, Prompts, letter
from ptst.experiment.ladder.outcomes import merged as merge
from ptst.progress import say
from ptst.records import FILE, bare, read_json, record_kind


@dataclass(frozen=True)
class Part:
    """A grid's folder, and how the study calls its alignment and training data. `seeds`: of the runs that count (None:
    all of the folder); a study that got further alignments has dealt its seeds anew."""

    folder: Path
    alignment: str
    data: str
    seeds: tuple[int, ...] | None = None

    def has(self, figures: Mapping[str, Any]) -> bool:
        """Whether a cell's run counts; cells of the aligned model and of models tuned elsewhere always do."""
        return self.seeds is None or figures.get("template") is None or figures["seed"] in self.seeds


def gather(parts: Sequence[Part], about: Mapping[str, Any]) -> Outcomes:
    """The outcomes of all finished cells; how many others there are is said. Raises UserError for folders of anything
    else than grids, unequal prompts or judges, answers that are not as they were written, and a cell that has lost its
    figures."""
    return merge([_part(part) for part in parts], about)


def part_of(folder: Path) -> Part:
    """A grid's folder as a study of its own. Raises UserError for any other folder."""
    if record_kind(folder) != "grid":
        raise UserError("holds no grid", "give the folder of a ptst.grid", folder)
    settings = read_json(folder / FILE).get("settings") or {}
    return Part(folder, "base", bare(str(settings.get("data") or "unknown")))


def parts_of(folders: Sequence[Path]) -> list[Part]:
    """Grids' folders as one study. Grids of one model, by the fingerprint of its weights, are one alignment; of several
    models, each has the name of its first folder. Raises UserError for any other folder, and for folders of different
    models that have one name."""
    parts = [part_of(folder) for folder in folders]
    weights = [str(read_json(part.folder / FILE).get("weights")) for part in parts]
    names = dict[str, str]()
    for part, own in zip(parts, weights, strict=True):
        if own not in names and part.folder.name in names.values():
            raise UserError(f"there are grids of different models in folders named {part.folder.name}", "rename one")
        names.setdefault(own, part.folder.name)
    several = len(names) > 1
    return [replace(p, alignment=names[own]) if several else p for p, own in zip(parts, weights, strict=True)]


def _part(part: Part) -> Outcomes:
    cells, prompts = dict[Key, Measured](), dict[str, Prompts]()
    found = list(places(part.folder))
    _check_figures(part.folder, found)
    judged, records = _letters(part.folder)
    for place in found:
        if not place.figures or not part.has(place.figures):
            continue  # not finished, or of a seed that another part has now
        if place.figures.get("decodings"):
            cause = f"{place.name} has {len(place.figures['decodings'])} decodings, and a study compares runs of one"
            raise UserError(cause, ("give a grid with ", Setting("eval.decode_seeds"), " 1"), part.folder)
        key, run = _key(part, place.figures), _run(part, place.figures)
        measured = cells.setdefault(key, Measured())
        rows = list(read_rows(place))
        if place.name in judged:
            if len({len(found) for found in judged[place.name].values()} | {len(rows)}) > 1:
                raise UserError("has other answers than rows", "put back the file that was changed", place.rows)
            asked = _prompts(rows)
            if prompts.setdefault(key.task, asked) != asked:
                raise UserError("has other prompts than the other cells of its task", where=place.rows)
            for name, letters in judged[place.name].items():
                measured.judged.setdefault(name, {})[run] = letters
            continue
        for name, marks in _marks(place, rows):
            measured.marks.setdefault(name, {})[run] = marks
        for name, value in (place.figures.get("result") or {}).items():
            if isinstance(value, (int, float)):
                measured.values.setdefault(name, {})[run] = value
    return Outcomes({}, records, prompts, cells)


def _check_figures(folder: Path, found: Sequence[Place]) -> None:
    """Say how many cells are not finished. Raises UserError for one with judged answers and without figures: it is
    unknown by which judge, and what else it was made of."""
    without = [place for place in found if not place.figures]
    if lost := next((place for place in without if place.rows.exists()), None):
        path = folder / "cells" / f"{lost.name.removesuffix('.jsonl')}.json"
        raise UserError(
            "is missing, and the cell has judged answers",
            "start the grid again: it is written, and none generated",
            path,
        )
    if without:
        say(f"note: {len(without)} cells of {folder} are not finished, and are left out")


def _letters(folder: Path) -> tuple[dict[str, dict[str, str]], Mapping[str, Any]]:
    """Each judge's letters of every judged cell, by the name of its file; a judge that judged none of a cell's answers
    is left out there."""
    found = read_folder(folder)
    verdicts = all_verdicts(found, found.verdicts)
    letters: dict[str, dict[str, list[str]]] = {}
    for judge, given in verdicts.verdicts.items():
        for answer, verdict in zip(found.answers, given, strict=True):
            letters.setdefault(answer.file, {}).setdefault(judge, []).append("" if verdict is None else letter(verdict))
    whole = {
        file: {judge: "".join(each or "U" for each in given) for judge, given in by_judge.items() if any(given)}
        for file, by_judge in letters.items()
    }
    return whole, verdicts.records


def _key(part: Part, figures: Mapping[str, Any]) -> Key:
    train = figures.get("template") or ""
    if figures.get("tuned"):
        train = f"tuned:{figures['tuned']}"
    defense = figures.get("defense") or "none"
    return Key(part.data, train, defense, figures["test"], figures["task"], figures.get("epochs"))


def _run(part: Part, figures: Mapping[str, Any]) -> str:
    trained = figures.get("template") is not None
    return f"{part.alignment}/{figures['seed']}" if trained else part.alignment


def _prompts(rows: Sequence[Mapping[str, Any]]) -> Prompts:
    columns = ([str(row.get(name) or "") for row in rows] for name in ("id", "family", "category"))
    return Prompts(*map(tuple, columns))


def _marks(place: Place, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The outcomes of a task's rows by metric, where it has any."""
    task = TASKS.get(base(place.task))
    if task is None or not rows or rows[0].get("class") == UNJUDGED:
        return
    by_row = [task.outcomes(row) for row in rows]
    for name in by_row[0]:
        values = [outcomes.get(name, math.nan) for outcomes in by_row]
        yield name, "".join("-" if math.isnan(value) else "01"[int(value)] for value in values)
