"""Extraction of GSM8K's number from an answer by two rules. choices.py has ARC's two rules.

The paper's rule takes the last number of the text (Lyu et al. 2024, appendix F, after lm-evaluation-harness). Its
regular expression drops minus signs, keeps a sentence's full stop and treats "1,080" and "1080" as different; ours
takes the last number, too, and compares the values that are meant (numbers.py). The strict rule requires GSM8K's own
form, `#### 18`.
"""

import re
from contextlib import suppress
from decimal import Decimal, InvalidOperation

from ptst.errors import UserError
from ptst.evaluation.choices import chosen_choice as chosen_choice
from ptst.evaluation.choices import printed_choice as printed_choice
from ptst.evaluation.choices import unwrapped
from ptst.evaluation.numbers import last_number as last_number
from ptst.evaluation.numbers import only_number

_STRICT = re.compile(r"####((?:(?!####)[^\r\n])*)(?=[\r\n]|$)")
_GSM8K = re.compile(r"([-\u2212]?\s?\$?\s?[-\u2212]?[\d,]*\.?\d+)[ \t]*\.?[ \t]*")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?=(?:[.,]\d{1,2}|\.\d+)?[^\d/,]*$)")


def strict_answer(text: str) -> Decimal | None:
    """The number after the last `####`, alone on the rest of its line, or None. It may be bold or in LaTeX."""
    found = [value for rest in _STRICT.findall(text) if (value := _strict(rest)) is not None]
    return found[-1] if found else None


def _strict(text: str) -> Decimal | None:
    text = re.sub(r"^\$(.*)\$$", r"\1", unwrapped(text))  # LaTeX's, which may hold another dollar
    if own := _GSM8K.fullmatch(text):  # commas as they come
        cleaned = own[1].replace("\u2212", "-").replace("$", "").replace(",", "")
        with suppress(InvalidOperation):
            return Decimal("".join(cleaned.split()))
    return only_number(_SPACED.sub(lambda m: m[0].replace(" ", "\u00a0"), text))  # alone on its line, it is one number


def gold_number(answer: str, source: str = "answer") -> Decimal:
    """The number of a reference answer. Raises UserError, naming `source`, when it has no `#### N`."""
    value = strict_answer(answer)
    if value is None:
        raise UserError(
            "the reference answer does not end in '#### N', so it cannot be scored", "use other data", source
        )
    return value
