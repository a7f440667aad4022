"""JSONL and JSON, row by row: a line, or an element of the file's list, is one row."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from ptst.data.files import MAX_LINE, Row, check_object, not_utf8, numbered_lines, open_data
from ptst.errors import UserError

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


class Number(str):
    """A number of a JSON file as it is written there: `1.0` is not `1`, and `1e3` not `1000`."""

    __slots__ = ()
    __repr__ = str.__str__


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number)
TYPED = json.JSONDecoder()  # numbers as Python has them, for tables of our own


def parse_json(text: str) -> Any:
    """The JSON value that a cell holds. Raises ValueError, with what is wrong, for anything else."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_mistake(error)) from None


def read_jsonl(path: Path, decoder: json.JSONDecoder = _DECODER) -> Iterator[Row]:
    """The objects of a JSONL file; blank lines are skipped. Raises UserError, with file and line, for a line that is
    not an object, and as `numbered_lines`. `decoder`: that of data keeps numbers as they are written."""
    for number, line in numbered_lines(path):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            row, end = decoder.raw_decode(line) if line[0] == "{" else (decoder.decode(line), len(line))
            if line[end:].strip(" \t\r\n"):
                raise JSONDecodeError("Extra data", line, end)
        except (ValueError, RecursionError) as error:
            cause = f"not valid JSON ({_mistake(error)})"
            remedy = "each line holds one object; a file with objects of several lines must be named .json"
            raise UserError(cause, remedy, place) from None
        if isinstance(row, list):
            raise UserError("the line is a list", "name the file .json if it holds one list of all rows", place)
        yield place, check_object(row, place)


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a JSON file: of its one list, of several objects one after another, or of `jailbreaks` in its one
    object (JailbreakBench's published attacks). Raises UserError, with the line that the row begins in, for anything
    else."""
    with open_data(path) as file:
        values = _Values(file, path)
        if values.next() == "[":
            yield from values.elements()
        elif values.next() == "{":
            yield from _objects(values, path)
        elif values.next():
            raise _no_list(f"{path}:1")
        if values.next():
            raise values.wrong("text after the end of the list")


def _no_list(place: str) -> UserError:
    remedy = "put the objects in [ ], or one a line in a .jsonl file"
    return UserError("the file is not a JSON list", remedy, place)


def _objects(values: "_Values", path: Path) -> Iterator[Row]:
    place, line = values.place, values.line
    first, text = values.value()
    if values.next() != "{":
        if values.next():
            raise values.wrong("text after the end of the object")
        if not isinstance(first.get("jailbreaks"), list):
            raise _no_list(place)
        start = text.index("[", text.index('"jailbreaks"'))
        line += text.count("\n", 0, start)
        yield from _Values(io.BytesIO(text[start:].encode()), path, line).elements()
        return
    yield place, first
    while values.next() == "{":
        place = values.place
        yield place, values.value()[0]


def _mistake(error: Exception) -> str:
    """What the decoder refused, without the line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error.msg}, column {error.colno}" if isinstance(error, JSONDecodeError) else str(error)


class _Values:
    """The JSON values of a file one after another. Of the file, only what the next value needs is in memory."""

    def __init__(self, file: Any, path: Path, line: int = 1):
        self.line, self._path, self._file = line, path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0
        self._number, self._one_line = 0, False

    @property
    def place(self) -> str:
        """The line; the number of the row in a list that has its rows in one line."""
        return f"{self._path}:{self._number if self._one_line else self.line}"

    def next(self) -> str:
        """The next character that is no space, without taking it; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._advance(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def elements(self) -> Iterator[Row]:
        """The objects of the list that begins here. Raises UserError for other elements and for what is no list."""
        if self.next() != "[":
            raise self.wrong("a list is missing")
        self._at += 1
        if self.next() == "]":
            self._at += 1
            return
        first = self.line
        while True:
            begins, self._number = self.next(), self._number + 1
            self._one_line = self._one_line or (self._number == 2 and self.line == first)
            if begins != "{":
                if begins and begins in '"[-0123456789tfnNI':
                    check_object(None, self.place)
                raise self.wrong()
            place = self.place
            yield place, self.value()[0]
            if (separator := self.next()) not in (",", "]"):
                raise self.wrong("a comma or ] is missing")
            self._at += 1
            if separator == "]":
                return

    def value(self) -> tuple[dict[str, Any], str]:
        """The object that begins here, and its text. Raises UserError for a mistake in it, with the mistake's line."""
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except JSONDecodeError as error:  # or there is more of it
                offset = error.pos - self._at
                if len(self._text) - self._at > MAX_LINE or not self._more():
                    self._advance(self._at + offset)
                    raise self.wrong(error.msg) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self.wrong(_mistake(error)) from None
            text = self._text[self._at : end]
            self._advance(end)
            return found, text

    def wrong(self, cause: str = "an object is missing") -> UserError:
        """The error for the place that is reached."""
        return UserError(f"not valid JSON ({cause})", "the file holds one list of objects", self.place)

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on, twice as much each time that a value did not end; False at the end of the file."""
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        try:
            text = self._decode(data, not data)
        except UnicodeDecodeError as error:
            lines = self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            raise not_utf8(f"{self._path}:{self.line + lines}") from None
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)
