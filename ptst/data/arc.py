"""AI2's ARC (Clark et al. 2018, arXiv 1803.05457): science questions with three to five choices, in two layouts.

The hub's: `question`, `choices` {text, label}, `answerKey`. And instructions that contain the choices: "Please choose
the correct answer to the question: ... Answer1: ... Answer format: answer1/answer2".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

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


def load_arc(name: str, path: str | None = None, limit: int | None = None) -> list[ArcQuestion]:
    """Questions of `arc-easy` or `arc-challenge`: from a file, or from the hub's test split. Raises UserError for a
    file or hub that cannot be read and for a row of neither layout."""
    if path is None:
        rows: Iterable[Row] = read_hub(name, HUB[name], f"give its file instead, as in {name}:FILE", limit).rows
    elif Path(path).is_file():
        rows = islice(read_rows(Path(path)), limit)
    else:
        raise UserError(f"there is no file {path} with questions of {name}", "check the path")
    return [to_question(row, place) for place, row in rows]


def to_question(row: dict[str, Any], source: str) -> ArcQuestion:
    """One row of either layout. Raises UserError, naming `source`, for any other row."""
    if isinstance(row.get("choices"), dict):
        question, (labels, texts) = row.get("question"), (_texts(row["choices"].get(k)) for k in ("label", "text"))
        answer = row.get("answerKey")
    elif form := _INSTRUCTION.fullmatch(str(row.get("instruction"))):
        question, labels = form[1], form[3].split("/")
        texts = re.split(r"(?:^| )Answer\d+: ", form[2])[1:]
        answer = row.get("answer")
    else:
        remedy = (
            "a question of ARC has question, choices and answerKey, or answer and an instruction with Answer1, Answer2"
        )
        raise UserError(f"the row has {', '.join(sorted(row)) or 'no fields'}", remedy, source)
    if not isinstance(question, str) or len(texts) < 2 or len(texts) != len(labels) or answer not in labels:
        cause = f"{len(texts)} choices for the labels {', '.join(map(str, labels))} and the answer {answer!r}"
        raise UserError(cause, "each label needs a choice, and the answer must be one of the labels", source)
    return ArcQuestion(question, tuple(texts), labels.index(answer), source)


def _texts(value: object) -> list[str]:
    """The list, [] for anything else than a list of texts."""
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []
