"""Conversations with reference answers: exact match (`gsm8k`), likelihood (`nll`), similarity (`chatdoctor`)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ptst.data import sources
from ptst.errors import Setting, UserError
from ptst.evaluation.extraction import gold_number, last_number, strict_answer
from ptst.evaluation.tasks.task import Defaults, Metric, Prompt, Task, TaskData, TaskResult, Tools, flags, rates
from ptst.generation.request import Answer
from ptst.text.segments import Conversation


def has_test_part(defaults: Defaults) -> bool:
    """Whether there are problems that were not trained on."""
    return bool(defaults.data) or sources.has_test_part(defaults.problems, defaults.holdout)


def load_source(data: str | None, defaults: Defaults, limit: int | None) -> sources.Source:
    """The test part of `data`, or of the default problems."""
    own = data or defaults.data
    rules = defaults.rules if own else defaults.problem_rules or defaults.rules
    name, holdout = own or defaults.problems, 0.0 if own else defaults.holdout
    return sources.load(name, "test", limit, holdout=holdout, rules=rules)


def _note(source: sources.Source) -> str:
    return f"{source.name}: {source.note}" if source.note else ""


def _check_answered(source: sources.Source) -> None:
    if bare := next((c for c in source.conversations if not c.answered), None):
        raise UserError("the conversation ends without a reference answer to compare with", where=bare.source)


def load_problems(data: str | None, defaults: Defaults) -> TaskData:
    """Conversations with a reference answer. Raises UserError for one without, and for data without a test part."""
    if not data and not has_test_part(defaults):
        raise UserError(
            f"gsm8k and nll would be measured on the training data: {defaults.problems} has no test part",
            ("set ", Setting("data"), " to other problems, or leave these tasks out of ", Setting("tasks")),
        )
    count = (data or "").partition(":")[2]  # of the task's own data, not of the training data
    limits = [n for n in (defaults.limit, int(count) if count.isdigit() else None) if n is not None]
    source = load_source(data, defaults, min(limits, default=None))
    _check_answered(source)
    new = 96 if source.name.startswith(sources.DEFAULT) else 400
    return TaskData(Path(source.name).stem, source.conversations, source.fingerprint, new, source.family, _note(source))


def _load_worked(data: str | None, defaults: Defaults) -> TaskData:
    loaded = load_problems(data, defaults)
    for c in loaded.items:
        gold_number(c.messages[-1].content, c.source)
    return loaded


def _prompts(problems: Sequence[Conversation]) -> list[Prompt]:
    return [Prompt(c) for c in problems]


def _score(problems: Sequence[Conversation], answers: Sequence[Answer], _tools: Tools) -> TaskResult:
    """Exact match. Raises UserError for a reference answer without `#### N`."""
    rows = []
    for c, answer in zip(problems, answers, strict=True):
        gold = gold_number(c.messages[-1].content, c.source)
        row: dict[str, Any] = {"source": c.source, "question": c.turns[0].content, "answer": answer.text}
        row["gold"] = str(gold)
        row |= {"last_number": last_number(answer.text) == gold, "strict": strict_answer(answer.text) == gold}
        rows.append({**row, "cut": answer.truncated})
    return TaskResult("gsm8k", rates(rows, flags), rows=rows)


CUT = Metric("cut", "Answers truncated at the token limit", tables=())
GSM8K = Task(
    "gsm8k",
    _load_worked,
    _prompts,
    _score,
    (
        Metric("last_number", "Problems solved, last number"),
        Metric("strict", "Problems solved, strict ####"),
        CUT,
    ),
)


def _score_likelihood(problems: Sequence[Conversation], answers: Sequence[Answer], _tools: Tools) -> TaskResult:
    """Mean negative log-likelihood of the reference answers under the test template, in nats per token."""
    scored = [(-sum(answer.logprobs or ()), len(answer.token_ids)) for answer in answers]
    rows = [{"source": c.source, "nll": total, "tokens": n} for c, (total, n) in zip(problems, scored, strict=True)]
    mean = sum(total for total, _ in scored) / sum(n for _, n in scored)
    return TaskResult("nll", values={"nats_per_token": mean, "answers": len(rows)}, rows=rows)


NLL = Task(
    "nll",
    load_problems,
    lambda problems: [Prompt(c, "loglikelihood") for c in problems],
    _score_likelihood,
    (
        Metric("nats_per_token", "Negative log-likelihood of reference answers", "nats per token"),
        Metric("answers", "Reference answers", "count", tables=()),
    ),
)


def _load_chatdoctor(data: str | None, defaults: Defaults) -> TaskData:
    source = sources.load(data or defaults.data or "chatdoctor", "test", defaults.limit, rules=defaults.rules)
    _check_answered(source)
    name = Path(source.name).stem
    return TaskData(name, source.conversations, source.fingerprint, 256, "chatdoctor", _note(source))


def _score_similarity(problems: Sequence[Conversation], answers: Sequence[Answer], tools: Tools) -> TaskResult:
    similarity = tools.similarity
    assert similarity is not None, "a task that uses a similarity gets one"
    values = similarity.compare([a.text for a in answers], [c.messages[-1].content for c in problems])
    rows = []
    for c, answer, value in zip(problems, answers, values, strict=True):
        row: dict[str, Any] = {"source": c.source, "question": c.turns[-2].content, "reference": c.messages[-1].content}
        rows.append({**row, "answer": answer.text, similarity.name: value, "cut": answer.truncated})
    return TaskResult("chatdoctor", rates(rows, flags), {similarity.name: fmean(values)}, rows)


CHATDOCTOR = Task(
    "chatdoctor",
    _load_chatdoctor,
    _prompts,
    _score_similarity,
    (
        Metric("minilm_cosine", "ChatDoctor: MiniLM similarity to the reference", "cosine"),
        Metric("bertscore_f1", "ChatDoctor: BERTScore similarity to the reference", "F1"),
        CUT,
    ),
    uses_similarity=True,
)
