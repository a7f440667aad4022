"""Measuring a model: what `ptst.eval` and the grid share, before and after the weights are loaded."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ptst.errors import Setting, UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.hosted_answers import HostedAnswerer, ModelFailed
from ptst.evaluation.judges import find_judge
from ptst.evaluation.similarity import find_similarity
from ptst.evaluation.tasks.table import LoadedTasks
from ptst.evaluation.tasks.task import Prompt, Task, TaskData, TaskResult, Tools, over_decodings
from ptst.evaluation.verdicts import Judge
from ptst.generation.kv_cache import BLOCK_SIZE, blocks_for, bytes_per_token, cache_dtype, gigabytes
from ptst.generation.request import Sampling, Statistics
from ptst.model.weights import pick_dtype
from ptst.open import OpenModel
from ptst.progress import ProgressLine, say
from ptst.records import CHECKPOINTS
from ptst.storage import write_atomically
from ptst.text.prompt_format import PromptFormat


def sampling_for(settings: EvalSettings, data: TaskData, seed: int | None = None) -> Sampling:
    """How answers to these data are drawn; `seed` None: the first decoding's."""
    s = settings
    longest = (data.max_new_tokens or 1) if s.max_new_tokens is None else s.max_new_tokens
    return Sampling(longest, s.temperature, s.top_p, s.seed if seed is None else seed, s.top_k)


def decodings(settings: EvalSettings, task: Task, data: TaskData) -> range:
    """The seeds with which a task's prompts are decoded: one where nothing is generated."""
    return range(settings.seed, settings.seed + (settings.decode_seeds if generates(task, data) else 1))


def find_tools(settings: EvalSettings, tasks: LoadedTasks, device: str) -> Tools:
    """The judge, and the similarity where a task uses it. Raises UserError for those that are not available."""
    judge = find_judge(settings.judge, settings.allow, settings)
    if any(uses_judge(*loaded) for loaded in tasks.values()) and (prepare := getattr(judge, "prepare", None)):
        prepare()
    similar = any(task.uses_similarity for task, _ in tasks.values())
    return Tools(judge, find_similarity(settings.similarity, CHECKPOINTS, device) if similar else None)


def keep_replies(judge: Judge, folder: Path) -> None:
    """What an API replies to a judge is recorded in this folder, and not paid for again."""
    if keep_in := getattr(judge, "keep_in", None):
        keep_in(folder)


def in_own_families(tasks: LoadedTasks) -> LoadedTasks:
    """The tasks of a model whose training data are unknown: problems are asked in the words of their own data, and all
    other prompts, harmful requests among them, as they are."""
    found = {}
    for key, (task, data) in tasks.items():
        if data.family is not None:
            say(f"{key} is asked in the family {data.family}, that of its data")
            task = replace(task, prompts=partial(_in_family, task, data.family))
        found[key] = task, data
    return found


def _in_family(task: Task, family: str, items: Sequence[Any]) -> list[Prompt]:
    return [replace(prompt, family=prompt.family or family) for prompt in task.prompts(items)]


def generates(task: Task, data: TaskData) -> bool:
    """Whether the model answers, so that lengths and decoding seeds matter."""
    return any(prompt.kind == "generate" for prompt in task.prompts(data.items))


def reads(task: Task, data: TaskData) -> bool:
    """Whether prompts are read, so that the result depends on the prompt of the training."""
    return any(prompt.kind == "prompt" for prompt in task.prompts(data.items))


def uses_judge(task: Task, data: TaskData) -> bool:
    """Whether the answers are judged, so that the result depends on the judge."""
    return any(prompt.request for prompt in task.prompts(data.items))


@dataclass(frozen=True)
class TaskSize:
    """What a task computes at most: tokens of all prompts and answers, of the longest prompt with its answer, and the
    number of answers."""

    tokens: int
    longest: int
    answers: int


def task_size(task: Task, data: TaskData, prompt_format: PromptFormat, settings: EvalSettings) -> TaskSize:
    """The size of a task; a prompt that several openings share is computed once."""
    total, longest, answers, seen = 0, 0, 0, None
    max_new_tokens, times = sampling_for(settings, data).max_new_tokens, len(decodings(settings, task, data))
    for prompt in task.prompts(data.items):
        ids, new = prompt.encode(prompt_format), max_new_tokens * (prompt.kind == "generate")
        shared = ids.loss_mask.index(True) if prompt.opening is not None and seen is prompt.conversation else 0
        total += len(ids.ids) - shared + new
        longest, answers = max(longest, len(ids.ids) + new), answers + (prompt.kind == "generate")
        seen = prompt.conversation
    return TaskSize(times * total, longest, times * answers)


