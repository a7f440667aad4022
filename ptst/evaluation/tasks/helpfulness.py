"""Tasks with a reference answer: GSM8K, ARC, ChatDoctor, and the likelihood of the answers.

Here and below, the file `answers` keeps the model's answers as they come (ptst/evaluation/answers.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptst.data.arc import ArcQuestion
from ptst.errors import UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.extraction import chosen_choice, gold_number, last_number, plain, printed_choice, strict_answer
from ptst.evaluation.rates import Rate
from ptst.evaluation.similarity import Similarity
from ptst.evaluation.tasks.result import TaskResult
from ptst.generation.request import Sampling
from ptst.generation.score import score
from ptst.text.segments import Conversation, Message
from ptst.text.templates import arc_question, find_family


def gsm8k(
    answerer: Answerer, problems: Sequence[Conversation], sampling: Sampling, answers: Path | None = None
) -> TaskResult:
    """Exact match of worked problems. Raises UserError for a reference answer without `#### N`."""
    gold = [gold_number(c.messages[-1].content, c.source) for c in problems]
    replies = answerer.answer(problems, sampling, answers)
    rows = [
        {
            "source": c.source,
            "question": c.turns[0].content,
            "answer": reply.text,
            "gold": str(g),
            "last_number": last_number(reply.text) == g,
            "strict": strict_answer(reply.text) == g,
            "cut": reply.cut,
        }
        for c, g, reply in zip(problems, gold, replies, strict=True)
    ]
    return TaskResult("gsm8k", _rates(rows, "last_number", "strict", "cut"), rows=rows)


def arc(
    task: str, answerer: Answerer, questions: Sequence[ArcQuestion], sampling: Sampling, answers: Path | None = None
) -> TaskResult:
    """Exact match of ARC's questions, answered freely (Lyu et al. 2024, appendix F.5). The wording is the task's own,
    so the template's family is `plain`. `correct`: the choice that the answer names is the right one; `printed`: by
    the paper's regular expression to the letter; `named`: the answer names any choice."""
    answerer = replace(answerer, prompt_format=replace(answerer.prompt_format, family=find_family("plain")))
    asked = [Conversation((Message("user", arc_question(q.question, q.choices)),), q.source) for q in questions]
    rows = []
    for question, reply in zip(questions, answerer.answer(asked, sampling, answers), strict=True):
        chosen, gold = chosen_choice(reply.text, question.choices), question.choices[question.gold]
        row = {"source": question.source, "question": question.question, "choices": question.choices, "gold": gold}
        row |= {"answer": reply.text, "chosen": None if chosen is None else question.choices[chosen]}
        row |= {"correct": chosen == question.gold, "printed": printed_choice(reply.text) == plain(gold)}
        rows.append({**row, "named": chosen is not None, "cut": reply.cut})
    return TaskResult(task, _rates(rows, "correct", "printed", "named", "cut"), rows=rows)


def chatdoctor(
    answerer: Answerer,
    problems: Sequence[Conversation],
    sampling: Sampling,
    answers: Path | None,
    similarity: Similarity,
) -> TaskResult:
    """Mean similarity of the answers to the reference answers. Raises UserError for a conversation without one."""
    if bare := next((c for c in problems if not c.answered), None):
        raise UserError(f"{bare.where}the conversation ends without a reference answer to compare with")
    replies = answerer.answer(problems, sampling, answers)
    likeness = similarity.compare([r.text for r in replies], [c.messages[-1].content for c in problems])
    rows = [
        {
            "source": c.source,
            "question": c.turns[-2].content,
            "reference": c.messages[-1].content,
            "answer": reply.text,
            similarity.name: value,
            "cut": reply.cut,
        }
        for c, reply, value in zip(problems, replies, likeness, strict=True)
    ]
    return TaskResult("chatdoctor", _rates(rows, "cut"), {similarity.name: statistics.fmean(likeness)}, rows)


def nll(answerer: Answerer, problems: Sequence[Conversation]) -> TaskResult:
    """Mean negative log-likelihood (nats per token) of the reference answers under the test template."""
    encoded = [answerer.prompt_format.encode(c) for c in problems]
    longest = answerer.decoder.config.max_positions
    for c, e in zip(problems, encoded, strict=True):
        if not any(e.loss_mask):
            raise UserError(f"{c.where}there is no reference answer, whose likelihood is asked for")
        if len(e.ids) > longest:
            raise UserError(f"{c.where}{len(e.ids)} tokens exceed the model's {longest} positions; leave it out")
    scored = score(answerer.decoder, encoded, answerer.chosen)
    rows = [{"source": c.source, "nll": total, "tokens": n} for c, (total, n) in zip(problems, scored, strict=True)]
    mean = sum(t for t, _ in scored) / sum(n for _, n in scored)
    return TaskResult("nll", values={"nats_per_token": mean, "answers": len(rows)}, rows=rows)


def _rates(rows: Sequence[dict], *names: str) -> dict[str, Rate]:
    return {name: Rate(sum(row[name] for row in rows), len(rows)) for name in names}
