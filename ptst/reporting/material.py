"""What a report is made of, from whichever folder: one summary of cells, the runs, the judges, what is not there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.judge_report import Judged
from ptst.evaluation.judging import all_verdicts
from ptst.evaluation.stored_answers import AnswerSet, StoredAnswer, places, read_place
from ptst.experiment.ladder.analysis import Study
from ptst.reporting.runs import StoredRun


@dataclass(frozen=True)
class Note:
    """What a reader must know of the results. `level`: "warning" where they may not be what they seem, "info" else."""

    text: str
    level: str = "warning"


@dataclass
class Material:
    """`summary`: as `ptst.experiment.summary` makes it; `absent`: why a cell has no figure, or not all of it, by names
    of model, test and task; `records`: of the folders that were read, by name; `made_with`: versions and device of the
    cells, with their number; `parts`: folders whose answers there are, each with the name in front of its models;
    `study`: the outcomes of a ladder."""

    folder: Path
    kind: str
    summary: dict[str, Any]
    absent: dict[tuple[str, str, str], str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    runs: list[StoredRun] = field(default_factory=list)
    records: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    made_with: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    testing_joules: list[Any] = field(default_factory=list)
    parts: list[tuple[Path, str]] = field(default_factory=list)
    study: Study | None = None
    finished: bool = True

    @property
    def judge(self) -> str:
        """Whose verdicts the figures count."""
        return str(self.summary.get("judge") or "an unknown judge")


@dataclass(frozen=True)
class Answers:
    """The judged answers of a folder by every judge; None, and `why`, where they cannot be compared."""

    judged: Judged | None
    notes: Sequence[Note] = ()


def read_answers(folder: Path) -> Answers:
    """All answers of an evaluation or a grid with all verdicts; damaged files are left out, each with a note."""
    answers, judges, notes = list[StoredAnswer](), dict[str, Mapping[str, Any]](), list[Note]()

    def left_out(error: UserError) -> None:
        notes.append(Note(f"Answers are left out: {error}"))

    try:
        for place in places(folder, left_out):
            try:
                found, judge = read_place(place)
            except UserError as error:
                notes.append(Note(f"The answers of {place.name} are left out: {error}"))
                continue
            answers += found
            if judge is not None and judges.setdefault(judge["name"], judge) != judge:
                words = f"{place.name} was judged by another version of {judge['name']} than other cells."
                notes.append(Note(words))
        if not answers:
            return Answers(None, notes)
        judged = all_verdicts(AnswerSet(folder, folder / "verdicts", answers, judges), folder / "verdicts")
    except (UserError, KeyError, TypeError) as error:
        notes.append(Note(f"The judges cannot be compared: {error}"))
        return Answers(None, notes)
    return Answers(judged, notes)


def mapping(value: object) -> Mapping[str, Any]:
    """A value of a record that should be an object; nothing where it is not."""
    return value if isinstance(value, Mapping) else {}
