"""Judges by name."""

from collections.abc import Sequence
from pathlib import Path

from ptst.errors import UserError, unknown_name
from ptst.evaluation.keywords import KEYWORD_JUDGES
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdicts import Answered, Judge, Verdict
from ptst.generation.request import Answer
from ptst.progress import say

JUDGES = {
    RuleBasedJudge.name: "rule-based refusal judge (embedded)",
    "rubric": "score of 1 to 5 by a chat model, as rubric:FOLDER",
    **{name: f"the phrases of {judge.source.partition(',')[0]}" for name, judge in KEYWORD_JUDGES.items()},
}
_OLD_NAMES = {"anchored-v2": RuleBasedJudge.name}  # for one version


def judge_kind(name: str) -> str:
    """The key of JUDGES. Raises UserError, with the list and the nearest, for an unknown name."""
    kind = _OLD_NAMES.get(name, name).partition(":")[0]
    if kind not in JUDGES:
        raise unknown_name("judge", kind, JUDGES)
    return kind


def find_judge(name: str) -> Judge:
    """The judge `rules-v2`, or `rubric:FOLDER` with the folder of a local chat model.

    Raises UserError for an unknown name, and for a folder without a model.
    """
    if name in _OLD_NAMES:
        say(f"note: judge {name} is now {_OLD_NAMES[name]}")
    if judge_kind(name) == RuleBasedJudge.name:
        return RuleBasedJudge()
    if name in KEYWORD_JUDGES:
        return KEYWORD_JUDGES[name]
    folder = name.partition(":")[2]
    if not folder:
        raise UserError("judge rubric needs a chat model", "say rubric:FOLDER with the folder of one")
    from ptst.evaluation.rubric import RubricJudge, local_model

    return RubricJudge(f"rubric:{Path(folder).name}", local_model(Path(folder)))


def find_judges(names: Sequence[str]) -> list[Judge]:
    """Several judges. Raises UserError as `find_judge`."""
    return [find_judge(name) for name in names]


def judge_answers(judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
    """A verdict for each (request, answer), in order. An answer on which the judge fails is marked unjudged, with the
    reason. Raises UserError if the judge fails on every answer."""
    verdicts = judge_each(judge, answered)
    if answered and not any(v.judged for v in verdicts):
        raise none_judged(judge.name, len(answered), verdicts[0].reason)
    return verdicts


def judge_each(judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
    """The same for a part of the answers, of which all may be unjudged."""
    many = getattr(judge, "judge_many", None)
    verdicts = many(answered) if many else [_judge_one(judge, *pair) for pair in answered]
    assert len(verdicts) == len(answered), f"{judge.name} gave {len(verdicts)} verdicts on {len(answered)} answers"
    return verdicts


def none_judged(name: str, answers: int, reason: str) -> UserError:
    return UserError(f"judge {name} judged none of {answers} answers; the first: {reason}")


def _judge_one(judge: Judge, request: str, answer: Answer) -> Verdict:
    try:
        return judge.judge(request, answer)
    except Exception as error:  # one answer on which a judge fails must not cost the others
        return Verdict(None, f"{type(error).__name__}: {error}")
