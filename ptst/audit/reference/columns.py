"""Which columns of a row may be left out, a second time for comparison: nothing here is shared with
`ptst.data.columns`. A column that may belong to the prompt or to the loss and is not read makes a row `Refused`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

FLAGS = frozenset(("train", "training", "trainable", "weight", "loss_mask"))
_LAST_WORDS = re.compile(
    "ids?|idx|index|uuid|hash|md5|sha256|url|source|dataset|subset|split|category|categories|subcategory|tags?|type|topic"
    "|subtopic|subject|domain|name|lang|language|locale|license|author|annotator|worker|model|generator|provider|date"
    "|time|timestamp|created|updated|version|score|rating|difficulty|level|qid|qtype|count|length|len|tokens|size"
)
_WHOLE = re.compile("created_at|updated_at|behaviorid|prompt_style|semanticcategory|functionalcategory|settings")
_FILES = re.compile(r"(file|image|tool|function)s?[ _]?name")
_LABEL = re.compile(r"(?:\w+[ _-])?([a-z0-9]+)|(?:num|n|nr|no)_\w+|__index_level_\d+__")
_PANDAS = re.compile(r"unnamed: \d+|")
_ENDS = re.compile(r"(\s|<[^<>\s]{1,30}>)+\Z")
LONGEST_LABEL = 200


class Refused(Exception):
    """The row may not be read; says why."""


class Unknown(Exception):
    """This reading has no rule for the row."""


@dataclass(frozen=True)
class Columns:
    """The user's settings for columns, as they are typed: `question=prompt,answer=reply`; names to leave out;
    whether a preference pair's chosen answer is read."""

    columns: Sequence[str] = ()
    ignore_columns: Sequence[str] = ()
    use_chosen: bool = False
    names: dict[str, str] = field(init=False)
    ignored: frozenset[str] = field(init=False)

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The settings of these names of a command."""
        return cls(settings.columns, settings.ignore_columns, settings.use_chosen)

    def __post_init__(self) -> None:
        pairs = [part.split("=", 1) for text in self.columns for part in text.split(",") if "=" in part]
        object.__setattr__(self, "names", {own.strip().lower(): known.strip().lower() for known, own in pairs})
        names = (part.strip().lower() for text in self.ignore_columns for part in text.split(","))
        object.__setattr__(self, "ignored", frozenset(names))


class Record:
    """The cells of a row by the names that rules know. `filled`: those with something in them. `read`: those that a
    rule used."""

    __slots__ = ("cells", "filled", "read", "unused")

    def __init__(self, row: Mapping[str, Any], columns: Columns):
        self.read, self.unused = set[str](), dict[str, int]()
        self.cells: dict[str, Any] = {}
        names = set[str]()
        self.filled = list[str]()
        for key, value in row.items():
            name = _lowered(key)
            if name in columns.ignored:
                if not blank(value):
                    self.count(key)
                continue
            name = columns.names.get(name, name)
            if name in names:
                raise Unknown
            names.add(name)
            if value is not None:
                self.cells[name] = value
                if not blank(value):
                    self.filled.append(name)

    def count(self, name: str) -> None:
        """One more row in which a column was not read."""
        self.unused[name] = self.unused.get(name, 0) + 1

    def value(self, name: str) -> Any:
        self.read.add(name)
        return self.cells.get(name)

    def text(self, name: str) -> str:
        return as_text(self.value(name), name)

    def leave_out_rest(self, texts: Sequence[str], unread: Iterable[str]) -> None:
        """Count what was not read. Refused where a column of it may matter. `unread`: columns that do not matter
        beside those that were read."""
        for name in self.filled:
            if name in self.read:
                continue
            value = self.cells[name]
            if not (name in unread or is_label(name, value) or self._said(name, value, texts)):
                raise Refused(f"the column {name!r} may belong to the prompt or the loss")
            self.count(name or "(without a name)")

    def _said(self, name: str, value: Any, texts: Sequence[str]) -> bool:
        """Whether a column only repeats what was read."""
        if not isinstance(value, str):
            return False
        if value in texts:
            return True
        if "instruction" not in self.read:
            return False
        if name == "answer":  # the label that ends the answer
            return re.search(rf"(?<!\w){re.escape(value)}\W*$", texts[-1]) is not None
        if name not in ("text", "prompt") or "history" in self.filled:
            return False
        order = ("system", "instruction", "input", "context", "output", "response")
        return _is_rendered(value, [str(self.cells.get(part, "")).strip() for part in order if part in self.read])


def _is_rendered(text: str, parts: Sequence[str]) -> bool:
    """Whether the parts come in order and the last is the end, but for end tokens."""
    for end in (text.rstrip(), _ENDS.sub("", text)):
        if end.endswith(parts[-1]):
            before, at = end.removesuffix(parts[-1]), 0
            for part in parts[:-1]:
                if (found := before.find(part, at)) < 0:
                    return False
                at = found + len(part)
            return before != "" and not before[-1].isalnum()
    return False


@lru_cache(1024)
def _lowered(key: str) -> str:
    return key.strip().lower()


def blank(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def is_label(name: str, value: Any) -> bool:
    """Whether a column keeps books: by its name, where its value is no text."""
    if name == "settings":
        return True
    if isinstance(value, list):
        return all(not isinstance(entry, list) and is_label(name, entry) for entry in value)
    if _PANDAS.fullmatch(name):
        return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    if isinstance(value, dict) or not _names_label(name):
        return False
    return not isinstance(value, str) or (len(value) <= LONGEST_LABEL and "\n" not in value)


@lru_cache(1024)
def _names_label(name: str) -> bool:
    if _FILES.match(name):
        return False
    if _WHOLE.fullmatch(name):
        return True
    found = _LABEL.fullmatch(name)
    return found is not None and (
        found[1] is None or _LAST_WORDS.fullmatch(found[1]) is not None or name.startswith(_NUMBERS)
    )


_NUMBERS = ("num_", "n_", "nr_", "no_")


def as_text(value: Any, name: str) -> str:
    """The text of a cell; a number of a JSON file is its digits."""
    if not isinstance(value, str):
        raise Refused(f"{name} is not text")
    return value if type(value) is str else str(value)
