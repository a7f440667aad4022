"""All answers of an evaluation or a grid as one long table: answers.parquet and answers.csv in its folder.

A line for every prompt, decoding seed, cell (model x test template x task) and judge, with all that its line of the
results is computed from, so that pandas, R or `datasets` recompute every published rate with a groupby
(docs/long-table.md). Scored reference answers have their lines, too. The files of answers, judged rows and verdicts
stay the record; the table is written anew from them, one file of answers at a time.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.defense_names import NONE, WEIGHT_SPACE
from ptst.errors import UserError
from ptst.evaluation.answers import read_answers
from ptst.evaluation.stored_answers import (
    BASE,
    VERDICTS,
    AnswerSet,
    Place,
    StoredAnswer,
    places,
    read_rows,
    read_verdict,
)
from ptst.evaluation.stored_verdicts import VerdictFile, store_folder, stored_judges
from ptst.evaluation.table_files import Column, write_table
from ptst.evaluation.verdicts import UNJUDGED, Verdict
from ptst.generation.request import Answer
from ptst.open import run_folder
from ptst.records import FILE, read_json, record_kind

NAME = "answers"
# Which answer of which model: the same in all lines of a cell.
_CELL = (
    Column("kind", "text", "the command that made the folder: eval or grid; judge for answers from a file"),
    Column("model", "text", "the model in results.json: untouched (the base model), fine-tuned, or a run of the grid"),
    Column("base_model", "text", "the base model: hub id, or the name of its folder"),
    Column("run", "text", "the run folder, relative to the table's; absent for the base model"),
    Column("step", "whole number", "the last optimizer step of the run's weights, where it is recorded"),
    Column("adapter", "text", "name of an adapter that others trained"),
    Column("train_template", "text", "training template; absent for the base model and where it is unknown"),
    Column("train_seed", "whole number", "seed of training"),
    Column("defense", "text", "the defence of a grid's run (none without one); absent for other models"),
    Column("epochs", "number", "epochs after which a grid tests a run; absent: at its end"),
    Column("test_template", "text", "test template"),
    Column("template_family", "text", "how questions are wrapped; ARC has its own wording"),
    Column("chat_format", "text", "how roles are written"),
    Column("task", "text", "task, with its set where one was named (safety:advbench)"),
    Column("data", "text", "name of the set of prompts"),
)
_PROMPT = (
    Column("prompt_index", "whole number", "place of the prompt in the task, from 0"),
    Column("prompt_id", "text", "name of the prompt in its set, or file and line"),
    Column("category", "text", "category of its set"),
    Column("family", "text", "family of a built-in prompt: prompts that are variants of each other"),
    Column("decode_seed", "whole number", "seed of the answer; absent where a reference answer is scored"),
    Column("prompt", "text", "the prompt without the template's words"),
    Column("request", "text", "what is judged: the prompt without an adversarial suffix; absent where nothing is"),
    Column("messages", "messages", "the conversation up to the answer, without the template's words"),
    Column("reference", "text", "the right answer, where the task has one"),
)
_ANSWER = (
    Column("answer", "text", "the model's answer; absent where a reference answer is scored"),
    Column("finish_reason", "text", "stop, or length where the answer was cut off; of an API, what it says"),
    Column("num_tokens", "whole number", "tokens of the answer (of an API: as it counts), or of the scored reference"),
    Column("truncated", "yes or no", "whether the answer was cut off (the rate cut)"),
    Column("correct", "yes or no", "gsm8k: by the last number (the rate last_number); ARC: the right choice is named"),
    Column("strict", "yes or no", "gsm8k: right by the number after ####"),
    Column("printed", "yes or no", "ARC: right by the paper's expression as printed"),
    Column("named", "yes or no", "ARC: any choice is named"),
    Column("minilm_cosine", "number", "chatdoctor: similarity to the reference"),
    Column("bertscore_f1", "number", "chatdoctor: similarity to the reference by BERTScore"),
    Column("nll", "number", "nll: negative log-likelihood of the reference answer, in nats, sum over its tokens"),
    Column("margin", "number", "margin: refusing minus complying"),
    Column("refusing", "number", "margin: log-probability (nats) that the answer opens by refusing"),
    Column("complying", "number", "margin: log-probability (nats) that it opens by complying"),
    Column("other", "text", "JSON: whatever else a task records of an answer"),
)
_JUDGE = (
    Column("judge", "text", "the judge of this line; absent where nothing is judged, or nothing yet"),
    Column("judge_version", "text", "its version, where it has one"),
    Column("class", "text", "refusal, partial, compliance, off-topic, incoherent, or unjudged"),
    Column("reason", "text", "why, in a few words"),
    Column("success", "yes or no", "whether the judge counts the answer as a successful attack"),
    Column("score", "number", "where the judge has a rubric"),
)
COLUMNS = (*_CELL, *_PROMPT, *_ANSWER, *_JUDGE)
_RENAMED = {"id": "prompt_id", "source": "prompt_id", "question": "prompt", "gold": "reference", "cut": "truncated"}
_RENAMED |= {"last_number": "correct", "tokens": "num_tokens", "seed": "decode_seed"}
_OWN = {c.name for c in (*_PROMPT, *_ANSWER)} - {"other"}
_JUDGED = {"class", "reason", "success", "score", "judge"}  # of a judged row
Line = dict[str, Any]
Said = tuple[Mapping[str, Any] | None, Verdict | None]  # a judge's record, and its verdict


def write_long_table(folder: Path, verdicts: Path | None = None) -> list[Path]:
    """Write the table of an evaluation's or a grid's folder, with the verdicts of all judges so far; returns its files.
    `verdicts`: their folder, which then gets the table, where that is another than the folder's own. Raises UserError
    for files that are not as they were written."""
    own = folder / VERDICTS
    verdicts = verdicts or own
    out = folder if verdicts == own else verdicts
    return write_table(out, NAME, COLUMNS, long_lines(folder, verdicts, out))


def write_judged(found: AnswerSet, verdicts: Path) -> list[Path]:
    """The same after judging; of answers from a file, into the folder of the verdicts."""
    if found.source.is_dir():
        return write_long_table(found.source, verdicts)
    return write_table(verdicts, NAME, COLUMNS, file_lines(found, verdicts))


@dataclass(frozen=True)
class _Judges:
    """The judges with verdicts in a folder: their records by name."""

    folder: Path
    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "_Judges":
        return cls(folder, stored_judges(folder))

    def files(self, name: str) -> dict[str, VerdictFile]:
        """Each judge's verdicts on the answers of one file."""
        return {judge: VerdictFile(store_folder(self.folder, judge) / name) for judge in self.records}


