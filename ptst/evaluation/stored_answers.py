"""Answers that were kept, to be judged at any time without the model: those of an evaluation's or a grid's folder.

An answer file holds everything that a judge needs (ptst/evaluation/answers.py). Of folders that earlier versions made
the judged rows are read, which have prompt and answer, too. The rows' own verdicts come with the answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.answers import read_answers
from ptst.evaluation.graders.prompt import Question
from ptst.evaluation.verdicts import OLD_CLASSES, UNJUDGED, AnswerClass, Verdict
from ptst.generation.request import DECLINED, Answer
from ptst.reading import parse_json, read_text
from ptst.records import command_of, read_json, record_kind

BASE, TUNED = "untouched", "fine-tuned"  # names of the models of an evaluation, in results and files
VERDICTS = "verdicts"  # the folder of all judges' verdicts, in that of the answers
_MAKE = "give the folder of a ptst.eval or a ptst.grid, or a CSV or JSONL file of answers"


@dataclass(frozen=True)
class StoredAnswer:
    """A request and its answer. `file`: the name of the file of its verdicts; `id`: of its prompt. `identity`: names it
    in its file for good, "" where nothing does. `own`: the verdict that it was stored with, of judge `own_judge`."""

    request: str
    answer: Answer
    file: str
    id: str
    model: str = ""
    task: str = ""
    identity: str = ""
    category: str = ""
    own: Verdict | None = None
    own_judge: str = ""

    @cached_property
    def digest(self) -> str:
        """Of all that a judge sees."""
        more = [self.request.reference] if isinstance(self.request, Question) else []
        more += [self.answer.finish_reason] if self.answer.finish_reason in DECLINED else []
        seen = json.dumps([self.request, self.answer.text, self.answer.truncated, *more])
        return hashlib.sha256(seen.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class AnswerSet:
    """Answers, and where their verdicts go. `judges`: the records of judges whose verdicts came with the answers, by
    name; `notes`: what the user must know."""

    source: Path
    verdicts: Path
    answers: Sequence[StoredAnswer]
    judges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """Where one task's answers of one model are; `sealed`: the sha256 of the rows, `judge`: the record of theirs,
    `figures`: the file of a grid's cell."""

    name: str
    model: str
    task: str
    answers: Path
    rows: Path
    sealed: str | None = None
    judge: Mapping[str, Any] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def places(folder: Path, left_out: Callable[[UserError], None] | None = None) -> Iterator[Place]:
    """Of the folder of an evaluation or a grid. Raises UserError for any other folder, and for damaged figures of a
    cell unless `left_out` takes the error."""
    kind = record_kind(folder)
    if kind not in ("eval", "grid"):
        what = "holds no evaluation and no grid"
        if kind:
            what = f"is the folder of a {command_of(kind)}, which keeps no answers"
        raise UserError(what, _MAKE, folder)
    return _evaluation(folder) if kind == "eval" else _grid(folder, left_out)


def read_folder(folder: Path) -> AnswerSet:
    """The judged tasks' answers in the folder of an evaluation or a grid, finished or not. Raises UserError for any
    other folder, one without such answers, and answers that are not as they were written."""
    answers, notes, judges = list[StoredAnswer](), list[str](), dict[str, Mapping[str, Any]]()
    for place in places(folder):
        found, judge = read_place(place)
        answers += found
        if not found:
            notes.append(f"{place.name} is left out: it has no answers to requests")
        elif judge is not None and judges.setdefault(judge["name"], judge) != judge:
            notes.append(f"{place.name} was judged by another version of {judge['name']} than others")
    if not answers:
        remedy = "judges are for the tasks safety, over-refusal, xstest and prompts; or finish it first"
        raise UserError("holds no answers to requests that a judge could judge", remedy, folder)
    return AnswerSet(folder, folder / VERDICTS, answers, judges, notes)


def _evaluation(folder: Path) -> Iterator[Place]:
    results = _figures(folder / "results.json")
    kept = {p.relative_to(folder / "answers") for p in (folder / "answers").rglob("*.jsonl")}
    for name in sorted(kept | {p.relative_to(folder) for p in folder.glob("*.jsonl")}):
        model, _, task = str(name.with_suffix("")).partition(".")
        yield Place(str(name), model, task, folder / "answers" / name, folder / name, judge=results.get("judge"))


def _figures(path: Path) -> dict[str, Any]:
    """What a file of figures has; nothing where there is none yet."""
    figures = read_json(path) if path.exists() else {}
    if not isinstance(figures, dict):
        raise UserError("holds no figures", "the file is damaged: measure again", path)
    return figures


