"""What was done to a text, in words: the changes that data preparation makes without saying so."""

import html
import re
import unicodedata
from collections.abc import Callable

from ptst.audit.causes.characters import quoted

_ZERO_WIDTH = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_LOOK_ALIKES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
        **dict.fromkeys("\u00a0\u1680\u2000\u2001\u2002\u2003\u2007\u2009\u202f\u3000", " "),
        "\u2026": "...",
    }
)


def _mojibake(text: str) -> str:
    return text.encode("utf-8").decode("latin-1")


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"')


def _form(name: str) -> Callable[[str], str]:
    return lambda text: unicodedata.normalize(name, text)  # type: ignore[arg-type]


# In words, and as a function; the first that explains a text is named.
CHANGES: dict[str, Callable[[str], str]] = {
    "lacks the whitespace at its end": str.rstrip,
    "lacks the whitespace at its beginning": str.lstrip,
    "lacks its outer whitespace": str.strip,
    "is normalized to Unicode's NFC": _form("NFC"),
    "is normalized to Unicode's NFD": _form("NFD"),
    "is normalized to Unicode's NFKC": _form("NFKC"),
    "is normalized to Unicode's NFKD": _form("NFKD"),
    "has line feeds for its CR LF": lambda text: text.replace("\r\n", "\n"),
    "has line feeds for its carriage returns": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "lacks its carriage returns": lambda text: text.replace("\r", ""),
    "has CR LF for its line feeds": lambda text: text.replace("\n", "\r\n"),
    "lacks its line breaks": lambda text: text.replace("\r\n", "").replace("\n", ""),
    "has spaces for its line breaks": lambda text: text.replace("\r\n", " ").replace("\n", " "),
    "has spaces for its tabs": lambda text: text.replace("\t", "    "),
    "has one space for each tab": lambda text: text.replace("\t", " "),
    "has 8 spaces for its tabs": lambda text: text.replace("\t", " " * 8),
    "has its tabs expanded": str.expandtabs,
    "lacks its tabs": lambda text: text.replace("\t", ""),
    "has each run of whitespace as one space": lambda text: " ".join(text.split()),
    "has each run of spaces as one space": lambda text: re.sub(" {2,}", " ", text),
    "has each run of line breaks as one": lambda text: re.sub("\n{2,}", "\n", text),
    "lacks the whitespace at the ends of lines": lambda text: re.sub("[ \t]+(?=\n|$)", "", text),
    "lacks its invisible characters": lambda text: _ZERO_WIDTH.sub("", text),
    "has plain quotes, hyphens and spaces for its typographic ones": lambda text: text.translate(_LOOK_ALIKES),
    "is in lower case": str.lower,
    "is in upper case": str.upper,
    "has HTML's entities resolved": html.unescape,
    "has HTML's entities for its signs": html.escape,
    "has its backslash escapes resolved": _unescaped,
    "has backslashes before its line breaks": lambda text: text.replace("\n", "\\n"),
    "is UTF-8 read as Latin-1": _mojibake,
    "lacks its characters outside ASCII": lambda text: text.encode("ascii", "ignore").decode(),
    "has question marks for its characters outside ASCII": lambda text: text.encode("ascii", "replace").decode(),
    "is there twice": lambda text: text + text,
}


def change(expected: str, seen: str) -> str | None:
    """What was done to `expected`, as the predicate of a sentence; None where no known change explains it."""
    for words, function in CHANGES.items():
        if function(expected) == seen != expected:
            return words
    for words, function in CHANGES.items():  # the other way round, where the change loses nothing
        if words.startswith("lacks") and "invisible" in words and function(seen) == expected:
            return "has invisible characters that the row does not have"
    if not seen:
        return "is empty"
    if expected.startswith(seen):
        return f"ends early: {quoted(expected[len(seen) :], 30)} is missing"
    if expected.endswith(seen):
        return f"begins late: {quoted(expected[: -len(seen)], 30)} is missing"
    if expected and seen.startswith(expected):
        return f"goes on after its end with {quoted(seen[len(expected) :], 30)}"
    if expected and seen.endswith(expected):
        return f"begins with {quoted(seen[: -len(expected)], 30)} that the row does not have"
    return None