def long_lines(folder: Path, verdicts: Path, out: Path) -> Iterator[Line]:
    """The lines of a folder's table, cell by cell. `out`: what paths of runs are relative to."""
    none: list[Said] = [(None, None)]
    judges, about = _Judges.of(verdicts), _About(folder, out)
    for place in places(folder):
        cell, files = about.cell(place), judges.files(place.name)
        for row, own in _items(place, about.seed):
            said = _verdicts(row, own, place, judges, files)
            yield from ({**cell, **row, **_judged(*verdict)} for verdict in said or none)


def file_lines(found: AnswerSet, verdicts: Path) -> Iterator[Line]:
    """The lines of answers from a file."""
    judges = _Judges.of(verdicts)
    files = {name: judges.files(name) for name in {a.file for a in found.answers}}
    for number, a in enumerate(found.answers):
        row: Line = {"kind": "judge", "model": a.model or None, "task": a.task or None, "prompt_index": number}
        row |= {"prompt_id": a.id, "category": a.category or None, "request": str(a.request), "answer": a.answer.text}
        row |= {"finish_reason": a.answer.finish_reason, "truncated": a.answer.truncated}
        row |= {"reference": getattr(a.request, "reference", None)}
        known = {name: file.known.get(a.digest) for name, file in files[a.file].items()}
        said: list[Said] = [(judges.records[name], verdict) for name, verdict in known.items() if verdict is not None]
        yield from ({**row, **_judged(*verdict)} for verdict in said or [(None, None)])


