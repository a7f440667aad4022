"""What tasks are going to ask, known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ptst.errors import UserError
from ptst.evaluation.answers import Answerer, Reply
from ptst.evaluation.tasks.table import Task, TaskData, Tools
from ptst.generation.kv_cache import BLOCK_SIZE, blocks_for, bytes_per_token, cache_dtype
from ptst.generation.memory import gigabytes
from ptst.generation.request import Sampling
from ptst.model.config import DecoderConfig
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation


def asked(task: Task, data: TaskData, prompt_format: PromptFormat) -> list[tuple[str, list[int]]]:
    """What the task asks: where it stands, and its ids; of one that asks for no answers, what it reads. Raises
    ValueError for what the template cannot say."""
    if not task.sampled:
        return [(c.where, prompt_format.encode(c).ids) for c in task.reads(data.items)]
    listener = _Listener(None, prompt_format, frozenset(), 1)  # type: ignore[arg-type]
    try:
        task.measure(listener, data.items, Sampling(1), None, Tools(None, None))  # type: ignore[arg-type]
    except _Asked as heard:
        return [(c.where, heard.prompt_format.encode(c.prompt()).ids) for c in heard.conversations]
    raise AssertionError(f"task {task.name} asks nothing")


def check_room(
    what: str,
    prompts: Sequence[tuple[str, Sequence[int]]],
    new: int,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: str,
    kv_memory: int | None,
) -> None:
    """Raise UserError where a prompt with its `new` tokens would fit neither the context nor `kv_memory` (bytes)."""
    where, ids = max(prompts, key=lambda prompt: len(prompt[1]))
    longest = len(ids) + new
    if longest > config.max_positions:
        too_much = f"a prompt of {len(ids)} tokens and {new} new ones exceed" if new else f"{longest} tokens exceed"
        mend = "lower --max-new-tokens or take the prompt out" if new else "take it out"
        raise UserError(f"{what}: {where}{too_much} the model's {config.max_positions} positions; {mend}")
    dtype = cache_dtype(dtype, torch.device(device))
    needed = (blocks_for(longest) + 1) * BLOCK_SIZE * bytes_per_token(config, dtype)
    if new and kv_memory is not None and needed > kv_memory:
        raise UserError(
            f"--kv-memory is {gigabytes(kv_memory)}, and {what} needs {gigabytes(needed)} for a prompt and its answer; "
            "raise it, or lower --max-new-tokens"
        )


class _Asked(Exception):
    def __init__(self, prompt_format: PromptFormat, conversations: Sequence[Conversation]):
        self.prompt_format, self.conversations = prompt_format, conversations


class _Listener(Answerer):
    def answer(self, conversations: Sequence[Conversation], *_rest: Any) -> list[Reply]:
        raise _Asked(self.prompt_format, conversations)
