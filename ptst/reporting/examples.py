"""Examples of answers to harmful requests: refusals are shown, all others are counted, unless they are asked for."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptst.evaluation.judge_report import Judged, may_be_shown
from ptst.evaluation.tasks.table import base
from ptst.evaluation.verdicts import UNJUDGED, Verdict

PER_CELL = 2
LENGTH = 320  # characters of an answer, and of a request
OF_HARM = ("safety", "xstest")


@dataclass(frozen=True)
class Example:
    """`verdicts`: judge and class, in words; `refusal`: whether it may be shown without being asked for."""

    id: str
    request: str
    answer: str
    verdicts: str
    refusal: bool


@dataclass(frozen=True)
class CellExamples:
    """The answers of a model under a test template to a task. `counts`: of every class by the judge of the figures, and
    `hidden`: how many are no refusals and therefore not shown."""

    name: str
    task: str
    counts: dict[str, int]
    hidden: int
    examples: Sequence[Example]


def examples(judged: Judged, judge: str, show_answers: bool, prefix: str = "") -> Iterator[CellExamples]:
    """Of every model and task of harmful requests. `prefix`: in front of the names of models."""
    own = judge if judge in judged.verdicts else next(iter(judged.verdicts), None)
    for (model, task), numbers in judged.groups.items():
        if base(task.partition(" (")[0].partition(",")[0]) not in OF_HARM or task.endswith("(safe)"):
            continue
        given = [judged.verdicts[own][i] if own else None for i in numbers]
        counts = Counter(_class(v) for v in given)
        kinds: dict[bool, list[Example]] = {True: [], False: []}
        hidden = 0
        for i in numbers:
            by_judge = {j: v for j in judged.judges if (v := judged.verdicts[j][i]) is not None and v.judged}
            shown = may_be_shown(list(by_judge.values()))
            hidden += not shown
            if len(kinds[shown]) < PER_CELL and (shown or show_answers):
                answer = judged.answers[i]
                words = ", ".join(f"{j}: {_class(v)}" for j, v in by_judge.items())
                request, text = (_cut(t) for t in (str(answer.request), answer.answer.text))
                kinds[shown].append(Example(answer.id, request, text, words, shown))
        chosen = kinds[True] + kinds[False]
        yield CellExamples(prefix + model, task, dict(counts), 0 if show_answers else hidden, chosen)


def _class(verdict: Verdict | None) -> str:
    if verdict is None or not verdict.judged:
        return UNJUDGED
    return verdict.label.value if verdict.label is not None else "no class"


def _cut(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LENGTH else f"{words[:LENGTH]} ..."
