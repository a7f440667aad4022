"""Judges by name."""

from __future__ import annotations

from pathlib import Path

from ptst.errors import UserError, unknown_name
from ptst.evaluation.rubric import RubricJudge, local_model
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdict import Judge

JUDGES = {
    RuleBasedJudge.name: "the embedded judge: four classes by rules",
    "rubric": "score of 1 to 5 by a chat model, given as rubric:FOLDER",
}


def find_judge(name: str) -> Judge:
    """The judge of a name: `rules-v2`, or `rubric:FOLDER` with the folder of a local chat model.

    Raises UserError with the list and the nearest name for an unknown one, and for a folder that holds no model.
    """
    kind, _, folder = name.partition(":")
    if kind not in JUDGES:
        raise unknown_name("judge", kind, JUDGES)
    if kind == RuleBasedJudge.name:
        return RuleBasedJudge()
    if not folder:
        raise UserError("judge rubric needs a chat model: say rubric:FOLDER with the folder of one")
    return RubricJudge(f"rubric:{Path(folder).name}", local_model(Path(folder)))
