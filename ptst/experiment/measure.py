"""What a cell measures: the tasks of `ptst.eval`, and the refusal margin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptst.data import prompt_sets
from ptst.data.safety_prompt import SafetyPrompt
from ptst.data.sources import Source
from ptst.errors import UserError, unknown_name
from ptst.evaluation import foresight
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.judges import find_judge
from ptst.evaluation.margin import refusal_margins
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks.result import TaskResult
from ptst.evaluation.tasks.table import BY_NAME, Defaults, Task, TaskData, Tools, load_tasks, sampling_for
from ptst.experiment.plan import distinct
from ptst.generation.request import Sampling
from ptst.model.weights import pick_dtype
from ptst.open import CHECKPOINTS, OpenModel
from ptst.text.segments import Conversation, Message

_OF_FAMILIES = {prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES, prompt_sets.SUBSTITUTE}
MARGIN_PROMPTS = 40  # 16 openings each: enough for a mean, and no cell takes longer than its answers


@dataclass(frozen=True)
class Tests:
    """What every row is asked: tasks with their data by name. `family`: how the training data wrap a
    question."""

    tasks: dict[str, tuple[Task, TaskData]]
    family: str
    config: EvalSettings
    device: str

    def count(self, task: str) -> int:
        """How many prompts a task has."""
        return len(self.tasks[task][1].items)

    def sampling(self, task: str) -> Sampling:
        return sampling_for(self.config, self.tasks[task][1].kind)

    def tools(self) -> Tools:
        """The judge, and the similarity where a task needs it. Raises UserError where they are not to be had."""
        compares = any(task.name == "chatdoctor" for task, _ in self.tasks.values())
        similarity = find_similarity(self.config.similarity, CHECKPOINTS, self.device) if compares else None
        return Tools(find_judge(self.config.judge), similarity)

    def measure(self, task: str, answerer: Answerer, answers: Path | None, tools: Tools) -> TaskResult:
        """The result of a task. Raises UserError as the tasks do."""
        what, data = self.tasks[task]
        return what.measure(answerer, data.items, self.sampling(task), answers, tools)

    def asked(self, task: str, model: OpenModel) -> list[tuple[str, list[int]]]:
        """As `foresight.asked`."""
        return foresight.asked(*self.tasks[task], model.prompt_format)

    def check(self, models: Mapping[str, OpenModel]) -> None:
        """Raise UserError for what would otherwise show when all is trained: a prompt that a test template cannot say
        or that leaves no room for its answer, and as `tools`."""
        self.tools()
        dtype = pick_dtype(self.config.dtype)
        for test, model in models.items():
            shape = model.config
            for task, (what, _) in self.tasks.items():
                new = self.sampling(task).max_new_tokens if what.sampled else 0
                prompts, memory = self.asked(task, model), self.config.kv_bytes
                foresight.check_room(f"{task} under {test}", prompts, new, shape, dtype, self.device, memory)


def open_tests(
    names: Sequence[str], config: EvalSettings, trained: Source, device: str, families: Sequence[str] | None = None
) -> Tests:
    """The tasks of a grid. `trained`: what is trained on; its test part are the problems unless the evaluation names
    others, its family wraps all prompts. `families`: of our own requests and look-alikes, only these. Raises UserError
    as `load_tasks`."""
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in names:
        name = base(spec)
        if name not in (*BY_NAME, MARGIN.name):
            raise unknown_name("task", name, (*BY_NAME, MARGIN.name))
        entry = _load(spec, trained, config, config.limit)
        source = spec.partition(":")[2] or config.safety_data or ""
        ours = not Path(source).is_file() and {data.name for _, data in entry.values()} & _OF_FAMILIES
        if families and ours:
            # Of the chosen families the limit is taken, and not they of what the limit left.
            everything = _load(spec, trained, config, None).items()
            entry = {key: (task, _of(families, data, config.limit)) for key, (task, data) in everything}
        if twice := entry.keys() & found.keys():
            raise UserError(f"--tasks has {twice.pop()} twice; sets are named by their files: rename one, or drop it")
        found |= entry
    distinct("task", list(found))
    return Tests(found, trained.family, config, device)


def _load(spec: str, trained: Source, config: EvalSettings, limit: int | None) -> dict[str, tuple[Task, TaskData]]:
    defaults = Defaults(config.data or trained.name, config.data, config.safety_data, limit)
    name, _, data = spec.partition(":")
    if name != MARGIN.name:
        return load_tasks([spec], defaults)
    loaded = MARGIN.load(data or None, defaults)
    return {f"{name}:{loaded.name}" if data else name: (MARGIN, loaded)}


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
    """The refusal margin of harmful requests, in nats."""
    conversations = _margin_conversations(items)
    found = refusal_margins(answerer.decoder, answerer.prompt_format, conversations, adapter=answerer.chosen)
    rows = [
        {"id": c.source, "refusing": m.refusing, "complying": m.complying, "margin": m.value}
        for c, m in zip(conversations, found, strict=True)
    ]
    values = {key: sum(row[key] for row in rows) / len(rows) for key in ("margin", "refusing", "complying")}
    return TaskResult("margin", values=values, rows=rows)


MARGIN = Task("margin", _margin_data, _margin, sampled=False, reads=_margin_conversations)
