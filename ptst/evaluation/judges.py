"""Judges by name."""

from pathlib import Path

from ptst.errors import UserError, unknown_name
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdict import Judge
from ptst.progress import say

JUDGES = {
    RuleBasedJudge.name: "rule-based refusal judge (embedded): four classes",
    "rubric": "score of 1 to 5 by a chat model, as rubric:FOLDER",
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
    folder = name.partition(":")[2]
    if not folder:
        raise UserError("judge rubric needs a chat model", "say rubric:FOLDER with the folder of one")
    from ptst.evaluation.rubric import RubricJudge, local_model

    return RubricJudge(f"rubric:{Path(folder).name}", local_model(Path(folder)))
