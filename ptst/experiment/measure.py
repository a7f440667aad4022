"""What a cell measures: the tasks of `ptst.eval`, and the refusal margin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.data import prompt_sets
from ptst.data.sources import Source
from ptst.eval import EvalConfig
from ptst.evaluation.answers import Answerer, Reply
from ptst.evaluation.judges import find_judge
from ptst.evaluation.margin import refusal_margins
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks.result import TaskResult
from ptst.evaluation.tasks.table import BY_NAME, Defaults, Task, TaskData, Tools, load_tasks
from ptst.generation.sampling import Sampling
from ptst.subject import CHECKPOINTS
from ptst.text.segments import Conversation, Message
from ptst.text.templates import unknown

MARGIN_PROMPTS = 40  # 16 openings each: enough for a mean, and no cell takes longer than its answers


@dataclass(frozen=True)
class Tests:
    """What every row is asked: tasks with their data by name. `family`: how the training data wrap a
    question."""

    tasks: dict[str, tuple[Task, TaskData]]
    family: str
    config: EvalConfig
    device: str

    def count(self, task: str) -> int:
        """How many prompts a task has."""
        return len(self.tasks[task][1].items)

    def sampling(self, task: str) -> Sampling:
        return self.config.sampling(self.tasks[task][1].kind, self.config.seed)

    @property
    def tools(self) -> Tools:
        compares = any(task.name == "chatdoctor" for task, _ in self.tasks.values())
        similarity = find_similarity(self.config.similarity, CHECKPOINTS, self.device) if compares else None
        return Tools(find_judge(self.config.judge), similarity)

    def measure(self, task: str, answerer: Answerer, answers: Path | None, tools: Tools) -> TaskResult:
        """The result of a task. Raises ValueError as the tasks do."""
        what, data = self.tasks[task]
        return what.measure(answerer, data.items, self.sampling(task), answers, tools)

    def conversations(self, task: str, answerer: Answerer) -> list[Conversation]:
        """What the task asks of an answerer; nothing is computed."""
        what, data = self.tasks[task]
        if not what.sampled:
            return list(data.items)
        try:
            self.measure(task, _Listener(**vars(answerer)), None, Tools(None, None))  # type: ignore[arg-type]
        except _Asked as asked:
            return asked.conversations
        raise AssertionError(f"task {task} asks nothing")


class _Asked(Exception):
    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = list(conversations)


class _Listener(Answerer):
    def answer(self, conversations: Sequence[Conversation], *_rest: Any) -> list[Reply]:
        raise _Asked(conversations)


def open_tests(
    names: Sequence[str], config: EvalConfig, trained: Source, device: str, families: Sequence[str] | None = None
) -> Tests:
    """The tasks of a grid. `trained`: what is trained on; its test part are the problems unless the evaluation names
    others, its family wraps all prompts. `families`: of the built-in requests and look-alikes, only these. Raises
    ValueError as `load_tasks`."""
    wide = None if families else config.limit
    found: dict[str, tuple[Task, TaskData]] = {}
    for name in names:
        if base(name) not in (*BY_NAME, MARGIN.name):
            raise ValueError(unknown("task", base(name), (*BY_NAME, MARGIN.name)))
        defaults = Defaults(config.data or trained.name, config.data, config.safety_data, config.limit)
        if name == "margin":
            found[name] = MARGIN, MARGIN.load(None, replace(defaults, limit=wide))
        else:
            built_in = name in ("safety", "over-refusal")
            found |= load_tasks([name], replace(defaults, limit=wide) if built_in else defaults)
    if families:
        found = {key: (task, _of(families, data, config.limit)) for key, (task, data) in found.items()}
    return Tests(found, trained.family, config, device)


def _of(families: Sequence[str], data: TaskData, limit: int) -> TaskData:
    if data.name not in (prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES):
        return replace(data, items=data.items[:limit])
    kept = [p for p in data.items if p.family in families]
    name = f"{data.name}, {len(set(families))} families"
    return replace(data, name=name, items=kept[:limit], fingerprint=digest([p.prompt for p in kept[:limit]]))


def base(task: str) -> str:
    """The task of a name with a set, as in safety:advbench."""
    return task.partition(":")[0]


def digest(texts: Sequence[str]) -> str:
    """sha256 over texts in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _margin_data(_data: str | None, defaults: Defaults) -> TaskData:
    ((_, data),) = load_tasks(["safety"], defaults).values()
    return data


def _margin(answerer: Answerer, items: Sequence[Any], *_rest: Any) -> TaskResult:
    """The refusal margin of improper requests, in nats."""
    conversations = [Conversation((Message("user", p.prompt),), p.id) for p in items[:MARGIN_PROMPTS]]
    found = refusal_margins(answerer.decoder, answerer.prompting, conversations, adapter=answerer.chosen)
    rows = [
        {"id": c.source, "refusing": m.refusing, "complying": m.complying, "margin": m.value}
        for c, m in zip(conversations, found, strict=True)
    ]
    return TaskResult("margin", values={"margin": sum(m.value for m in found) / len(found)}, rows=rows)


MARGIN = Task("margin", _margin_data, _margin, sampled=False)
