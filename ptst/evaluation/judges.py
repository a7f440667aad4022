"""Judges by name."""

from collections.abc import Sequence
from pathlib import Path

from ptst.errors import UserError, unknown_name
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdicts import Answered, Judge, Verdict
from ptst.generation.request import Answer

JUDGES = {
    RuleBasedJudge.name: "by form, wording and topic (embedded)",
    "rubric": "score of 1 to 5 by a chat model, as rubric:FOLDER",
}
_GONE = ("anchored-v2", "rules-v2")


def judge_kind(name: str) -> str:
    """The key of JUDGES. Raises UserError, with the list and the nearest, for an unknown name; and for
    a version that is gone."""
    if name in _GONE:
        cause = f"this version has no judge {name} any more"
        raise UserError(cause, f"{RuleBasedJudge.name} judges stored answers anew: ptst judge FOLDER")
    kind = name.partition(":")[0]
    if kind not in JUDGES:
        raise unknown_name("judge", kind, JUDGES)
    return kind


def find_judge(name: str) -> Judge:
    """The judge `rules-v3`, or `rubric:FOLDER` with the folder of a local chat model.

    Raises UserError for an unknown name, and for a folder without a model.
    """
    if judge_kind(name) == RuleBasedJudge.name:
        from ptst.evaluation.relevance import Relevance

        return RuleBasedJudge(Relevance())
    folder = name.partition(":")[2]
    if not folder:
        raise UserError("judge rubric needs a chat model", "say rubric:FOLDER with the folder of one")
    from ptst.evaluation.rubric import RubricJudge, local_model

    return RubricJudge(f"rubric:{Path(folder).name}", local_model(Path(folder)))


def judge_answers(judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
    """A verdict for each (request, answer), in order. An answer on which the judge fails is marked unjudged, with the
    reason. Raises UserError if the judge fails on every answer."""
    many = getattr(judge, "judge_many", None)
    verdicts = many(answered) if many else [_judge_one(judge, *pair) for pair in answered]
    assert len(verdicts) == len(answered), f"{judge.name} gave {len(verdicts)} verdicts on {len(answered)} answers"
    if answered and not any(v.judged for v in verdicts):
        raise UserError(f"judge {judge.name} judged none of {len(answered)} answers; the first: {verdicts[0].reason}")
    return verdicts


def _judge_one(judge: Judge, request: str, answer: Answer) -> Verdict:
    try:
        return judge.judge(request, answer)
    except Exception as error:  # one answer on which a judge fails must not cost the others
        return Verdict(None, f"{type(error).__name__}: {error}")