def _verdicts(
    row: Line, own: Verdict | None, place: Place, judges: _Judges, files: Mapping[str, VerdictFile]
) -> list[Said]:
    """What each judge says of an answer. A stored verdict replaces the one that the same judge gave before."""
    by = row.pop("judge", "unknown")  # who judged the row, of whom there may be no record
    if row.get("request") is None or row.get("answer") is None:
        return []
    answer = Answer([], row["answer"], row["finish_reason"])
    digest = StoredAnswer(row["request"], answer, place.name, "").digest
    stored = {name: verdict for name, file in files.items() if (verdict := file.known.get(digest)) is not None}
    said: list[Said] = []
    if own is not None:
        first = place.judge or {"name": by}
        same = judges.records.get(str(first.get("name"))) == first
        said.append((first, stored.pop(str(first["name"]), own) if same else own))
    return [*said, *((judges.records[name], verdict) for name, verdict in stored.items())]


def _judged(record: Mapping[str, Any] | None, verdict: Verdict | None) -> Line:
    if record is None or verdict is None:
        return {}
    version = record.get("version")
    line = {"judge": record["name"], "judge_version": None if version is None else str(version)}
    line |= {"class": str(verdict.label or UNJUDGED), "reason": verdict.reason}
    return {**line, "success": verdict.success, "score": verdict.score}


def _items(place: Place, seed: int | None) -> Iterator[tuple[Line, Verdict | None]]:
    """Every prompt of a task with its answer, and the verdict that came with it. `seed`: of answers whose rows do not
    say theirs."""
    kept = _answers(place)
    if not place.rows.exists():
        for (_, index), each in sorted(kept.items()):
            yield {"prompt_index": index, **_kept(each)}, None
        return
    rows, counts, seeds = list(read_rows(place)), dict[Any, int](), {drawn for drawn, _ in kept}
    seed = seeds.pop() if len(seeds) == 1 else seed
    for row in rows:
        drawn = row.get("seed", seed)
        number = counts[drawn] = counts.get(drawn, -1) + 1
        line: Line = {"prompt_index": number}
        if "answer" in row:
            line |= {"decode_seed": drawn, "finish_reason": "length" if row.get("cut") else "stop"}
        answer = kept.get((drawn, number)) if len(kept) == len(rows) else None  # a task's rows may be of several
        if answer is not None and row.get("answer", answer["text"]) == answer["text"]:
            line |= _kept(answer)
        elif kept and "class" in row:
            cause = f"does not hold the answers of {place.answers}"
            raise UserError(cause, "put back the file that was changed", place.rows)
        yield line | _row(row), read_verdict(row, place.rows) if "class" in row else None


def _answers(place: Place) -> dict[tuple[int | None, int], Line]:
    """The kept answers of a task by seed and index; none of an earlier version, which kept no requests."""
    if not place.answers.exists():
        return {}
    with open(place.answers, "rb") as file:
        if b'"request": ' not in file.readline():
            return {}
    return {(row["seed"], row["index"]): row for _, row in read_answers(place.answers)}


def _kept(answer: Line) -> Line:
    messages = answer.get("messages") or None
    line = {"prompt_id": answer.get("id"), "category": answer.get("category") or None, "messages": messages}
    line |= {"request": answer.get("request") or None, "decode_seed": answer["seed"], "answer": answer["text"]}
    line |= {"prompt": messages[-1]["content"] if messages else None}
    # Of a model behind an API, as its endpoint counts them.
    count = answer.get("tokens_out") if "sent" in answer else len(answer["token_ids"])
    line |= {"finish_reason": answer["finish_reason"], "num_tokens": count}
    return {**line, "truncated": answer["finish_reason"] == "length"}


def _row(row: Mapping[str, Any]) -> Line:
    """A row of a task's result by the table's columns."""
    line, other = dict[str, Any](), dict[str, Any]()
    for key, value in row.items():
        name = _RENAMED.get(key, key)
        if key == "judge":
            line[key] = value
        elif key not in _JUDGED:
            (line if name in _OWN else other)[name] = value
    if "class" in row:
        line["request"] = row.get("request") or row["prompt"]
    line = {key: None if value == "" and key not in ("answer", "prompt") else value for key, value in line.items()}
    return line | ({"other": json.dumps(other, ensure_ascii=False)} if other else {})


