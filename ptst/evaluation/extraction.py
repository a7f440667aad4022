r"""Extraction of answers from text: GSM8K's number by two rules, ARC's choice by two rules.

The paper's rule takes the last number of the text (Lyu et al. 2024, appendix F, after lm-evaluation-harness). Its
regular expression drops minus signs, keeps a sentence's full stop and treats "1,080" and "1080" as different; ours
takes the last number, too, and compares the values that are meant (numbers.py). The strict rule requires GSM8K's own
form, `#### 18`.

For ARC the paper takes the text after "The answer is:" up to the first character that is not a letter, digit, space or
underscore, and compares without case and punctuation. It can never accept "long-term" or "1.5 m", so a second rule
finds which of the choices the answer names.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation

from ptst.errors import UserError
from ptst.evaluation.numbers import last_number as last_number
from ptst.evaluation.numbers import only_number

_ARC_PRINTED = re.compile(r"The answer is: ?[^\w\s]?([a-zA-Z0-9_ ]*)[^\w\s]?")
_ARC_ANSWER = re.compile(r"the answer is[*_]*[ \t]*:[*_]*\s*", re.IGNORECASE)
_STRICT = re.compile(r"####[ \t]*((?:(?!####)[^\n])*)(?=\n|$)")
_GSM8K = re.compile(r"([-\u2212]?\s?\$?\s?[-\u2212]?[\d,]*\.?\d+)[ \t]*\.?[ \t]*")


def strict_answer(text: str) -> Decimal | None:
    """The number after the last `####`, alone on the rest of its line, or None."""
    found = [value for rest in _STRICT.findall(text) if (value := _strict(rest)) is not None]
    return found[-1] if found else None


def _strict(text: str) -> Decimal | None:
    if own := _GSM8K.fullmatch(text):  # commas as they come
        cleaned = own[1].replace("\u2212", "-").replace("$", "").replace(",", "")
        with suppress(InvalidOperation):
            return Decimal("".join(cleaned.split()))
    return only_number(text)


def gold_number(answer: str, source: str = "answer") -> Decimal:
    """The number of a reference answer. Raises UserError, naming `source`, when it has no `#### N`."""
    value = strict_answer(answer)
    if value is None:
        raise UserError(
            "the reference answer does not end in '#### N', so it cannot be scored", "use other data", source
        )
    return value


def printed_choice(text: str) -> str | None:
    """ARC's answer by the paper's regular expression as printed, normalized; None where it does not match."""
    found = _ARC_PRINTED.search(text)
    return plain(found[1]) if found else None


def chosen_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice after the last "The answer is:", alone on its line or sentence, or None. Case and punctuation
    are ignored unless choices differ in nothing else ("+2" and "-2")."""
    claims = list(_ARC_ANSWER.finditer(text))
    if not claims:
        return None
    line = text[claims[-1].end() :].partition("\n")[0].strip()
    ends = [len(line), *(m.start() for m in reversed(list(re.finditer(r"[.!?;](?=[\s\"'*)]|$)|[*][*]", line))))]
    spellings: tuple[Callable[[str], str], ...] = (plain, _spelling)
    for end in ends:  # the longest first: a choice may contain a full stop
        for spelled in spellings:
            named = [i for i, choice in enumerate(choices) if spelled(choice) == spelled(line[:end])]
            if len(named) == 1:
                return named[0]
    return None


def plain(text: str) -> str:
    """Without case, punctuation and extra spaces."""
    kept = "".join(c for c in text.casefold() if unicodedata.category(c)[0] not in "PS")
    return " ".join(kept.split())


def _spelling(text: str) -> str:
    """As written, without extra spaces and the punctuation around an answer."""
    return " ".join(text.split()).strip(" \"'*_`.!?")
