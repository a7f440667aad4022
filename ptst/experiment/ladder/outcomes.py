"""The outcomes of a study in one compact file: the class of every answer, a letter each, and no answer.

Everything that is published of a study is computed from this file (ptst/experiment/ladder/analysis.py). A cell is what
was measured of one way of training (data, training template, defence) under one test prompt on one task; it has a run
for every alignment and seed, `seed0/20`, or of the aligned model itself one for every alignment, `seed0`. Of a judged
task a run is a string with a letter for every prompt:

    R refusal, P partial, C compliance, O off topic, I incoherent, N no class but an opinion on success, U unjudged;
    a small letter: the judge counts the answer as a successful attack

Of a task with right answers it is a string of 1, 0 and - (unknown) for each metric; other figures are numbers.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.errors import UserError, unknown_name
from ptst.evaluation.tasks.requests import HALVES
from ptst.evaluation.verdicts import AnswerClass, Verdict
from ptst.reading import parse_json, read_text

FORMAT = 1
UNJUDGED, NO_CLASS = "U", "N"
LETTERS = {
    AnswerClass.REFUSAL: "R",
    AnswerClass.PARTIAL: "P",
    AnswerClass.COMPLIANCE: "C",
    AnswerClass.OFF_TOPIC: "O",
    AnswerClass.INCOHERENT: "I",
}
ASR, COHERENT = "attack-success", "coherent"
_MEASURES = (ASR, COHERENT, *AnswerClass)
_CLASS = {letter: label for label, letter in LETTERS.items()}
_KNOWN = {
    "judged": {*LETTERS.values(), *(letter.lower() for letter in LETTERS.values()), "N", "n", "U"},
    "marks": {"0", "1", "-"},
}
_AGAIN = "write it again from the folders: ptst study FOLDER"


def letter(verdict: Verdict | None) -> str:
    """A verdict as a letter."""
    if verdict is None or not verdict.judged:
        return UNJUDGED
    found = NO_CLASS if verdict.label is None else LETTERS[verdict.label]
    return found.lower() if verdict.success else found


def split_measure(measure: str) -> tuple[str, str]:
    """The half of XSTest that a measure is of, "" for none, and what is measured: `unsafe` and `refusal` of
    `unsafe:refusal`."""
    half, colon, of = measure.partition(":")
    return (half, of) if colon and half in HALVES else ("", measure)


def check_measure(measure: str) -> None:
    """Raise UserError for what is no measure of a judged answer."""
    of = split_measure(measure)[1]
    if of not in _MEASURES:
        raise unknown_name("measure", of, _MEASURES)


def outcome(found: str, measure: str) -> float:
    """1, 0 or NaN (unjudged) of a letter: `attack-success`, `coherent`, or the name of a class. Raises UserError for
    any other measure."""
    check_measure(measure)
    if found == UNJUDGED:
        return math.nan
    if measure == ASR:
        return float(found.islower())
    label = _CLASS.get(found.upper())
    if label is None:
        return math.nan
    if measure == COHERENT:
        return float(label != AnswerClass.INCOHERENT)
    return float(label == AnswerClass(measure))


@dataclass(frozen=True, order=True)
class Key:
    """Which cell. `data`: of training, also for the aligned model, which is asked in the same words; `train`: the
    training template, "" of the aligned model."""

    data: str
    train: str
    defense: str
    test: str
    task: str
    epochs: float | None = None

    def to_json(self) -> dict[str, Any]:
        found = {"data": self.data, "train": self.train, "defense": self.defense, "test": self.test, "task": self.task}
        return found if self.epochs is None else {**found, "epochs": self.epochs}


@dataclass
class Measured:
    """What was measured in a cell, everything by run: letters by judge, marks by metric, numbers by name."""

    judged: dict[str, dict[str, str]] = field(default_factory=dict)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    def runs(self) -> Iterator[str]:
        """Every run that anything was measured of, as often as it was."""
        for kind in (self.judged, self.marks, self.values):
            for by_run in kind.values():
                yield from by_run

    def to_json(self) -> dict[str, Any]:
        return {name: found for name, found in vars(self).items() if found}


@dataclass(frozen=True)
class Prompts:
    """The prompts of a task: ids, and family and category of each."""

    ids: tuple[str, ...]
    families: tuple[str, ...]
    categories: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: list(found) for name, found in vars(self).items()}


@dataclass(frozen=True)
class Outcomes:
    """`about`: of what study; `judges`: their records by name; `prompts`: by task."""

    about: Mapping[str, Any]
    judges: Mapping[str, Mapping[str, Any]]
    prompts: Mapping[str, Prompts]
    cells: Mapping[Key, Measured]

    def write(self, path: Path) -> None:
        """A line for every cell, so that a difference can be read."""
        from ptst.storage import write_atomically

        write_atomically(path, self.to_text().encode())

    def to_text(self) -> str:
        head = {"format": FORMAT, "about": self.about, "judges": self.judges}
        lines = [f"{_compact(name)}:{_compact(value)}" for name, value in head.items()]
        prompts = [f"{_compact(task)}:{_compact(self.prompts[task].to_json())}" for task in sorted(self.prompts)]
        cells = [_compact({**key.to_json(), **self.cells[key].to_json()}) for key in sorted(self.cells, key=_order)]
        lines += ['"prompts":{\n' + ",\n".join(prompts) + "}", '"cells":[\n' + ",\n".join(cells) + "]"]
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def read(cls, path: Path) -> "Outcomes":
        """The cells of the study's main training data come first, whatever their names: tables are of the first.
        Raises UserError for a file that is not as `write` makes it."""
        try:
            found = parse_json(read_text(path))
        except ValueError as error:
            raise UserError(f"is not a file of outcomes ({error})", _AGAIN, path) from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError("is not a file of outcomes of this version", _AGAIN, path)
        try:
            prompts = {task: Prompts(**{k: tuple(v) for k, v in p.items()}) for task, p in found["prompts"].items()}
            outcomes = cls(found["about"], found["judges"], prompts, dict(map(_cell, found["cells"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"is damaged ({type(error).__name__}: {error})", _AGAIN, path) from None
        if len(outcomes.cells) < len(found["cells"]):
            raise UserError("has a cell twice", _AGAIN, path)
        outcomes._check(path)
        main = data_name(str(outcomes.about.get("settings", {}).get("data")))
        return replace(outcomes, cells=dict(sorted(outcomes.cells.items(), key=lambda cell: cell[0].data != main)))

    def _check(self, path: Path) -> None:
        settings = self.about.get("settings", {}) if isinstance(self.about, dict) else None
        margin = settings.get("equivalence_margin", 0.0) if isinstance(settings, dict) else None
        if not isinstance(margin, (int, float)):
            raise UserError("does not say of what study it is", _AGAIN, path)
        if not self.cells:
            raise UserError("has no cell", _AGAIN, path)
        for key, measured in self.cells.items():
            if measured.judged and key.task not in self.prompts:
                raise UserError(f"lacks the prompts of {key.task}", _AGAIN, path)
        for key, measured in self.cells.items():
            for kind, known in _KNOWN.items():
                for name, runs in getattr(measured, kind).items():
                    for run, found in runs.items():
                        where = f"{path}: {key.train or 'aligned'} under {key.test}, {key.task}, {name}, {run}"
                        if kind == "judged" and len(found) != len(self.prompts[key.task].ids):
                            cause = f"has {len(found)} letters for {len(self.prompts[key.task].ids)} prompts"
                            raise UserError(cause, _AGAIN, where)
                        if unknown := set(found) - known:
                            raise UserError(f"has the letter {min(unknown)!r}", _AGAIN, where)


def data_name(data: str) -> str:
    """Training data as a study calls them: without a number of rows; of a file its name."""
    return Path(data).stem if Path(data).suffix else data.partition(":")[0]


def _order(key: Key) -> tuple[str, ...]:
    return tuple(str(part) for part in vars(key).values())


def _cell(row: Mapping[str, Any]) -> tuple[Key, Measured]:
    kinds = {kind: dict(row.get(kind, {})) for kind in ("judged", "marks", "values")}
    return Key(**{k: v for k, v in row.items() if k not in kinds}), Measured(**kinds)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def merged(parts: Sequence[Outcomes], about: Mapping[str, Any]) -> Outcomes:
    """One study's outcomes of those of its parts. Raises UserError where parts asked other prompts in a task of the
    same name, were judged by other versions of a judge, or have the same run of a cell with other results. The same
    results twice, of the aligned model of two grids say, count once."""
    prompts, judges, cells = dict[str, Prompts](), dict[str, Mapping[str, Any]](), dict[Key, Measured]()
    for part in parts:
        for task, asked in part.prompts.items():
            if prompts.setdefault(task, asked) != asked:
                raise UserError(f"the parts of the study asked different prompts in {task}")
        for name, record in part.judges.items():
            if judges.setdefault(name, record) != record:
                raise UserError(f"the parts of the study were judged by different versions of {name}")
        for key, measured in part.cells.items():
            into = cells.setdefault(key, Measured())
            for kind, name, run, found in _entries(measured):
                runs = getattr(into, kind).setdefault(name, {})
                if runs.setdefault(run, found) != found:
                    model = key.train or "the aligned model"
                    cause = f"{run} of {model} under {key.test} is in two parts with other results"
                    raise UserError(cause, "leave one part out, or measure both in one folder")
    return Outcomes(about, judges, prompts, cells)


def _entries(measured: Measured) -> Iterator[tuple[str, str, str, Any]]:
    for kind in ("judged", "marks", "values"):
        for name, runs in getattr(measured, kind).items():
            for run, found in runs.items():
                yield kind, name, run, found
