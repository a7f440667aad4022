r"""Numbers as models write them, and the value that is meant.

    1,080  1{,}080  1'080  1_080  1,00,000  1.080.000,50      groups of digits; also by thin and no-break spaces
    1e3  1.5 \times 10^{3}  10^3                              powers of ten
    3/4  \frac{3}{4}  2 1/2                                   fractions, mixed numbers; also as one character
    \$18  18\%  -5                                            with any minus sign or en dash, in digits of any script

Only what cannot be meant otherwise is joined: "1, 2, 3", "3,4" and "12 345" are several numbers; "3-4" is a range, also
with an en dash; "12/25/2023", "2023-05-12" and "12.05.2023" are dates; the "2" of "18 m^2" belongs to the unit.
"""

import re
import unicodedata
from decimal import Decimal

_SPACE = "\u00a0"  # stands for every space that may group digits
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f", _SPACE),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff"),  # invisible
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff05": "%",
        "\uff04": "$",
        "\u066b": ".",
        "\u066c": ",",
        "\u2019": "'",
    }
)
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")

_EXPONENT = r"\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3})(?!\d))"
_ONE_POWER = re.compile(r"(?<![\w.,])10" + _EXPONENT)
_TIMES = r"\s*(?:\\times|\\cdot|[xX*\u00d7\u00b7\u2219\u22c5])\s*"
_TIMES_POWER = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)" + _TIMES + "10" + _EXPONENT)
_SUPERSCRIPT = re.compile(r"(?<=10)\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR = re.compile(r"(\d[ \u00a0]?)?([\u00bc-\u00be\u2150-\u215e])")
_LATEX_GROUPS = re.compile(r"\d+(?:\{,\}\d+)+")
_LATEX_SPACE = re.compile(r"(?<=\d) ?(?:\\[,:; ]|~|\{\\,\}) ?(?=\d)")  # spaces are nothing in LaTeX
_LATEX_FRACTION = re.compile(r"(\d[ \u00a0]?)?\\[cdt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_PLAIN = re.compile(r"\s*(-?\s*(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*")

_NUMBER = re.compile(
    r"""
    (?P<date> \d+ (?:/\d+){2,} )
  | (?: (?<![\d.,/]) (?P<whole>\d{1,3}) [\x20\u00a0]{1,2} )? (?<![\d.])
    (?! 0\d | 24/7(?!\d) | (?:19|20)\d\d/\d\d(?!\d) )
    (?P<above> \d+ (?:,\d{3})* (?:\.\d+)? ) / (?P<below> (?!0) \d+ (?:\.\d+)? ) (?! [\d/] )
  | (?<![\w.]) (?P<scientific> (?: \d+(?:\.\d+)? | \.\d+ ) [eE] [+-]?\d{1,3} ) (?!\w)
  | (?P<european> \d{1,3}(?:\.\d{3})+,\d{1,2} | \d{1,3}(?:\.\d{3}){2,} | \d{1,3}(?:\u00a0\d{3})+,\d{1,2} ) (?!\d)
  | (?P<number>
        \d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?!\d)                                    # Indian
      | \d{1,3}(?P<mark>[,'_\u00a0])\d{3}(?:(?P=mark)\d{3})*(?:\.\d+)?(?!\d)
      | \d{1,3}(?:\x20\d{3})*?\x200\d\d(?:\x20\d{3})*(?:\.\d+)?(?!\d)               # "000" is no number of its own
      | \d+(?:\.\d+)? | (?<![\w.])\.\d+                                            # the full stop of "Rs.50" is none
    )
    """,
    re.VERBOSE,
)
_UNIT = re.compile(r"[A-Za-z]\}?\^\{?\s*-?$")  # what is before the exponent of a unit
_SHORT_UNIT = re.compile(r"\d\s?(?:[kcdm]?m|ft)$")  # the same, of m2 and cm3


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None."""
    text = spelled_plainly(text)
    found = [m for m in _NUMBER.finditer(text) if not _of_unit(m)]
    if not found:
        return None
    value = _value(found[-1])
    return value.copy_negate() if _negative(text[: found[-1].start()]) else value


def _of_unit(match: re.Match[str]) -> bool:
    """Whether a number is the exponent of a unit."""
    units = (_UNIT, _SHORT_UNIT) if match[0] in ("2", "3") else (_UNIT,)
    return any(unit.search(match.string, max(0, match.start() - 8), match.start()) for unit in units)


def only_number(text: str) -> Decimal | None:
    """The value of a text that is one number, with a sign, a currency, per cent or a full stop at most."""
    text = spelled_plainly(text).strip()
    money = r"\s*[$\u20ac\u00a3\u00a5\u20b9]?\s*"
    found = re.fullmatch(rf"([-+]?{money}[-+]?)(.*?)(?:{money}|\s*%)\.?", text, re.DOTALL)
    number = _NUMBER.fullmatch(found[2]) if found else None
    if found is None or number is None or number["date"]:
        return None
    value = _value(number)
    return value.copy_negate() if "-" in found[1] else value


def spelled_plainly(text: str) -> str:
    """The text with ASCII digits, one minus sign, `a/b` and `1e3`, and without LaTeX's marks around numbers."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: f"^{m[0].translate(_SUPERSCRIPTS)}", text)
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(_SAME))
        text = _VULGAR.sub(lambda m: (f"{m[1]} " if m[1] else "") + _vulgar(m[2]), text)
    if not {"\\", "{", "~"}.isdisjoint(text):
        text = text.replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
        text = _LATEX_SPACE.sub(_SPACE, _LATEX_GROUPS.sub(_joined, text))
        text = _LATEX_FRACTION.sub(_inline, text)
    text = _TIMES_POWER.sub(lambda m: f"{m[1]}e{m[2] or m[3]}", text)
    return _ONE_POWER.sub(lambda m: f"1e{m[1] or m[2]}", text)


def _vulgar(character: str) -> str:
    return unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def _joined(match: re.Match[str]) -> str:
    """`1{,}000` groups digits; where these are no groups, `{,}` is a decimal comma."""
    first, *rest = match[0].split("{,}")
    groups = len(rest[-1]) == 3 and len(first) <= 3 and first != "0" and all(len(part) in (2, 3) for part in rest)
    return ",".join([first, *rest]) if groups or len(rest) > 1 else f"{first}.{rest[0]}"


def _inline(match: re.Match[str]) -> str:
    parts = [_PLAIN.fullmatch(part) for part in (match[2] or match[3] or "", match[4] or match[5] or "")]
    if parts[0] is None or parts[1] is None:
        return match[0]
    above, below = ("".join(part[1].split()) for part in parts if part)
    return (f"{match[1]} " if match[1] else "") + f"{above}/{below.replace(',', '')}"


def _value(match: re.Match[str]) -> Decimal:
    if match["date"]:
        return Decimal(match["date"].rpartition("/")[2])
    if match["above"]:
        above, below = Decimal(match["above"].replace(",", "")), Decimal(match["below"])
        whole = match["whole"]
        if whole is None or above < below:
            return above / below + int(whole or 0)
        return above / below
    if match["european"]:
        return Decimal(match["european"].replace(".", "").replace(_SPACE, "").replace(",", "."))
    if match["scientific"]:
        return Decimal(format(Decimal(match["scientific"]), "f"))
    return Decimal(re.sub(r"[,'_\u00a0 ]", "", match["number"]))


def _negative(before: str) -> bool:
    """Whether the text before a number ends in a sign: in "10-5" and "10 - 5" the minus is a subtraction or a range."""
    before = before.rstrip("$\u20ac\u00a3\u00a5\u20b9*_")
    if not before.endswith("-"):
        return False
    before = before[:-1]
    left = before.rstrip()
    attached = before[-1:].isalnum()
    return not (attached or left.rstrip("$%")[-1:].isdigit() or left.endswith((")", "]", "}")))
