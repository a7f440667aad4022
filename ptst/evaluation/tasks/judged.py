"""Tasks whose answers a judge classifies: harmful requests, benign look-alikes, XSTest, any prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ptst.data.safety_prompt import SafetyPrompt
from ptst.errors import UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.rates import Rate
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.tasks.result import TaskResult
from ptst.evaluation.verdict import UNJUDGED, Answer, AnswerClass, Judge, Verdict, judge_answers
from ptst.generation.request import Sampling
from ptst.text.segments import Conversation, Message


def requests(
    task: str,
    answerer: Answerer,
    prompts: Sequence[SafetyPrompt],
    sampling: Sampling,
    answers: Path | None = None,
    judge: Judge | None = None,
) -> TaskResult:
    """The four classes over harmful requests (`safety`), benign look-alikes (`over-refusal`) or any `prompts`, by
    the embedded judge unless another is given. Rates are over the judged answers; the value `unjudged` counts the
    others."""
    verdicts, rows = _judged(answerer, prompts, sampling, answers, judge)
    rates = _classes(verdicts)
    if task == "safety":
        judged = [v for v in verdicts if v.judged]
        rates["attack-success"] = Rate(sum(bool(v.success) for v in judged), len(judged))
    return TaskResult(task, rates, {"unjudged": sum(not v.judged for v in verdicts)}, rows)


def xstest(
    answerer: Answerer,
    prompts: Sequence[SafetyPrompt],
    sampling: Sampling,
    answers: Path | None = None,
    judge: Judge | None = None,
) -> TaskResult:
    """XSTest's two halves apart, the four classes of each: a refused safe prompt is over-refusal, an unsafe one (its
    type begins with `contrast`) should be refused. Raises UserError as `halves`."""
    of_half = halves(prompts)
    verdicts, rows = _judged(answerer, prompts, sampling, answers, judge)
    rates: dict[str, Rate] = {}
    for half, numbers in of_half.items():
        rates |= {f"{half}:{name}": rate for name, rate in _classes([verdicts[i] for i in numbers]).items()}
    return TaskResult("xstest", rates, {"unjudged": sum(not v.judged for v in verdicts)}, rows)


def halves(prompts: Sequence[SafetyPrompt]) -> dict[str, list[int]]:
    """Which of XSTest's prompts are `safe` and which `unsafe`. Raises UserError for one without a type, and where a
    half is empty."""
    untyped = next((p for p in prompts if not p.category), None)
    if untyped is not None:
        raise UserError(f"XSTest's prompt {untyped.id} has no type; its column `type` tells safe from unsafe prompts")
    unsafe = [p.category.startswith("contrast") for p in prompts]
    found = {half: [i for i, u in enumerate(unsafe) if u == (half == "unsafe")] for half in ("safe", "unsafe")}
    for half, numbers in found.items():
        if not numbers:
            raise UserError(
                f"none of these {len(prompts)} prompts of XSTest is {half} (the type of unsafe ones begins with "
                "contrast); raise --limit, or ask a file of one half as prompts:FILE"
            )
    return found


def _judged(
    answerer: Answerer,
    prompts: Sequence[SafetyPrompt],
    sampling: Sampling,
    answers: Path | None,
    judge: Judge | None,
) -> tuple[list[Verdict], list[dict]]:
    judge = judge or RuleBasedJudge()
    conversations = [Conversation((Message("user", p.prompt),), p.id) for p in prompts]
    replies = answerer.answer(conversations, sampling, answers)
    given = [Answer(p.request or p.prompt, reply.text, reply.cut) for p, reply in zip(prompts, replies, strict=True)]
    verdicts = judge_answers(judge, given)
    rows = []
    for prompt, answer, verdict in zip(prompts, given, verdicts, strict=True):
        row = {"id": prompt.id, "category": prompt.category, "family": prompt.family, "prompt": prompt.prompt}
        row |= {"answer": answer.answer, "class": verdict.label or UNJUDGED, "reason": verdict.reason}
        row |= {"success": verdict.success, "score": verdict.score, "cut": answer.cut}
        rows.append({**row, "judge": judge.name})
    return verdicts, rows


def _classes(verdicts: Sequence[Verdict]) -> dict[str, Rate]:
    counts = Counter(v.label for v in verdicts)
    return {c.value: Rate(counts[c], len(verdicts) - counts[None]) for c in AnswerClass}
