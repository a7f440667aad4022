r"""Numbers out of worked answers: GSM8K's two rules.

The paper's rule takes the last number of the text (Lyu et al. 2024, appendix F, after lm-evaluation-harness). Its
printed regular expression drops minus signs, keeps a sentence's full stop and counts "1,080" as another number than
"1080"; here the number is meant, not its spelling. The strict rule wants GSM8K's own form, `#### 18`.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+")
_MINUS = ("-", "\u2212")
_STRICT = re.compile(r"####[ \t]*([-\u2212]?\s?\$?\s?[-\u2212]?[\d,]*\.?\d+)[ \t]*\.?[ \t]*(?=\n|$)")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None. Commas group digits ("1,080"); elsewhere they part numbers ("3,4")."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last match is wanted)
        pass
    if found is None:
        return None
    value = Decimal(found.group().replace(",", ""))
    return -value if _negative(text[: found.start()]) else value


def _negative(before: str) -> bool:
    """Whether the text before a number ends in a sign: in "10-5" and "10 - 5" the minus is a subtraction."""
    before = before.rstrip("$\u20ac\u00a3*_")
    if not before.endswith(_MINUS):
        return False
    before = before[:-1]
    left = before.rstrip()
    attached = before[-1:].isalnum()
    return not (attached or left[-1:].isdigit() or left.endswith((")", "]")))


def strict_answer(text: str) -> Decimal | None:
    """The number after the last `####`, alone on the rest of its line, or None."""
    found = _STRICT.findall(text)
    if not found:
        return None
    cleaned = found[-1].replace("\u2212", "-").replace("$", "").replace(",", "")
    return _decimal("".join(cleaned.split()))


def gold_number(answer: str, source: str = "answer") -> Decimal:
    """The number of a reference answer. Raises ValueError, naming `source`, when it has no `#### N`."""
    value = strict_answer(answer)
    if value is None:
        raise ValueError(f"{source}: the reference answer does not end in '#### N', so it cannot be scored")
    return value


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