def _grid(folder: Path, left_out: Callable[[UserError], None] | None) -> Iterator[Place]:
    cells = folder / "cells"
    endings = (".answers.jsonl", ".rows.jsonl")
    found = {str(p.relative_to(cells)).removesuffix(e) for e in endings for p in cells.glob(f"*/*{e}")}
    for name in sorted(found):
        model, _, rest = name.partition("/")
        answers, rows = (cells / f"{name}{ending}" for ending in endings)
        try:
            figures = _figures(cells / f"{name}.json")
        except UserError as error:
            if left_out is None:
                raise
            left_out(error)
            continue
        test, task = figures.get("test"), figures.get("task") or rest
        label = f"{model} under {test}" if test else model
        sealed, judge = figures.get("rows"), figures.get("judge")
        yield Place(f"{name}.jsonl", label, task, answers, rows, sealed, judge, figures)


def read_place(place: Place) -> tuple[list[StoredAnswer], Mapping[str, Any] | None]:
    """A task's answers with their own verdicts, and the record of their judge. Raises UserError as `read_folder`."""
    rows = list(read_rows(place)) if place.rows.exists() else []
    if rows and "class" not in rows[0]:
        return [], None
    kept = _kept(place)
    if kept is None:  # of an earlier version
        kept = _of_rows(rows, place)
    if not rows:
        return kept, None
    if [row["answer"] for row in rows] != [a.answer.text for a in kept]:
        cause = f"does not hold the answers of {place.answers}"
        raise UserError(cause, "put back the file that was changed", place.rows)
    judge = place.judge or {"name": str(rows[0].get("judge", "unknown"))}
    own = ({"own": read_verdict(row, place.rows), "own_judge": judge["name"]} for row in rows)
    return [replace(answer, **verdict) for answer, verdict in zip(kept, own, strict=True)], judge


def _kept(place: Place) -> list[StoredAnswer] | None:
    """The answers of an answer file; None where an earlier version wrote it, without the requests."""
    if not place.answers.exists():
        return None
    with open(place.answers, "rb") as file:
        if b'"request": ' not in file.readline():
            return None
    lines = sorted((row for _, row in read_answers(place.answers)), key=lambda row: (row["seed"], row["index"]))
    if not all("request" in row for row in lines):
        return None
    seeds = list(dict.fromkeys(row["seed"] for row in lines))
    return [
        StoredAnswer(
            row["request"],
            Answer(row["token_ids"], row["text"], row["finish_reason"]),
            place.name,
            row["id"],
            place.model,
            f"{place.task}, seed {row['seed']}" if len(seeds) > 1 else place.task,
            f"{seeds.index(row['seed'])}:{row['index']}",
            row["category"],
        )
        for row in lines
        if row["request"]
    ]


def read_rows(place: Place) -> Iterator[dict[str, Any]]:
    """The judged rows of a task. Raises UserError for a file that is damaged, or not as the cell was measured."""
    try:
        text = read_text(place.rows)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError("not UTF-8 text", where=place.rows) from None
    if place.sealed not in (None, hashlib.sha256(text.encode()).hexdigest()):
        raise UserError("was changed since the cell was measured", "put the file back", place.rows)
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or ("class" in row and not {"prompt", "answer"} <= row.keys()):
            raise UserError("is not a judged answer", "put the file back", f"{place.rows}:{number}")
        yield row


def _of_rows(rows: Sequence[Mapping[str, Any]], place: Place) -> list[StoredAnswer]:
    found, counts = list[StoredAnswer](), dict[Any, int]()
    for row in rows:
        seed = row.get("seed")
        number = counts[seed] = counts.get(seed, -1) + 1
        answer = Answer([], row["answer"], "length" if row.get("cut") else "stop")
        request, name = row.get("request") or row["prompt"], str(row.get("id", number))
        task = place.task if seed is None else f"{place.task}, seed {seed}"
        identity, category = f"{list(counts).index(seed)}:{number}", str(row.get("category", ""))
        found.append(StoredAnswer(request, answer, place.name, name, place.model, task, identity, category))
    return found


def read_verdict(row: Mapping[str, Any], where: object) -> Verdict:
    """A verdict as rows and files of verdicts have it. Raises UserError for one of an unknown class."""
    name = OLD_CLASSES.get(str(row.get("class")), str(row.get("class")))
    if name not in (UNJUDGED, *AnswerClass):
        raise UserError(f"has the class {name!r}", f"there are {', '.join(AnswerClass)}, {UNJUDGED}", where)
    label = None if name == UNJUDGED else AnswerClass(name)
    return Verdict(label, str(row.get("reason", "")), row.get("success"), row.get("score"))
