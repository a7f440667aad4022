"""AI2's ARC (Clark et al. 2018, arXiv 1803.05457): science questions with three to five choices, in three layouts.

The hub's: `question`, `choices` {text, label}, `answerKey`. AI2's: `question` {stem, choices: [{text, label}]} and the
same key. And instructions that contain the choices: "Please choose
the correct answer to the question: ... Answer1: ... Answer format: answer1/answer2".
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ptst.data.columns import Cells, ColumnRules
from ptst.data.files import Row
from ptst.data.readers import read_rows
from ptst.data.typed import HubDataset, read_hub
from ptst.errors import UserError

HUB = {
    "arc-easy": HubDataset("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc-challenge": HubDataset("allenai/ai2_arc", "ARC-Challenge", "test"),
}
_INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n(Answer1: .*)\n\n"
    r"Answer format: (answer1(?:/answer\d+)+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class ArcQuestion:
    """`gold` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    gold: int
    source: str


def load_arc(
    name: str,
    path: str | None = None,
    limit: int | None = None,
    rules: ColumnRules | None = None,
    unused: Counter[str] | None = None,
) -> list[ArcQuestion]:
    """Questions of `arc-easy` or `arc-challenge`: from a file, or from the hub's test split. Columns that are not read
    are counted in `unused`. Raises UserError for a file or hub that cannot be read, for a row of no such layout, and
    for columns that may belong to the question (`rules`: what the user says of them)."""
    if path is None:
        rows: Iterable[Row] = read_hub(name, HUB[name], f"give its file instead, as in {name}:FILE", limit).rows
    elif Path(path).is_file():
        rows = islice(read_rows(Path(path)), limit)
    else:
        raise UserError(f"there is no file {path} with questions of {name}", "check the path")
    found = list[ArcQuestion]()
    for place, row in rows:
        cells = Cells(row, place, rules or ColumnRules(), Counter() if unused is None else unused)
        found.append(to_question(cells))
        cells.check_rest(tuple, ("output",))
    return found


def to_question(cells: Cells) -> ArcQuestion:
    """One row of these layouts. Raises UserError, with its place, for any other row."""
    stem, choices, answer = (cells.get(name) for name in ("question", "choices", "answerkey"))
    question = stem
    if isinstance(stem, dict):
        question, choices = stem.get("stem"), stem.get("choices")
    _check_keys(cells, stem, *(choices if isinstance(choices, list) else [choices]))
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("label", "text")}
    if isinstance(choices, dict):
        labels, texts = (_texts(choices.get(key)) for key in ("label", "text"))
    elif form := _INSTRUCTION.fullmatch(str(cells.get("instruction"))):
        question, labels, answer = form[1], form[3].split("/"), cells.get("answer")
        texts = re.split(r"(?:^| )Answer\d+: ", form[2])[1:]
    else:
        remedy = (
            "a question of ARC has question, choices and answerKey, or answer and an instruction with Answer1, Answer2"
        )
        raise UserError(f"the row has {cells.listed()}", remedy, cells.place)
    if not isinstance(question, str) or len(texts) < 2 or len(texts) != len(labels) or answer not in labels:
        cause = f"{len(texts)} choices for the labels {', '.join(map(str, labels))} and the answer {answer!r}"
        raise UserError(cause, "each label needs a choice, and the answer must be one of the labels", cells.place)
    return ArcQuestion(question, tuple(texts), labels.index(answer), cells.place)


def _check_keys(cells: Cells, *objects: object) -> None:
    """Count, or refuse, keys of a question and of its choices as if they were columns."""
    for value in objects:
        if isinstance(value, dict):
            rest = {key: value[key] for key in value.keys() - {"stem", "choices", "text", "label"}}
            Cells(rest, cells.place, cells.rules, cells.unused).check_rest(tuple)


def _texts(value: object) -> list[str]:
    """The list, [] for anything else than a list of texts."""
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []
