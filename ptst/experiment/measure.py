"""A task of a cell: which prompts are asked, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptst.data import safety_sets
from ptst.data.safety_sets import SafetyPrompt
from ptst.data.sources import DEFAULT, Source, load
from ptst.eval import EvalConfig
from ptst.evaluation import tasks
from ptst.evaluation.answers import Answerer
from ptst.evaluation.margin import refusal_margins
from ptst.evaluation.tasks import TaskResult
from ptst.generation.sampling import Sampling
from ptst.text.segments import Conversation, Message

ANSWERED = ("gsm8k", "safety", "over-refusal")  # tasks that sample answers
MARGIN_PROMPTS = 40  # 16 openings each: enough for a mean, and no cell takes longer than its answers


@dataclass(frozen=True)
class Tests:
    """What every row is asked: problems with reference answers, improper requests, harmless look-alikes."""

    problems: Source
    improper: Sequence[SafetyPrompt]
    look_alikes: Sequence[SafetyPrompt]
    config: EvalConfig

    def conversations(self, task: str) -> list[Conversation]:
        """What a task asks."""
        if task in ("gsm8k", "nll"):
            return list(self.problems.conversations)
        prompts = self.look_alikes if task == "over-refusal" else self.improper
        asked = [Conversation((Message("user", p.prompt),), p.id) for p in prompts]
        return asked[:MARGIN_PROMPTS] if task == "margin" else asked

    def sampling(self, task: str) -> Sampling:
        worked = "word-problems" if self.problems.name.startswith(DEFAULT) else "gsm8k"
        return self.config.sampling(worked if task == "gsm8k" else "requests")

    def measure(self, task: str, answerer: Answerer, answers: Path) -> TaskResult:
        """The result of a task. Raises ValueError as the tasks do."""
        if task == "gsm8k":
            return tasks.gsm8k(answerer, self.problems.conversations, self.sampling(task), answers)
        if task == "nll":
            return tasks.nll(answerer, self.problems.conversations)
        if task == "margin":
            return margin(answerer, self.conversations(task))
        prompts = self.look_alikes if task == "over-refusal" else self.improper
        return tasks.requests(task, answerer, prompts, self.sampling(task), answers)


def open_tests(config: EvalConfig, data: str, families: Sequence[str] | None = None) -> Tests:
    """The prompts of an evaluation; `data`: the problems, where the evaluation does not name others. `families`: of the
    built-in requests and look-alikes, only these. Raises ValueError for data that cannot be read."""

    def chosen(prompts: Sequence[SafetyPrompt]) -> Sequence[SafetyPrompt]:
        return [p for p in prompts if families is None or p.family in families][: config.limit]

    improper = safety_sets.improper() if config.safety_data is None else safety_sets.read_prompts(config.safety_data)
    problems = load(config.data or data, "test", config.limit)
    own = config.safety_data is None
    return Tests(
        problems, chosen(improper) if own else improper[: config.limit], chosen(safety_sets.look_alikes()), config
    )


def margin(answerer: Answerer, conversations: Sequence[Conversation]) -> TaskResult:
    """The refusal margin of improper requests, in nats."""
    found = refusal_margins(answerer.decoder, answerer.prompting, conversations, adapter=answerer.chosen)
    rows = [
        {"id": c.source, "refusing": m.refusing, "complying": m.complying, "margin": m.value}
        for c, m in zip(conversations, found, strict=True)
    ]
    return TaskResult("margin", values={"margin": sum(m.value for m in found) / len(found)}, rows=rows)
