"""How far a test prompt is from the prompt of the training, around the same questions, by three measures:

- edit share: Levenshtein's distance of the token ids, as a share of the longer prompt;
- negative log-likelihood of the whole prompt under the model that is tested, in nats per token;
- cosine of that model's hidden states, after the final norm, at the last token of either prompt.

The first says how much of the prompt is other, the second how strange the model finds it, the third how differently
the model is disposed where its answer begins. No answer is generated. Where the training is unknown (a model without a
run), the likelihood alone is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ptst.data import prompt_sets
from ptst.data.prompt_files import SafetyPrompt
from ptst.evaluation.tasks.requests import load_requests, to_conversations
from ptst.evaluation.tasks.task import Metric, Prompt, Task, TaskResult, Tools
from ptst.generation.request import Answer

MAX_PROMPTS = 20  # the prompts differ in the question alone, so that more say little more


@dataclass(frozen=True)
class Reading(Answer):
    """A prompt that was read: `token_ids` and `logprobs` are its own tokens', without the first. Against the same
    question in the prompt of the training: `edit_share` of the token ids, `cosine` of the hidden states where the
    answer would begin; None where that prompt is unknown."""

    edit_share: float | None = None
    cosine: float | None = None


def _prompts(items: Sequence[SafetyPrompt]) -> list[Prompt]:
    return [Prompt(c, "prompt") for c in to_conversations(items[:MAX_PROMPTS])]


def _score(items: Sequence[SafetyPrompt], answers: Sequence[Answer], _tools: Tools) -> TaskResult:
    rows: list[dict[str, Any]] = []
    for item, read in zip(items[:MAX_PROMPTS], answers, strict=True):
        assert isinstance(read, Reading) and read.logprobs is not None
        row: dict[str, Any] = {"id": item.id, "nll": -sum(read.logprobs), "tokens": len(read.logprobs)}
        if read.edit_share is not None and read.cosine is not None:
            row |= {"edit_share": read.edit_share, "cosine": read.cosine}
        rows.append(row)
    values = {"nats_per_token": sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)}
    for name in ("edit_share", "cosine"):
        if all(name in row for row in rows):
            values[name] = fmean(row[name] for row in rows)
    return TaskResult("distance", values={**values, "prompts": len(rows)}, rows=rows)


DISTANCE = Task(
    "distance",
    load_requests("safety", prompt_sets.BUILT_IN),
    _prompts,
    _score,
    (
        Metric("edit_share", "Prompt against that of the training: share of tokens edited", "share"),
        Metric("nats_per_token", "Negative log-likelihood of the prompt", "nats per token"),
        Metric("cosine", "Prompt against that of the training: cosine of hidden states", "cosine"),
        Metric("prompts", "Prompts", "count", tables=()),
    ),
)
