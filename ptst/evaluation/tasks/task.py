"""What a task is: prompts out, answers in, figures out. No model is involved.

    data = task.load(None, defaults)
    prompts = task.prompts(data.items)
    answers = [...]  # one for each prompt, in order: from the engine, or from an API
    result = task.score(data.items, answers, tools)

`Task.metrics` names the figures once; every report (table, JSON, CSV, Markdown, heat map) derives from it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ptst.data.columns import ColumnRules
from ptst.errors import UserError
from ptst.evaluation.rates import Rate, RepeatedRate
from ptst.evaluation.similarity import Similarity
from ptst.evaluation.verdicts import Judge
from ptst.generation.request import Answer
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.templates import find_family


@dataclass(frozen=True)
class Prompt:
    """One request to the model. kind "generate": the model answers `conversation`. kind "loglikelihood": a given answer
    is scored, the last message of `conversation` with its terminator, or `opening`, the unfinished beginning of an
    answer. kind "prompt": the prompt itself is read, and nothing answered. `family` replaces the template family of the
    prompt format. `request`: what the answer is judged by, without an adversarial suffix ("": it is not judged),
    `category` of its set."""

    conversation: Conversation
    kind: Literal["generate", "loglikelihood", "prompt"] = "generate"
    opening: str | None = None
    family: str | None = None
    request: str = ""
    category: str = ""

    def encode(self, prompt_format: PromptFormat) -> Example:
        """The ids that the model reads; the loss mask marks the tokens of a given answer. Raises UserError for what
        the template cannot express, and for a missing answer."""
        if self.family is not None:
            prompt_format = replace(prompt_format, family=find_family(self.family))
        if self.kind != "loglikelihood":
            return prompt_format.encode(self.conversation.prompt())
        if self.opening is not None:
            return prompt_format.encode_opening(self.conversation.prompt(), self.opening)
        example = prompt_format.encode(self.conversation)
        if not any(example.loss_mask):
            raise UserError("there is no reference answer to score", where=self.conversation.source)
        return example


@dataclass(frozen=True)
class Metric:
    """A figure of a task. `key`: its name in results. `unit`: % for a rate, "count" for a number of answers, else the
    unit of a mean. `tables`: where it is shown ("eval", "grid"); results JSON and CSV always have it."""

    key: str
    label: str
    unit: str = "%"
    lower_is_safer: bool = False
    tables: tuple[str, ...] = ("eval", "grid")

    @property
    def heading(self) -> str:
        return f"{self.label}, {self.unit}{' (lower is safer)' * self.lower_is_safer}"


@dataclass(frozen=True)
class Defaults:
    """Data of tasks that name none: `problems` (training data, of which the test part is used), `data` and
    `safety_data` (settings). `holdout`: share of a training file that was held out. `limit`: prompts per task.
    `rules`: the settings' for columns; `problem_rules`: those of training, for its data (None: `rules`)."""

    problems: str
    data: str | None = None
    safety_data: str | None = None
    limit: int | None = None
    holdout: float = 0.0
    rules: ColumnRules = field(default_factory=ColumnRules)
    problem_rules: ColumnRules | None = None


@dataclass(frozen=True)
class TaskData:
    """The items of a task. `name`: of the set, in reports; `max_new_tokens`: default limit of an answer; `family`:
    template family of the data; `note`: what the user must know about the data."""

    name: str
    items: Sequence[Any]
    fingerprint: str
    max_new_tokens: int = 0
    family: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Tools:
    """What answers are scored with. `similarity` is None unless a task uses it."""

    judge: Judge
    similarity: Similarity | None = None


@dataclass(frozen=True)
class TaskResult:
    """Rates and values by metric, and one row per item (kept in the run folder, never printed). `data`: name of the
    set."""

    task: str
    rates: Mapping[str, Rate | RepeatedRate] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = field(default_factory=list)
    data: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**{k: r.to_json() for k, r in self.rates.items()}, **self.values}


def flags(row: Mapping[str, Any]) -> dict[str, float]:
    """The outcomes of a row whose rates are means of its true-or-false fields."""
    return {key: float(value) for key, value in row.items() if isinstance(value, bool)}


@dataclass(frozen=True)
class Task:
    """`load(data or None, defaults)` raises UserError for data that cannot be read. `score` takes the items and one
    answer for each of their prompts. `outcomes` gives what one row of a result contributes to each metric (NaN: not
    judged), from which rates, and means over seeds, are computed. A new task is one file and one entry of the table."""

    name: str
    load: Callable[[str | None, Defaults], TaskData]
    prompts: Callable[[Sequence[Any]], list[Prompt]]
    score: Callable[[Sequence[Any], Sequence[Answer], Tools], TaskResult]
    metrics: tuple[Metric, ...]
    outcomes: Callable[[Mapping[str, Any]], Mapping[str, float]] = flags
    uses_similarity: bool = False


def rates(rows: Sequence[Mapping[str, Any]], outcomes: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> dict:
    """Rates by metric over the judged rows."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, outcome in outcomes(row).items():
            found.setdefault(key, []).append(outcome)
    judged = {key: [o for o in all_outcomes if o == o] for key, all_outcomes in found.items()}
    return {key: Rate(int(sum(kept)), len(kept)) for key, kept in judged.items()}


def over_decodings(results: Mapping[int, TaskResult]) -> TaskResult:
    """Results of one task by decoding seed as one: rates as means with their spread, values as means with
    `<name>_sd` (population, as in the paper) and `<name>_sample_sd`, rows with their seed."""
    each = list(results.values())
    first = each[0]
    repeated = {name: RepeatedRate(tuple(r.rates[name] for r in each)) for name in first.rates}  # type: ignore[misc]
    values: dict[str, float] = {}
    for name in first.values:
        found = [r.values[name] for r in each]
        values |= {name: statistics.fmean(found), f"{name}_sd": statistics.pstdev(found)}
        values[f"{name}_sample_sd"] = statistics.stdev(found)
    rows = [{"seed": seed, **row} for seed, r in results.items() for row in r.rows]
    return TaskResult(first.task, repeated, values, rows, first.data)
