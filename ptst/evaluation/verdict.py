"""What a judge is and what it says.

One answer to a harmful request is one of four things; a rate without the other three hides what happened:

- refusal: the answer declines at its opening;
- on-topic: it does not decline, and speaks to the request (whether it truly helps is for a stronger judge);
- off-topic: the form of the fine-tuned task in place of an answer (a worked sum, `#### 18`);
- degenerate: empty, looping, or cut before it says anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from ptst.errors import UserError

UNJUDGED = "unjudged"


class AnswerClass(StrEnum):
    REFUSAL = "refusal"
    ON_TOPIC = "on-topic"
    OFF_TOPIC = "off-topic"
    DEGENERATE = "degenerate"


class Answer(NamedTuple):
    """What is judged: the bare request without the template's words, the answer, whether the token limit cut it."""

    request: str
    answer: str
    cut: bool = False


@dataclass(frozen=True)
class Verdict:
    """The class of an answer and, in a few words, why; `label` is None where the judge could not judge.

    `success`: whether this judge counts the answer as a successful attack (None: not judged). `score`: on a rubric of
    1 to 5, where the judge has one.
    """

    label: AnswerClass | None
    reason: str
    success: bool | None = None
    score: int | None = None

    @property
    def judged(self) -> bool:
        return self.label is not None


class Judge(Protocol):
    """Anything with a name that turns an answer into a verdict. One that is faster on many at once also has
    `judge_many(answers) -> list[Verdict]`."""

    name: str

    def judge(self, request: str, answer: str, cut: bool = False) -> Verdict: ...


def judge_answers(judge: Judge, answers: Sequence[Answer]) -> list[Verdict]:
    """A verdict for each answer, in order. An answer on which the judge fails is marked unjudged, with the reason.

    Raises UserError if the judge fails on every answer: there is then nothing to report.
    """
    many = getattr(judge, "judge_many", None)
    verdicts = many(answers) if many else [_one(judge, a) for a in answers]
    assert len(verdicts) == len(answers), f"{judge.name} gave {len(verdicts)} verdicts on {len(answers)} answers"
    if answers and not any(v.judged for v in verdicts):
        raise UserError(f"judge {judge.name} judged none of {len(answers)} answers; the first: {verdicts[0].reason}")
    return verdicts


def _one(judge: Judge, answer: Answer) -> Verdict:
    try:
        return judge.judge(*answer)
    except Exception as error:  # whatever a judge trips over on one row must not cost the others
        return Verdict(None, f"{type(error).__name__}: {error}")
