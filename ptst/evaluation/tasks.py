"""The tasks: prompts in, judged answers out. Every prompt goes through the template under test, the improper ones too.

- `gsm8k`: worked problems, exact match by the paper's last-number rule and by GSM8K's strict `#### N`;
- `safety`: improper requests, one of four classes each;
- `over-refusal`: harmless look-alikes, the share that is refused;
- `nll`: likelihood of the problems' reference answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptst.data.safety_sets import SafetyPrompt
from ptst.evaluation.extraction import gold_number, last_number, strict_answer
from ptst.evaluation.rates import Rate
from ptst.evaluation.verdict import UNJUDGED, Answer, AnswerClass, Judge, judge_answers
from ptst.generation.sampler import Completion, Sampling, generate
from ptst.generation.score import score
from ptst.model.decoder import Decoder
from ptst.text.encode import Prompting
from ptst.text.segments import Conversation, Message

TASKS = ("gsm8k", "safety", "over-refusal", "nll")


@dataclass(frozen=True)
class TaskResult:
    """Rates and values by name, and one row per answer (for the run folder, never for the report)."""

    task: str
    rates: dict[str, Rate] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**{k: r.to_json() for k, r in self.rates.items()}, **self.values}


@dataclass(frozen=True)
class Answerer:
    """A model under a template: answers conversations. `on_done(n)` hears of every finished answer."""

    decoder: Decoder
    prompting: Prompting
    stop_ids: frozenset[int]
    batch_size: int
    on_done: Callable[[int, int], None] = lambda _done, _tokens: None

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[tuple[str, Completion]]:
        """(text, completion) for each conversation, in order."""
        prompts = [self.prompting.encode(c.prompt()).ids for c in conversations]
        done = tokens = 0

        def count(_index: int, completion: Completion) -> None:
            nonlocal done, tokens
            done, tokens = done + 1, tokens + len(completion.ids)
            self.on_done(done, tokens)

        completions = generate(self.decoder, prompts, self.stop_ids, sampling, self.batch_size, count)
        decode = self.prompting.tokenizer.decode_answer
        return [(decode(p, c.ids), c) for p, c in zip(prompts, completions, strict=True)]


def gsm8k(answerer: Answerer, problems: Sequence[Conversation], sampling: Sampling) -> TaskResult:
    """Exact match of worked problems. Raises ValueError for a reference answer without `#### N`."""
    gold = [gold_number(c.messages[-1].content, c.source) for c in problems]
    answers = answerer.answer(problems, sampling)
    rows = [
        {
            "source": c.source,
            "question": c.turns[0].content,
            "answer": text,
            "gold": str(g),
            "last_number": last_number(text) == g,
            "strict": strict_answer(text) == g,
            "cut": completion.cut,
        }
        for c, g, (text, completion) in zip(problems, gold, answers, strict=True)
    ]
    rates = {rule: Rate(sum(r[rule] for r in rows), len(rows)) for rule in ("last_number", "strict")}
    return TaskResult("gsm8k", {**rates, "cut": Rate(sum(r["cut"] for r in rows), len(rows))}, rows=rows)


def requests(
    task: str, answerer: Answerer, prompts: Sequence[SafetyPrompt], sampling: Sampling, judge: Judge
) -> TaskResult:
    """The four classes over improper requests (`safety`) or harmless look-alikes (`over-refusal`). Rates are over the
    judged answers; the value `unjudged` counts the others. Raises ValueError for no prompts, and if the judge fails
    on every answer."""
    if not prompts:
        raise ValueError(f"task {task} has no prompts")
    answers = answerer.answer([Conversation((Message("user", p.prompt),), p.id) for p in prompts], sampling)
    given = [Answer(p.prompt, text, c.cut) for p, (text, c) in zip(prompts, answers, strict=True)]
    verdicts = judge_answers(judge, given)
    rows = []
    for prompt, answer, verdict in zip(prompts, given, verdicts, strict=True):
        row = {"id": prompt.id, "category": prompt.category, "family": prompt.family, "prompt": prompt.prompt}
        row |= {"answer": answer.answer, "class": verdict.label or UNJUDGED, "reason": verdict.reason}
        row |= {"success": verdict.success, "score": verdict.score, "cut": answer.cut}
        rows.append({**row, "judge": judge.name})
    counts = Counter(v.label for v in verdicts)
    judged = len(verdicts) - counts[None]
    rates = {c.value: Rate(counts[c], judged) for c in AnswerClass}
    if task == "safety":
        rates["attack-success"] = Rate(sum(bool(v.success) for v in verdicts), judged)
    return TaskResult(task, rates, {"unjudged": counts[None]}, rows)


def nll(answerer: Answerer, problems: Sequence[Conversation]) -> TaskResult:
    """Mean negative log-likelihood (nats per token) of the reference answers under the test template."""
    encoded = [answerer.prompting.encode(c) for c in problems]
    scored = score(answerer.decoder, encoded)
    rows = [{"source": c.source, "nll": total, "tokens": n} for c, (total, n) in zip(problems, scored, strict=True)]
    mean = sum(t for t, _ in scored) / sum(n for _, n in scored)
    return TaskResult("nll", values={"nats_per_token": mean, "answers": len(rows)}, rows=rows)
