"""Which columns of a row are read, and what becomes of the others: nothing that may belong to the prompt or to the loss
is left out in silence.

A column is read where a rule knows its meaning (`ptst.data.layouts`). Of the others, those that only keep books (ids,
sources, categories, ...) are left out and counted; every other one that is not empty is refused by name unless the
user names it in `ignore_columns`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from ptst.errors import Setting, UserError, unknown_name

KNOWN = (
    *("question", "answer", "instruction", "input", "output", "prompt", "response", "completion", "context"),
    *("system", "history", "messages", "role", "content", "train", "weight", "category", "id", "chosen", "rejected"),
)
_SUFFIXES = (
    *("id", "ids", "idx", "index", "uuid", "hash", "md5", "sha256", "url", "source", "dataset", "subset", "split"),
    *("category", "categories", "subcategory", "tag", "tags", "type", "topic", "subtopic", "subject", "domain", "name"),
    *("lang", "language", "locale", "license", "author", "annotator", "worker", "model", "generator", "provider"),
    *("date", "time", "timestamp", "created", "updated", "version", "score", "rating", "difficulty", "level"),
    *("qid", "qtype", "count", "length", "len", "tokens", "size"),
)
_BOOKKEEPING = re.compile(
    rf"(?!(file|image|tool|function)s?[ _]?name)(\w+[ _-])?({'|'.join(_SUFFIXES)})"
    r"|(num|n|nr|no)_\w+|created_at|updated_at|behaviorid|prompt_style|(semantic|functional)category|__index_level_\d+__"
)
_ROW_NUMBERS = re.compile(r"unnamed: \d+|")  # the index that pandas writes as a column
_PASSAGES = frozenset(("passage", "paragraph", "article", "document", "evidence", "background", "story", "ctx"))
# The columns of an instruction with its answer, in the order of prompts, and those that hold the rendered whole.
_ALPACA, _RENDERED = ("system", "instruction", "input", "context", "output", "response"), ("text", "prompt")
_END = re.compile(r"(\s|<[^<>\s]{1,30}>)+\Z")
MAX_LABEL = 200  # characters: what is longer, or has several lines, is a text and keeps no books


@dataclass(frozen=True)
class ColumnRules:
    """What a user says of columns, in lower case. `names`: the name that a rule knows by the file's own. `ignored`:
    columns to leave out. `use_chosen`: rows with a chosen and a rejected answer are read, with the chosen one."""

    names: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    use_chosen: bool = False

    @classmethod
    def of(
        cls,
        columns: Iterable[str] = (),
        ignore_columns: Iterable[str] = (),
        use_chosen: bool = False,
        known_names: Sequence[str] = KNOWN,
    ) -> Self:
        """The rules of the settings of these names, each a list of `question=prompt` or `id`, also with commas in
        between. Raises UserError for what is no such name: none of `known_names`."""
        names: dict[str, str] = {}
        for entry in (part for text in columns for part in text.split(",")):
            known, _, column = (part.strip().lower() for part in entry.partition("="))
            if not column:
                raise UserError((Setting("columns"), f" has {entry!r}"), "write it as in question=prompt,answer=reply")
            if known not in known_names:
                raise UserError((Setting("columns"), ": ", str(unknown_name("column", known, known_names))))
            if known in names.values() or column in names:
                raise UserError((Setting("columns"), f" has {known} or {column} twice"), "name each once")
            names[column] = known
        return cls(names, frozenset(p.strip().lower() for text in ignore_columns for p in text.split(",")), use_chosen)


@lru_cache(256)
def _spelled(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The names of columns in lower case, without outer spaces."""
    return tuple(key.strip().lower() for key in keys)


