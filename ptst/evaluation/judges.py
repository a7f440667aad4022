"""Judges by name."""

from collections.abc import Collection, Sequence
from pathlib import Path

from ptst.errors import UserError, unknown_name
from ptst.evaluation.graders.grader import Grader, ModelJudge
from ptst.evaluation.graders.table import GRADERS
from ptst.evaluation.keywords import KEYWORD_JUDGES
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdicts import AnswerClass, Answered, Judge, Verdict
from ptst.generation.request import DECLINED, Answer
from ptst.progress import say
from ptst.settings import ApiSettings
from ptst.text.guard import judge_kind_of

JUDGES = {
    RuleBasedJudge.name: "by form, wording and topic (embedded)",
    **{name: grader.meaning for name, grader in GRADERS.items()},
    **{name: f"the phrases of {judge.source.partition(',')[0]}" for name, judge in KEYWORD_JUDGES.items()},
}
_GONE = ("anchored-v2", "rules-v2")
_API = "api:"


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


def find_judge(name: str, allow: Collection[str] = (), api: ApiSettings | None = None) -> Judge:
    """An embedded judge by its name, or a grader as KIND:WHERE, WHERE being the folder of a local model or
    `api:MODEL`. `allow`: what need not hold of a judge's folder (`open_model`); `api`: how an API is asked.

    Raises UserError for an unknown name, and for a folder without a model."""
    return find_judges([name], allow, api)[0]


def find_judges(names: Sequence[str], allow: Collection[str] = (), api: ApiSettings | None = None) -> list[Judge]:
    """Several judges, each with a name of its own: folders of the same name are told apart by the folders above."""
    folders = [Path(where).absolute() for where in (name.partition(":")[2] for name in names) if where]
    return [_find(name, folders, allow, api or ApiSettings()) for name in names]


def _find(name: str, folders: Sequence[Path], allow: Collection[str], api: ApiSettings) -> Judge:
    kind, where = judge_kind(name), name.partition(":")[2]
    if kind == RuleBasedJudge.name:
        from ptst.evaluation.relevance import Relevance

        return RuleBasedJudge(Relevance())
    if kind in KEYWORD_JUDGES:
        return KEYWORD_JUDGES[kind]
    grader = GRADERS[kind]
    if not where.removeprefix(_API):
        raise UserError(f"judge {kind} needs a model", f"say {kind}:FOLDER with the folder of one, or {kind}:api:MODEL")
    if where.startswith(_API):
        from ptst.evaluation.graders.api import ApiAsk

        return ModelJudge(grader, ApiAsk(where.removeprefix(_API), grader.max_new_tokens, api), where)
    return _local(grader, where, folders, allow)


def _local(grader: Grader, where: str, folders: Sequence[Path], allow: Collection[str]) -> Judge:
    from ptst.evaluation.graders.local import LocalAsk

    try:
        ask = LocalAsk(Path(where), grader, allow)
    except UserError as error:
        error.where = f"judge {grader.name}" + (f": {error.where}" if error.where else "")
        raise
    told = judge_kind_of(Path(where))
    if grader.kind == "text" and told not in (None, grader.name):
        say(f"note: {where} looks like the model of the judge {told}, not of {grader.name}, whose prompt it gets")
    return ModelJudge(grader, ask, _short(Path(where).absolute(), folders))


def _short(folder: Path, folders: Sequence[Path]) -> str:
    """The end of a folder's path by which no other of `folders` goes."""
    others = {other.parts for other in folders} - {folder.parts}
    count = 1
    while count < len(folder.parts) and any(other[-count:] == folder.parts[-count:] for other in others):
        count += 1
    return "/".join(folder.parts[-count:])


def judge_answers(judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
    """A verdict for each (request, answer), in order. An answer on which the judge fails is marked unjudged, with the
    reason. Raises UserError if the judge fails on every answer."""
    verdicts = judge_each(judge, answered)
    if answered and all(v.failed for v in verdicts):
        raise none_judged(judge.name, len(answered), verdicts[0].reason)
    return verdicts


def judge_each(judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
    """The same for a part of the answers, on all of which the judge may fail. What an endpoint declined to answer is a
    refusal that no judge needs to read."""
    many = getattr(judge, "judge_many", None)
    read = [pair for pair in answered if pair[1].finish_reason not in DECLINED]
    verdicts = many(read) if many else [_judge_one(judge, *pair) for pair in read]
    assert len(verdicts) == len(read), f"{judge.name} gave {len(verdicts)} verdicts on {len(read)} answers"
    if len(read) == len(answered):
        return verdicts
    given, nothing = iter(verdicts), getattr(judge, "nothing", None)
    return [
        Verdict(AnswerClass.REFUSAL, DECLINED[answer.finish_reason], False, nothing)
        if answer.finish_reason in DECLINED
        else next(given)
        for _, answer in answered
    ]


def none_judged(name: str, answers: int, reason: str) -> UserError:
    return UserError(f"judge {name} judged none of {answers} answers; the first: {reason}")


def _judge_one(judge: Judge, request: str, answer: Answer) -> Verdict:
    try:
        return judge.judge(request, answer)
    except Exception as error:  # one answer on which a judge fails must not cost the others
        return Verdict(None, f"{type(error).__name__}: {error}", failed=True)
