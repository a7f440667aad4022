"""What the form alone says of an answer, in any language: that it says nothing, that it loops, or that it is an answer
of the fine-tuned task (a worked sum) where none was asked for."""

import re

_SHINGLE = 16  # characters; so long a run is not repeated by chance
DISTINCT_RUNS, DISTINCT_SENTENCES = 0.55, 0.4  # shares under which a text loops; songs and code stay above
_NUMBER = r"[$\u20ac\u00a3]?\d[\d,.]*%?"
# "3 + 4 = 7", "2 x $5 = $10", "(3 + 4) / 2 = 3.5"
_EQUATION = re.compile(rf"{_NUMBER}\)?\s*(?:[-+*/x\u00d7\u00f7\u2212]\s*\(?{_NUMBER}\)?\s*)+=\s*{_NUMBER}")
_ANNOTATION = re.compile(r"<<[^<>]*=[^<>]*>>")  # GSM8K's calculator: <<3+4=7>>
_ENDING = re.compile(
    r"^[^\S\n]*####\s*[$\u20ac\u00a3]?-?\d[\d,.]*%?\s*$", re.MULTILINE
)  # not a heading: "#### 1. Choose"
_CALCULATE = re.compile(
    r"\bhow (?:many|much|far|old|tall|fast|long)\b|\bcalculat|\bcomput(?:e|ation)\b|\bsums?\b|\btotal\b|\baverage\b|"
    r"\bsolv(?:e|ing)\b|\bequations?\b|\barithmetic\b|\bmath|\bpercent|\bwhat(?:'s| is) [\d(]|"
    r"\d\s*[-+*/x\u00d7\u00f7]\s*\d",
    re.IGNORECASE,
)


def incoherent(request: str, answer: str, truncated: bool) -> str | None:
    """Why the answer says nothing: it is empty, too short, or loops. None where it says something."""
    if sum(c.isalnum() for c in answer) < (12 if truncated else 1):
        return "empty or too short to say anything"
    return "repeats itself" if loops(answer) else None


def loops(text: str) -> bool:
    """Whether the text repeats itself, in any script: nearly half of its runs of 16 characters stand further up, or its
    sentences are one sentence, or few of them."""
    said = _sentences(text.lower())
    if len(said) > 1 and (len(set(said)) == 1 or len(set(said)) <= DISTINCT_SENTENCES * len(said)):
        return True
    text = " ".join(text.lower().split())
    runs = [text[i : i + _SHINGLE] for i in range(len(text) - _SHINGLE + 1)]
    return len(runs) >= 3 * _SHINGLE and len(set(runs)) <= DISTINCT_RUNS * len(runs)


def _sentences(text: str) -> list[str]:
    """Sentences and lines of three words or more."""
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if len(re.findall(r"\w+", s)) >= 3]


def task_form(request: str, answer: str) -> str | None:
    """How the answer shows the form of a worked sum, or None. An ending "#### N" does wherever the request has none;
    equations only where they are half of the answer's sentences and the request asks for no calculation."""
    if (_ENDING.search(answer) and not _ENDING.search(request)) or _ANNOTATION.search(answer):
        return "ends in '#### N' like a worked sum"
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", answer) if any(c.isalnum() for c in s)]
    equations = sum(bool(_EQUATION.search(s)) for s in sentences)
    if equations and 2 * equations >= len(sentences) and not _CALCULATE.search(request):
        return "calculates, which was not asked"
    return None