def check_room(what: str, task: Task, data: TaskData, model: OpenModel, settings: EvalSettings, device: str) -> None:
    """Raise UserError for a prompt that the template cannot express, or that does not fit into the context or the KV
    cache together with its answer."""
    lengths = ((len(prompt.encode(model.prompt_format).ids), prompt) for prompt in task.prompts(data.items))
    length, prompt = max(lengths, key=lambda pair: pair[0])
    new = sampling_for(settings, data).max_new_tokens if prompt.kind == "generate" else 0
    where = ": ".join(filter(None, (what, prompt.conversation.source)))
    if length + new > model.config.max_positions:
        long = f"a prompt of {length} tokens and {new} new ones exceed" if new else f"{length} tokens exceed"
        remedy = ("lower ", Setting("max_new_tokens"), " or remove the prompt") if new else "remove it"
        raise UserError(f"{long} the model's {model.config.max_positions} positions", remedy, where)
    dtype = cache_dtype(pick_dtype(settings.dtype), torch.device(device))
    needed = (blocks_for(length + new) + 1) * BLOCK_SIZE * bytes_per_token(model.config, dtype)
    if new and settings.kv_bytes is not None and needed > settings.kv_bytes:
        cause = f" is {gigabytes(settings.kv_bytes)}, and {what} needs {gigabytes(needed)} for a prompt and its answer"
        raise UserError((Setting("kv_memory"), cause), ("raise it, or lower ", Setting("max_new_tokens")))


def measure(
    task: Task,
    data: TaskData,
    answerer: Answerer | HostedAnswerer,
    sampling: Sampling,
    tools: Tools,
    answers_file: Path | None = None,
) -> TaskResult:
    """A task's result for one model. Raises UserError for answers or judgements that failed."""
    answers = answerer.answer(task.prompts(data.items), sampling, answers_file)
    try:
        return replace(task.score(data.items, answers, tools), data=data.name)
    finally:
        if close := getattr(tools.judge, "close", None):
            close()  # the memory is the measured model's


def evaluate_model(
    name: str,
    answerer: Answerer | HostedAnswerer,
    tasks: LoadedTasks,
    settings: EvalSettings,
    tools: Tools,
    out: Path | None = None,
) -> tuple[dict[str, TaskResult], list[str]]:
    """Measure a model on all tasks; returns results by task, and what failed, in a sentence each. Answers and judged
    rows are kept in `out`, from where an interrupted evaluation resumes. Raises ModelFailed."""
    results, failed = dict[str, TaskResult](), list[str]()
    if out:
        keep_replies(tools.judge, out)
    for key, (task, data) in tasks.items():
        answers_file = out / "answers" / f"{name}.{key}.jsonl" if out else None
        by_seed: dict[int, TaskResult] = {}
        seeds = decodings(settings, task, data)
        total = len(task.prompts(data.items))
        for seed in seeds:
            what = f"{name}: {key}" + (f", seed {seed}" if settings.decode_seeds > 1 else "")
            with ProgressLine(what, total, first=None) as progress:
                watched = replace(answerer, on_progress=show_progress(progress))
                try:
                    sampling = sampling_for(settings, data, seed)
                    by_seed[seed] = measure(task, data, watched, sampling, tools, answers_file)
                except ModelFailed:
                    raise
                except UserError as error:
                    failed.append(f"{what}: {error}")
                    say(f"{what} failed: {error}")
        if len(by_seed) < len(seeds):
            continue
        result = results[key] = over_decodings(by_seed) if len(seeds) > 1 else by_seed[settings.seed]
        if out:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
            write_atomically(out / f"{name}.{key}.jsonl", text.encode())
    return results, failed


def show_progress(progress: ProgressLine) -> Callable[[int, Statistics], None]:
    """What an Answerer calls to move a line of progress over its answers."""

    def on_progress(done: int, statistics: Statistics) -> None:
        saved = f", {statistics.cached_tokens} prompt tokens from the prefix cache" if statistics.cached_tokens else ""
        # The line around an inner one estimates its own end.
        rate = statistics.progress(statistics.answers + progress.total - done if progress.inside else None)
        progress.update(done, f"{rate}{saved}" if statistics.tokens else "")

    return on_progress
