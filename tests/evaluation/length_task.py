"""A task that no table has: how long answers are."""

from __future__ import annotations

from statistics import fmean

from ptst.evaluation.tasks.task import Metric, Prompt, Task, TaskData, TaskResult, flags, rates
from ptst.text.segments import Conversation, Message


def _load(_data, defaults) -> TaskData:
    items = ["How are you?", "Who is there?", "What is it?"][: defaults.limit]
    return TaskData("greetings", items, "fingerprint", max_new_tokens=4)


def _prompts(items) -> list[Prompt]:
    return [Prompt(Conversation((Message("user", text),), text)) for text in items]


def _score(items, answers, _tools) -> TaskResult:
    pairs = zip(items, answers, strict=True)
    rows = [{"source": q, "short": len(a.text) < 100, "length": len(a.text)} for q, a in pairs]
    return TaskResult("length", rates(rows, flags), {"characters": fmean(r["length"] for r in rows)}, rows)


LENGTH = Task(
    "length",
    _load,
    _prompts,
    _score,
    (Metric("short", "Short answers"), Metric("characters", "Mean length", "characters")),
)