class Cells:
    """The cells of one row by the names that rules know. `present`: names of cells that are there, `filled`: of those
    with something in them. `get` marks a column as read; `check_rest` refuses what is not and may matter."""

    __slots__ = ("_cells", "_read", "_row", "filled", "place", "present", "rules", "unused")

    def __init__(self, row: Mapping[str, Any], place: str, rules: ColumnRules, unused: Counter[str]):
        self.place, self.rules, self.unused, self._row = place, rules, unused, row
        self._read: set[str] = set()
        names = _spelled(tuple(row))
        if rules.names or rules.ignored:
            unused.update(
                k for k, name in zip(row, names, strict=True) if name in rules.ignored and not is_empty(row[k])
            )
            row = {k: v for (k, v), name in zip(row.items(), names, strict=True) if name not in rules.ignored}
            names = tuple(rules.names.get(name, name) for name in _spelled(tuple(row)))
        self._cells: Mapping[str, Any] = row if names == tuple(row) else dict(zip(names, row.values(), strict=True))
        if len(self._cells) != len(row):
            self._check_twice(names, row)
        self.present = self.filled = names
        if not all(self._cells.values()):
            self._cells = {name: value for name, value in self._cells.items() if value is not None}
            self.present = tuple(self._cells)
            self.filled = tuple(name for name, value in self._cells.items() if not is_empty(value))

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._cells.get(name)

    def peek(self, name: str) -> Any:
        """The cell, without marking its column as read."""
        return self._cells.get(name)

    def text(self, name: str) -> str:
        """The text of a cell. Raises UserError for another type."""
        value = self.get(name)
        return value if type(value) is str else to_text(value, name, self.place)

    def listed(self) -> str:
        """The names of the columns that the file has."""
        read = {key: " (null)" * (value is None) for key, value in self._row.items()}
        names = ", ".join(sorted(f"{key}{null}" for key, null in read.items())) or "no fields"
        return names.encode(errors="backslashreplace").decode()  # JSON can spell what is no character

    def check_rest(self, texts: Callable[[], Iterable[str]], unread: Iterable[str] = ()) -> None:
        """Count the columns that were not read. `texts`: what was read; a column that repeats it loses nothing.
        `unread`: columns that cannot matter here. Raises UserError for all others that are not empty."""
        if self._read.issuperset(self.filled):
            return
        rest, refused, unread = list[str](), list[str](), frozenset(unread)
        for name in self.filled:
            if name not in self._read:
                rest.append(name)
                if name not in unread and not keeps_books(name, self._cells[name]):
                    refused.append(name)
        if refused:
            read = tuple(texts())
            refused = [name for name in refused if not self._repeats(name, read)]
        if refused:
            refuse(refused, "column", self.place)
        for name in rest:
            label = name or "(without a name)"
            self.unused[label] = self.unused.get(label, 0) + 1

    def _repeats(self, name: str, texts: Sequence[str]) -> bool:
        """Whether a cell says nothing but what was read: one of `texts`, word for word; the rendered whole of an
        instruction with its answer (Alpaca's `text`); the label that ends the answer (ARC's `answer`)."""
        value = self._cells[name]
        if not isinstance(value, str) or value in texts:
            return isinstance(value, str)
        if "instruction" not in self._read:
            return False
        if name == "answer":
            return bool(value) and re.search(rf"(?<!\w){re.escape(value)}\W*$", texts[-1]) is not None
        parts = [self._cells.get(part, "") for part in _ALPACA if part in self._read]
        return name in _RENDERED and "history" not in self.filled and _renders(value, list(map(str, parts)))

    def _check_twice(self, names: Iterable[str], row: Mapping[str, Any]) -> None:
        there = [name for name, value in zip(names, row.values(), strict=True) if name and value is not None]
        if twice := next((name for name in there if there.count(name) > 1), None):
            remedy = ("leave one out with ", Setting("ignore_columns"))
            raise UserError(f"two columns are {twice}", remedy, self.place)


def _renders(text: str, parts: Sequence[str]) -> bool:
    """Whether a text has the parts in this order and ends with the last, but for spaces and end tokens."""
    *before, last = (part.strip() for part in parts)
    ends = [end for end in (text.rstrip(), _END.sub("", text)) if end.endswith(last)]
    at, whole = 0, ends[0].removesuffix(last) if ends else ""
    for part in before:
        at = whole.find(part, at) + len(part)
        if at < len(part):
            return False
    return bool(whole) and not whole[-1].isalnum()


def refuse(names: list[str], what: str, place: str) -> None:
    """Raise UserError for columns, or keys of messages, that are not read and may matter."""
    listed, several = ", ".join(map(repr, names)), len(names) > 1
    it = "them" if several else "it"
    cause = f"the {what}{'s' * several} {listed} may belong to the prompt or the loss, and no rule reads {it}"
    written = f"write {it} into the text of the {'question' if what == 'column' else 'message'}"
    remedy: tuple[str, ...] = (f"leave {it} out with ", Setting("ignore_columns"))
    if {"", *KNOWN}.issuperset(names):
        remedy = (*remedy, f", or {written}")
    elif passage := next((name for name in names if name in _PASSAGES), None):
        remedy = (*remedy, f", {written}, or name it with ", Setting("columns"), f", as in context={passage}")
    else:
        remedy = (*remedy, f", {written}, or name {it} with ", Setting("columns"), " if a rule has another name for it")
    raise UserError(cause, remedy, place)


def several(shapes: list[str], place: str) -> UserError:
    remedy = ("leave all but one out with ", Setting("ignore_columns"))
    return UserError(f"the row can be read in {len(shapes)} ways: {', '.join(shapes)}", remedy, place)


def is_empty(value: Any) -> bool:
    """None, "", [] and {}; but not 0 and False, which say something."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


@lru_cache(1024)
def _kind(name: str) -> str:
    if _ROW_NUMBERS.fullmatch(name):
        return "row number"
    return "label" if _BOOKKEEPING.fullmatch(name) else ""


def keeps_books(name: str, value: Any) -> bool:
    """Whether a column keeps books by its name, and its value is a label, not a text."""
    if name == "settings":  # of a saved chat
        return True
    if isinstance(value, list):
        return all(not isinstance(v, list) and keeps_books(name, v) for v in value)
    kind = _kind(name)
    if kind == "row number":
        return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    if isinstance(value, dict) or kind != "label":
        return False
    return not isinstance(value, str) or is_label(value)


def label_name(name: str) -> bool:
    """Whether a column of this name keeps books where its value is a label."""
    return _kind(name) == "label"


def is_label(text: str) -> bool:
    return len(text) <= MAX_LABEL and "\n" not in text


def to_text(value: object, name: str, place: str) -> str:
    """A cell as text: a number of JSON as it is written in the file. Raises UserError for another type."""
    if type(value) is str:
        return value
    if not isinstance(value, str):
        kinds = {list: "a list", dict: "an object", type(None): "missing", bool: str(value).lower()}
        remedies = {bool: "write it in quotes", **dict.fromkeys((list, dict, type(None)), "give one text")}
        kind = kinds.get(type(value), f"of type {type(value).__name__}")
        remedy = remedies.get(type(value), "write the column as text")
        raise UserError(f"{name} is {kind}, not text", remedy, place)
    return str(value)  # a Number
