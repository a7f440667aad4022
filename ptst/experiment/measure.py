"""What a cell measures: the tasks of `ptst.eval`, and the refusal margin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.data import prompt_sets
from ptst.data.safety_sets import SafetyPrompt
from ptst.data.sources import Source
from ptst.eval import EvalConfig
from ptst.evaluation.answers import Answerer, Reply
from ptst.evaluation.judges import find_judge
from ptst.evaluation.margin import refusal_margins
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks.result import TaskResult
from ptst.evaluation.tasks.table import BY_NAME, Defaults, Task, TaskData, Tools, load_tasks
from ptst.experiment.plan import distinct
from ptst.generation.sampling import Sampling
from ptst.model.config import DecoderConfig
from ptst.subject import CHECKPOINTS, Subject
from ptst.text.encode import Prompting
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

    def tools(self) -> Tools:
        """The judge, and the similarity where a task needs it. Raises ValueError where they are not to be had."""
        compares = any(task.name == "chatdoctor" for task, _ in self.tasks.values())
        similarity = find_similarity(self.config.similarity, CHECKPOINTS, self.device) if compares else None
        return Tools(find_judge(self.config.judge), similarity)

    def measure(self, task: str, answerer: Answerer, answers: Path | None, tools: Tools) -> TaskResult:
        """The result of a task. Raises ValueError as the tasks do."""
        what, data = self.tasks[task]
        return what.measure(answerer, data.items, self.sampling(task), answers, tools)

    def encoded(self, task: str, subject: Subject) -> list[list[int]]:
        """What the task asks, as ids (of nll: with the answers); nothing is computed. Raises ValueError for what the
        template cannot say."""
        what, data = self.tasks[task]
        if what is MARGIN:
            return [subject.prompting.encode(c).ids for c in _margin_conversations(data.items)]
        if not what.sampled:
            return [subject.prompting.encode(c).ids for c in data.items]
        listener = _Listener(None, subject.prompting, subject.stop_ids, 1)  # type: ignore[arg-type]
        try:
            self.measure(task, listener, None, Tools(None, None))  # type: ignore[arg-type]
        except _Asked as asked:
            return [asked.prompting.encode(c.prompt()).ids for c in asked.conversations]
        raise AssertionError(f"task {task} asks nothing")

    def check(self, subjects: Mapping[str, Subject]) -> None:
        """Raise ValueError for what would otherwise show when all is trained: a prompt that a test template cannot say
        or that leaves no room for its answer, and as `tools`."""
        self.tools()
        for test, subject in subjects.items():
            room = DecoderConfig.from_folder(subject.base).max_positions
            for task, (what, _) in self.tasks.items():
                new = self.sampling(task).max_new_tokens if what.sampled else 0
                longest = max(map(len, self.encoded(task, subject)))
                if longest + new > room:
                    raise ValueError(
                        f"{task} under {test}: a prompt of {longest} tokens and {new} new ones exceed the model's "
                        f"{room} positions; lower --eval.max-new-tokens or take the prompt out"
                    )


class _Asked(Exception):
    def __init__(self, prompting: Prompting, conversations: Sequence[Conversation]):
        self.prompting, self.conversations = prompting, conversations


class _Listener(Answerer):
    def answer(self, conversations: Sequence[Conversation], *_rest: Any) -> list[Reply]:
        raise _Asked(self.prompting, conversations)


def open_tests(
    names: Sequence[str], config: EvalConfig, trained: Source, device: str, families: Sequence[str] | None = None
) -> Tests:
    """The tasks of a grid. `trained`: what is trained on; its test part are the problems unless the evaluation names
    others, its family wraps all prompts. `families`: of the built-in requests and look-alikes, only these. Raises
    ValueError as `load_tasks`."""
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in names:
        name, _, data = spec.partition(":")
        if name not in (*BY_NAME, MARGIN.name):
            raise ValueError(unknown("task", name, (*BY_NAME, MARGIN.name)))
        # Of the chosen families the limit is taken, and not they of what the limit left.
        chosen = families and _set(name, data, config) in (prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES)
        limit = None if chosen else config.limit
        defaults = Defaults(config.data or trained.name, config.data, config.safety_data, limit)
        if name == MARGIN.name:
            loaded = MARGIN.load(data or None, defaults)
            entry = {f"{name}:{loaded.name}" if data else name: (MARGIN, loaded)}
        else:
            entry = load_tasks([spec], defaults)
        if twice := entry.keys() & found.keys():
            raise ValueError(f"--tasks has {twice.pop()} twice; sets are named by their files: rename one, or drop it")
        if chosen:
            entry = {key: (task, _of(families, all_data, config.limit)) for key, (task, all_data) in entry.items()}
        found |= entry
    distinct("task", list(found))
    return Tests(found, trained.family, config, device)


def _set(name: str, data: str, config: EvalConfig) -> str:
    """The set of prompts that a task asks."""
    if name == "over-refusal":
        return data or prompt_sets.LOOK_ALIKES
    return data or (config.safety_data or prompt_sets.BUILT_IN if name in ("safety", MARGIN.name) else "")


def _of(families: Sequence[str], data: TaskData, limit: int) -> TaskData:
    kept = [p for p in data.items if p.family in families]
    name = f"{data.name}, {len(set(families))} families"
    return replace(data, name=name, items=kept[:limit], fingerprint=digest([p.prompt for p in kept[:limit]]))


def base(task: str) -> str:
    """The task of a name with a set, as in safety:advbench."""
    return task.partition(":")[0]


def digest(texts: Sequence[str]) -> str:
    """sha256 over texts in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _margin_data(data: str | None, defaults: Defaults) -> TaskData:
    ((_, loaded),) = load_tasks([f"safety:{data}" if data else "safety"], defaults).values()
    return loaded


def _margin_conversations(items: Sequence[SafetyPrompt]) -> list[Conversation]:
    return [Conversation((Message("user", p.prompt),), p.id) for p in items[:MARGIN_PROMPTS]]


def _margin(answerer: Answerer, items: Sequence[Any], *_rest: Any) -> TaskResult:
    """The refusal margin of improper requests, in nats."""
    conversations = _margin_conversations(items)
    found = refusal_margins(answerer.decoder, answerer.prompting, conversations, adapter=answerer.chosen)
    rows = [
        {"id": c.source, "refusing": m.refusing, "complying": m.complying, "margin": m.value}
        for c, m in zip(conversations, found, strict=True)
    ]
    values = {key: sum(row[key] for row in rows) / len(rows) for key in ("margin", "refusing", "complying")}
    return TaskResult("margin", values=values, rows=rows)


MARGIN = Task("margin", _margin_data, _margin, sampled=False)