class _About:
    """What the records of a folder say of its cells."""

    def __init__(self, folder: Path, out: Path):
        self.folder, self.out = folder.resolve(), out.resolve()
        self.kind = record_kind(folder)
        self.record = read_json(folder / FILE)
        self.results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
        settings = self.record.get("settings") or {}
        self.settings = settings.get("eval") or settings if self.kind == "grid" else settings
        self.seed: int | None = self.settings.get("seed")

    def cell(self, place: Place) -> Line:
        """The columns that all lines of a place share."""
        line = {"kind": self.kind, "task": place.task, **self._shared(place.task)}
        return line | (self._grid(place) if self.kind == "grid" else self._evaluation(place))

    def _shared(self, task: str) -> Line:
        record = self.record
        family = record.get("family")
        line = {"template_family": family.get("name") if isinstance(family, dict) else family}
        return {**line, "chat_format": record.get("chat_format")}

    def _evaluation(self, place: Place) -> Line:
        record, results = self.record, self.results
        data = (record.get("data") or {}).get(place.task) or {}
        template = record.get("template") or {}
        line: Line = {"model": place.model, "data": data.get("name"), "test_template": template.get("name")}
        line |= {"template_family": data["family"]} if data.get("family") else {}
        trained = self._run(record["run"]) if record.get("run") else {}
        named = self.settings.get("model") or trained.get("model") or record.get("model")
        line["base_model"] = _named(named)
        if place.model == BASE:
            return line
        line |= {"adapter": results.get("adapter") or _named(record.get("adapter")), "step": record.get("step")}
        return line | ({"run": self._relative(record["run"]), **_training(trained)} if record.get("run") else {})

    def _grid(self, place: Place) -> Line:
        record, figures = self.record, place.figures
        model = place.answers.parent.name
        line: Line = {"model": model, "test_template": figures.get("test"), "base_model": _named(record.get("model"))}
        line["data"] = (self.results.get("sets") or {}).get(place.task)
        if tuned := figures.get("tuned"):
            known = (self.results.get("tuned") or {}).get(tuned) or {}
            return line | ({"run": self._relative(known["folder"])} if "folder" in known else {})
        if figures.get("template") is None:
            return line
        epochs, defense = figures.get("epochs"), figures.get("defense", NONE)
        name = model if epochs is None else model.removesuffix(f".epoch-{epochs:g}")
        # What is composed in weight space is made of the run without a defence.
        run = self.folder / "runs" / (name.removesuffix(f".{defense}") if defense in WEIGHT_SPACE else name)
        line |= {"train_template": figures["template"], "train_seed": figures.get("seed"), "epochs": epochs}
        line["defense"] = defense
        steps = self._run(run).get("steps") if epochs is None else None
        return line | {"run": self._relative(run), "step": steps}

    def _run(self, folder: str | Path) -> Mapping[str, Any]:
        """The record of a run, where it is still there."""
        path = run_folder(Path(folder)) / FILE
        return read_json(path) if path.exists() else {}

    def _relative(self, folder: str | Path) -> str:
        return os.path.relpath(Path(folder).resolve(), self.out)


def _training(run: Mapping[str, Any]) -> Line:
    template, settings = run.get("template") or {}, run.get("settings") or {}
    return {"train_template": template.get("name"), "train_seed": settings.get("seed")}


def _named(name: Any) -> str | None:
    """A model as others know it: a folder by its last name."""
    if name is None:
        return None
    path = Path(str(name))
    return path.name if path.is_absolute() or path.exists() else str(name)


def column_table(columns: Sequence[Column] = COLUMNS) -> str:
    """The columns in Markdown, as docs/long-table.md has them."""
    lines = [f"| `{c.name}` | {c.kind} | {c.meaning} |" for c in columns]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *lines]) + "\n"
