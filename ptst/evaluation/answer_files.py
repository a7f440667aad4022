"""Anybody's answers in a CSV, TSV, JSONL, JSON or Parquet file: a request, its answer, perhaps what people say of it.

Columns have the names that evaluations give them; the user can name others. Which were read is told, the rest is not
looked at: it cannot be a part of what is judged.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.data.columns import KNOWN, Cells, ColumnRules
from ptst.data.files import kind_of
from ptst.data.layouts import asked_text
from ptst.data.readers import KINDS, read_rows
from ptst.errors import Setting, UserError
from ptst.evaluation.graders.prompt import Question
from ptst.evaluation.stored_answers import VERDICTS, AnswerSet, StoredAnswer
from ptst.generation.request import Answer
from ptst.progress import say

# The bare request comes before a prompt that holds it, with an adversarial suffix, say.
REQUESTS = ("request", "objective", "goal", "behavior", "prompt", "question", "instruction", "input")
ANSWERS = ("answer", "response", "completion", "assistant_response", "generation", "output")
LABELS = ("label", "human_label", "human_score", "final_label", "tone")
REFERENCE = "reference"  # for judges that compare with one
_MORE = ("id", "model", "task", "seed")
NAMES = tuple(dict.fromkeys((*REQUESTS, *ANSWERS, *LABELS, REFERENCE, *_MORE, *KNOWN)))


@dataclass(frozen=True)
class LabelledSet:
    """Answers, and people's label of each, as it is written."""

    answers: AnswerSet
    labels: Sequence[str]


@dataclass(frozen=True)
class _Columns:
    request: str
    answer: str
    label: str | None


def read_answer_file(path: Path, rules: ColumnRules) -> AnswerSet:
    """The answers of a file. Raises UserError, with file and line, for one that cannot be read or lacks a column, and
    for two different answers of the same id (and model, task and seed, where it has those)."""
    return _read(path, rules, labelled=False).answers


def read_labelled(path: Path, rules: ColumnRules) -> LabelledSet:
    """The same with a label for each answer. Raises UserError also where one is missing."""
    return _read(path, rules, labelled=True)


def _read(path: Path, rules: ColumnRules, labelled: bool) -> LabelledSet:
    if kind_of(path) not in KINDS:
        raise UserError("is no file of answers", f"give a folder, or a {', '.join(KINDS)} file, also with .gz", path)
    answers, labels, columns = list[StoredAnswer](), list[str](), None
    named: dict[tuple[str, ...], tuple[str, str]] = {}
    unread = Counter[str]()
    for place, row in read_rows(path):
        cells = Cells(row, place, rules, unread)
        columns = columns or _columns(cells, rules, labelled)
        answers.append(answer := _answer(cells, columns, path.name))
        if columns.label is not None:
            labels.append(_label(cells, columns.label))
        if answer.identity:
            key = (answer.model, answer.task, answer.identity)
            text, first = named.setdefault(key, (answer.digest, place))
            if text != answer.digest:
                cause = f"the id {answer.id} has another request or answer here than in {first}"
                raise UserError(cause, "give each answer an id of its own", place)
    assert columns is not None, "there is at least one row"
    used = {"request": columns.request, "answer": columns.answer, "label": columns.label}
    say(f"{path}: {len(answers)} answers; " + ", ".join(f"{what}: {name}" for what, name in used.items() if name))
    return LabelledSet(AnswerSet(path, path.with_name(f"{path.name}.{VERDICTS}"), answers), labels)


def _columns(cells: Cells, rules: ColumnRules, labelled: bool) -> _Columns:
    request = next((name for name in REQUESTS if name in cells.present), None)
    if request is None:
        raise _lacking("request", REQUESTS, cells)
    answer = _only("answer", ANSWERS, cells, rules)
    return _Columns(request, answer, _only("label", LABELS, cells, rules) if labelled else None)


def _only(what: str, names: Sequence[str], cells: Cells, rules: ColumnRules) -> str:
    """The one column of these names. Raises UserError for none, and for several, unless the user named one."""
    found = [name for name in names if name in cells.present]
    if what in rules.names.values():
        return what
    if not found:
        raise _lacking(what, names, cells)
    if len(found) > 1:
        cause = f"the columns {' and '.join(found)} may both be the {what}"
        raise UserError(cause, ("say which with ", Setting("columns"), f", as in {what}={found[0]}"), cells.place)
    return found[0]


def _lacking(what: str, names: Iterable[str], cells: Cells) -> UserError:
    cause = f"there is no column for the {what} ({', '.join(names)}); the columns are {cells.listed()}"
    return UserError(cause, ("name it with ", Setting("columns"), f", as in {what}=NAME"), cells.place)


def _answer(cells: Cells, columns: _Columns, name: str) -> StoredAnswer:
    request = asked_text(cells, columns.request)
    if not request.strip():
        raise UserError(f"{columns.request} is empty", "give it a request or delete the row", cells.place)
    if reference := _plain(cells.get(REFERENCE)):
        request = Question(request, reference)
    cut = _plain(cells.get("finish_reason")) == "length" or _plain(cells.get("cut")).lower() in ("true", "1")
    answer = Answer([], cells.text(columns.answer), "length" if cut else "stop")
    more: Mapping[str, str] = {key: _plain(cells.get(key)) for key in _MORE}
    task = ", ".join(filter(None, (more["task"], more["seed"] and f"seed {more['seed']}")))
    identity = "/".join(more.values()) if more["id"] else ""
    shown = more["id"] or cells.place.rpartition("/")[2]
    return StoredAnswer(request, answer, f"{name}.jsonl", shown, more["model"], task, identity)


def _label(cells: Cells, column: str) -> str:
    label = _plain(cells.get(column)).strip()
    if not label:
        raise UserError(f"{column} is empty", "label the answer, or delete the row", cells.place)
    return label


def _plain(value: Any) -> str:
    """A cell of a number, text or truth value as text."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
