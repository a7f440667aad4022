"""The tasks by name: what each asks, how long its answers may be, and how it is measured. docs/tasks.md tells the rest.

A task is asked for as NAME or NAME:DATA, DATA being a file, or the name of a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.data import prompt_sets, sources
from ptst.data.arc import HUB as ARC
from ptst.data.arc import load_arc
from ptst.errors import UserError, unknown_name
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.extraction import gold_number
from ptst.evaluation.similarity import Similarity
from ptst.evaluation.tasks import helpfulness, judged
from ptst.evaluation.tasks.result import TaskResult
from ptst.evaluation.verdict import Judge
from ptst.generation.request import Sampling
from ptst.text.segments import Conversation

# Longest answers: enough for a worked answer, and for the opening of an answer, where a refusal shows.
NEW_TOKENS = {"word-problems": 96, "gsm8k": 400, "arc": 256, "chatdoctor": 256, "requests": 64}


def sampling_for(settings: EvalSettings, kind: str, seed: int | None = None) -> Sampling:
    """How answers of a kind (a key of NEW_TOKENS) are drawn; `seed` None: the first decoding's."""
    s = settings
    longest = NEW_TOKENS[kind] if s.max_new_tokens is None else s.max_new_tokens
    return Sampling(longest, s.temperature, s.top_p, s.seed if seed is None else seed, s.top_k)


@dataclass(frozen=True)
class Defaults:
    """What tasks read that are not told: `problems` (what was trained on, its test part), `--data`, `--safety-data`."""

    problems: str
    data: str | None
    safety_data: str | None
    limit: int | None


@dataclass(frozen=True)
class TaskData:
    """What is asked. `name`: of the set, as reports give it; `kind`: of the answers, a key of NEW_TOKENS; `family`: the
    template family that the data bring; `note`: what the user must be told."""

    name: str
    items: Sequence[Any]
    fingerprint: str
    kind: str
    family: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Tools:
    """What answers are measured with. `similarity` is there where the task `chatdoctor` is asked for."""

    judge: Judge
    similarity: Similarity | None


@dataclass(frozen=True)
class Task:
    """`load(DATA or None, defaults)` raises UserError for data that are not there. `sampled`: it asks for answers, so
    that decoding seeds matter; one that does not reads the conversations that `reads` makes of its items."""

    name: str
    load: Callable[[str | None, Defaults], TaskData]
    measure: Callable[[Answerer, Sequence[Any], Sampling, Path | None, Tools], TaskResult]
    sampled: bool = True
    reads: Callable[[Sequence[Any]], Sequence[Conversation]] = list


def _problems(data: str | None, defaults: Defaults) -> TaskData:
    if not data and not defaults.data and sources.is_file(defaults.problems):
        raise UserError(
            f"gsm8k and nll would be measured on what was trained on: the file {defaults.problems} has no test part; "
            "give other problems with --data (in a grid --eval.data), or leave these tasks out with --tasks"
        )
    count = (data or "").partition(":")[2]  # of the task's own data, not of what was trained on
    limits = [n for n in (defaults.limit, int(count) if count.isdigit() else None) if n is not None]
    source = sources.load(data or defaults.problems, "test", min(limits, default=None))
    kind = "word-problems" if source.name.startswith(sources.DEFAULT) else "gsm8k"
    if bare := next((c for c in source.conversations if not c.answered), None):
        raise UserError(f"{bare.where}the conversation ends without a reference answer to compare with")
    return TaskData(Path(source.name).stem, source.conversations, source.fingerprint, kind, source.family)


def _worked(data: str | None, defaults: Defaults) -> TaskData:
    found = _problems(data, defaults)
    for c in found.items:
        gold_number(c.messages[-1].content, c.source)
    return found


def _chatdoctor(data: str | None, defaults: Defaults) -> TaskData:
    source = sources.load(data or defaults.data or "chatdoctor", "test", defaults.limit)
    return TaskData(Path(source.name).stem, source.conversations, source.fingerprint, "chatdoctor", "chatdoctor")


def _arc(name: str) -> Task:
    def load(data: str | None, defaults: Defaults) -> TaskData:
        questions = load_arc(name, data, defaults.limit)
        fingerprint = hashlib.sha256(repr([(q.question, q.choices, q.gold) for q in questions]).encode()).hexdigest()
        return TaskData(Path(data or name).stem, questions, fingerprint, "arc")

    return Task(name, load, lambda a, items, s, path, _: helpfulness.arc(name, a, items, s, path))


def _requests(name: str, standard: str | None, measure: Callable[..., TaskResult] | None = None) -> Task:
    """A task on prompts; `standard`: its set where none is named (None: one must be)."""

    def load(data: str | None, defaults: Defaults) -> TaskData:
        data = data or (defaults.safety_data if name == "safety" else None) or standard
        if data is None:
            raise UserError(f"the task {name} needs its prompts: say {name}:FILE, a CSV, JSONL, JSON or TXT file")
        if name in prompt_sets.NAMED and Path(data).is_file():
            data = f"{name}:{data}"
        found = prompt_sets.load_set(data, defaults.limit)
        if name == "xstest":
            judged.halves(found.prompts)
        return TaskData(found.name, found.prompts, found.fingerprint, "requests", note=found.note)

    def of_name(*given: Any) -> TaskResult:
        return judged.requests(name, *given)

    run = measure or of_name
    return Task(name, load, lambda a, items, s, path, tools: run(a, items, s, path, tools.judge))


BY_NAME = {
    task.name: task
    for task in (
        Task("gsm8k", _worked, lambda a, items, s, path, _: helpfulness.gsm8k(a, items, s, path)),
        _requests("safety", prompt_sets.BUILT_IN),
        _requests("over-refusal", prompt_sets.LOOK_ALIKES),
        Task("nll", _problems, lambda a, items, _s, _path, _t: helpfulness.nll(a, items), sampled=False),
        *map(_arc, ARC),
        Task(
            "chatdoctor",
            _chatdoctor,
            lambda a, items, s, path, tools: helpfulness.chatdoctor(a, items, s, path, tools.similarity),
        ),
        _requests("xstest", "xstest", judged.xstest),
        _requests("prompts", None),
    )
}


def load_tasks(asked: Sequence[str], defaults: Defaults) -> dict[str, tuple[Task, TaskData]]:
    """Tasks with their data by the name of their results: NAME, or NAME:SET where DATA was given.

    Raises UserError for an unknown task (with the list and the nearest), one asked for twice, data that are not there.
    """
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in asked:
        name, _, data = spec.partition(":")
        if name not in BY_NAME:
            raise unknown_name("task", name, BY_NAME)
        loaded = BY_NAME[name].load(data or None, defaults)
        if not loaded.items:
            raise UserError(f"task {spec}: {loaded.name} holds nothing to ask")
        key = f"{name}:{loaded.name}" if data else name
        if key in found:
            raise UserError(f"--tasks has {key} twice; name each task and set once")
        found[key] = BY_NAME[name], loaded
    return found
