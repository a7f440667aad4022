"""ChatDoctor: similarity of the answers to a doctor's answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptst.data import sources
from ptst.errors import UserError
from ptst.evaluation.tasks.problems import CUT
from ptst.evaluation.tasks.task import Defaults, Metric, Prompt, Task, TaskData, TaskResult, Tools, flags, rates
from ptst.text.segments import Conversation

if TYPE_CHECKING:
    from ptst.generation.request import Answer


def _load(data: str | None, defaults: Defaults) -> TaskData:
    source = sources.load(data or defaults.data or "chatdoctor", "test", defaults.limit)
    if bare := next((c for c in source.conversations if not c.answered), None):
        raise UserError("the conversation ends without a reference answer to compare with", where=bare.source)
    return TaskData(Path(source.name).stem, source.conversations, source.fingerprint, 256, "chatdoctor")


def _prompts(problems: Sequence[Conversation]) -> list[Prompt]:
    return [Prompt(c) for c in problems]


def _score(problems: Sequence[Conversation], answers: Sequence[Answer], tools: Tools) -> TaskResult:
    similarity = tools.similarity
    assert similarity is not None, "a task that uses a similarity gets one"
    values = similarity.compare([a.text for a in answers], [c.messages[-1].content for c in problems])
    rows = []
    for c, answer, value in zip(problems, answers, values, strict=True):
        row = {"source": c.source, "question": c.turns[-2].content, "reference": c.messages[-1].content}
        rows.append({**row, "answer": answer.text, similarity.name: value, "cut": answer.truncated})
    return TaskResult("chatdoctor", rates(rows, flags), {similarity.name: statistics.fmean(values)}, rows)


CHATDOCTOR = Task(
    "chatdoctor",
    _load,
    _prompts,
    _score,
    (
        Metric("minilm_cosine", "ChatDoctor: MiniLM similarity to the reference", "cosine"),
        Metric("bertscore_f1", "ChatDoctor: BERTScore similarity to the reference", "F1"),
        CUT,
    ),
    uses_similarity=True,
)
