"""ARC's questions, answered freely (Lyu et al. 2024, appendix F.5)."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptst.data.arc import ArcQuestion, load_arc
from ptst.data.sources import unused_columns
from ptst.evaluation.choices import chosen_choice, plain, printed_choice
from ptst.evaluation.tasks.problems import CUT
from ptst.evaluation.tasks.task import Defaults, Metric, Prompt, Task, TaskData, TaskResult, Tools, flags, rates
from ptst.generation.request import Answer
from ptst.text.segments import Conversation, Message
from ptst.text.templates import arc_question


def arc(name: str, title: str) -> Task:
    """The task `arc-easy` or `arc-challenge`."""

    def load(data: str | None, defaults: Defaults) -> TaskData:
        unused = Counter[str]()
        questions = load_arc(name, data, defaults.limit, defaults.rules, unused)
        fingerprint = hashlib.sha256(repr([(q.question, q.choices, q.gold) for q in questions]).encode()).hexdigest()
        note = unused_columns(unused)
        return TaskData(
            Path(data or name).stem, questions, fingerprint, 256, note=f"{data or name}: {note}" if note else ""
        )

    def score(questions: Sequence[ArcQuestion], answers: Sequence[Answer], _tools: Tools) -> TaskResult:
        rows = [_row(q, a) for q, a in zip(questions, answers, strict=True)]
        return TaskResult(name, rates(rows, flags), rows=rows)

    metrics = (
        Metric("correct", f"{title}: right choice named"),
        Metric("printed", f"{title}: right by the paper's expression as printed", tables=("eval",)),
        Metric("named", f"{title}: any choice named", tables=("eval",)),
        CUT,
    )
    return Task(name, load, _prompts, score, metrics)


def _prompts(questions: Sequence[ArcQuestion]) -> list[Prompt]:
    asked = [Conversation((Message("user", arc_question(q.question, q.choices)),), q.source) for q in questions]
    return [Prompt(c, family="plain") for c in asked]  # the wording is the task's own


def _row(question: ArcQuestion, answer: Answer) -> dict[str, Any]:
    """`correct`: the answer names the right choice; `printed`: right by the paper's regular expression to the letter;
    `named`: the answer names any choice."""
    chosen, gold = chosen_choice(answer.text, question.choices), question.choices[question.gold]
    row: dict[str, Any] = {"source": question.source, "question": question.question, "choices": question.choices}
    row |= {"gold": gold, "answer": answer.text, "chosen": None if chosen is None else question.choices[chosen]}
    row |= {"correct": chosen == question.gold, "printed": printed_choice(answer.text) == plain(gold)}
    return {**row, "named": chosen is not None, "cut": answer.truncated}
