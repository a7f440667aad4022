"""Text for reports: quoted, with invisible characters escaped and the code points of all that could be mistaken."""

import unicodedata

from ptst.text.encode import first_difference

_CONTROL_NAMES = {
    0x00: "NULL",
    0x07: "BELL",
    0x08: "BACKSPACE",
    0x09: "TAB",
    0x0A: "LINE FEED",
    0x0B: "VERTICAL TAB",
    0x0C: "FORM FEED",
    0x0D: "CARRIAGE RETURN",
    0x1B: "ESCAPE",
    0x7F: "DELETE",
    0x85: "NEXT LINE",
    0x9B: "CONTROL SEQUENCE INTRODUCER",
}
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
AROUND = 16  # characters shown on both sides of a difference
LONGEST = 60  # characters of a text that is shown from its beginning
NAMED = 3  # characters whose code points are shown


def code_point(character: str) -> str:
    """`U+00A0 NO-BREAK SPACE`."""
    number = ord(character)
    name = unicodedata.name(character, _CONTROL_NAMES.get(number, ""))
    return f"U+{number:04X} {name}".strip()


def is_plain(character: str) -> bool:
    """Whether a reader recognizes the character without its code point: printable ASCII."""
    return " " <= character <= "~"


def escaped(text: str) -> str:
    """The text with every character that does not print as an escape."""
    return "".join(_ESCAPES.get(c) or (c if c.isprintable() else _escape(c)) for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def quoted(text: str, longest: int = LONGEST) -> str:
    """The text in quotes, its beginning if it is long, with the code points of what is not plain ASCII."""
    shown = text[:longest]
    special = list(dict.fromkeys(c for c in shown if not is_plain(c)))
    if shown and not shown.strip(" "):
        special = [" "]
    names = ", ".join(map(code_point, special[:NAMED])) + ", ..." * (len(special) > NAMED)
    dots = f"... ({len(text)} characters)" if len(text) > longest else ""
    return f'"{escaped(shown)}"{dots}' + (f" ({names})" if names else "")


def difference(expected: str, seen: str) -> tuple[int, str, str]:
    """Where two texts first differ, and both around that place in quotes, with the
    code point of a character there that is not plain."""
    at = first_difference(expected, seen)
    out = []
    for text in (expected, seen):
        here = text[at : at + 1]
        before = "..." * (at > AROUND) + '"' + escaped(text[max(0, at - AROUND) : at + AROUND]) + '"'
        named = "" if here != " " and here and is_plain(here) else f" ({code_point(here) if here else 'the end'})"
        out.append(before + "..." * (at + AROUND < len(text)) + named)
    return at, out[0], out[1]
