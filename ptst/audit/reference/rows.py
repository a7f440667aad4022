"""Every row of the data, from the file to its conversation: none lost, doubled, exchanged or altered.

The files are read a second time by rules that share nothing with `ptst.data` (`reference.files`, `reference.layouts`),
row by row beside the conversations. Where both agree, that is all. Where they do not, everything is compared by place
(`file:line`), so that each row is told with what happened to it.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import BUILT_IN, check_word_problems
from ptst.audit.reference.builtin_chats import BUILT_IN_CHATS, check_chats
from ptst.audit.reference.columns import Columns, Refused, Unknown
from ptst.audit.reference.files import Row, file_rows
from ptst.audit.reference.layouts import Meant, Said, meaning
from ptst.collector import paused_collector
from ptst.data.paths import data_files
from ptst.data.readers import KINDS
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class Request:
    """What was asked of a source: its name as the user typed it, and the settings that say which rows are read, and
    how. `errors`: of the rows that could not be read. `in_turn`: rows beyond `limit` are not to be fetched."""

    name: str
    split: str = "train"
    limit: int | None = None
    holdout: float = 0.0
    columns: Columns = field(default_factory=Columns)
    errors: Sequence[UserError] = ()
    in_turn: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """A row as this reading has it. `meant` None: it may not be read (`refused` says why), or no rule is known."""

    place: str
    meant: Meant | None
    refused: str = ""


def check_source(source: Source, request: Request) -> Iterator[Finding]:
    """Compare a source with its files: rules `row-lost`, `row-twice`, `row-unknown`, `row-exchanged`, `row-differs`,
    `split-leak`, `column-lost`, `family-differs`, and `rows-unchecked` where the rows cannot be read again."""
    base, is_file = re.split("[:@]", request.name, maxsplit=1)[0], Path(request.name).exists()
    built_in = {BUILT_IN: check_word_problems, **dict.fromkeys(BUILT_IN_CHATS, check_chats)}
    if base in built_in and not is_file:
        yield from built_in[base](source, request.name, request.split, request.limit)
        return
    try:
        walk = _Walk(request, source.conversations)
        with paused_collector():
            agrees = walk.agrees()
    except _NotAtHand as reason:
        yield Finding("rows-unchecked", "", f"{request.name} could not be read a second time ({reason})")
        return
    if not agrees:
        yield from _differences(list(_expected(request)), source.conversations, request)
    yield from walk.check_counts(source)


class _NotAtHand(Exception):
    """The rows cannot be read again."""


class _Walk:
    """One pass over the rows beside the conversations, which keeps nothing but counts."""

    def __init__(self, request: Request, conversations: Sequence[Conversation]):
        self._request, self._conversations = request, conversations
        self.unused, self.families = Counter[str](), set[str]()
        self.unknown, self.worked, self.num_read = list[str](), True, 0

    def agrees(self) -> bool:
        """Whether the conversations are those of the rows, in their order."""
        request, bad, at, good = self._request, _places(self._request.errors), 0, True
        seen = _InOrder(self._conversations)
        for row in _expected(request):
            if row.place in bad:
                continue
            conversation = seen[at] if at < len(seen) else None
            here = conversation is not None and conversation.source == row.place
            if row.meant is None:
                self.unknown += [] if row.refused else [row.place]
                good = good and not row.refused
                at += here
                continue
            self._count(row.meant)
            if request.holdout and split_of(row.meant.messages, request.holdout) != request.split:
                continue
            if request.holdout and request.limit is not None and at >= request.limit:
                continue
            good = good and conversation is not None and here and said(conversation) == row.meant.messages
            at += 1
        return good and at == len(seen)

    def _count(self, meant: Meant) -> None:
        self.num_read += 1
        for name, number in meant.unused.items():
            self.unused[name] += number
        self.families.add(meant.family)
        self.worked = self.worked and "\n####" in "\n" + meant.messages[-1][1]

    def check_counts(self, source: Source) -> Iterator[Finding]:
        """The columns that were not read, and the template family that the rows tell."""
        if self.unknown:
            cause = f"{len(self.unknown)} rows have a layout that is only compared by its cells"
            yield Finding("rows-unchecked", self.unknown[0], cause)
            return
        if not self._request.errors:
            for name in sorted(self.unused.keys() | source.unused.keys()):
                expected, seen = self.unused[name], source.unused.get(name, 0)
                if expected != seen:
                    cause = f"{name} is said to be left out of {seen} rows, and {expected} rows have it"
                    yield Finding("column-lost", "", cause, expected=f"{name} ({expected})", seen=f"{name} ({seen})")
        base = re.split("[:@]", self._request.name, maxsplit=1)[0]
        named = base in _HUB and not Path(self._request.name).is_file()
        told = next(iter(self.families)) if len(self.families) == 1 else ""
        own = "gsm8k" if base == "orca-math" else base
        family = own if named else told or ("gsm8k" if self.worked and self.num_read else "plain")
        if family != source.family and self.num_read:
            cause = f"the rows are of the template family {family}, and {source.family} was told"
            yield Finding("family-differs", "", cause, expected=family, seen=source.family)


class _InOrder:
    """Conversations that are looked at from the first to the last: of those that lie on disk, some thousands are read
    at once."""

    def __init__(self, conversations: Sequence[Conversation]):
        self._every, self._here, self._first = conversations, conversations[:0], 0
        self._number = len(conversations)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, at: int) -> Conversation:
        if not self._first <= at < self._first + len(self._here):
            self._here, self._first = self._every[at : at + 4096], at
        return self._here[at - self._first]


def _places(errors: Iterable[UserError]) -> set[str]:
    """The rows that errors speak of; those of a message add its number."""
    return {place for e in errors for place in (e.where, re.sub(r", message \d+$", "", e.where))}


def _expected(request: Request) -> Iterator[Expected]:
    for row in islice(_readable(_rows(request)), None if request.holdout else request.limit):
        if row.cells is None:
            yield Expected(row.place, None, row.cause)
            continue
        try:
            yield Expected(row.place, meaning(row.cells, request.columns))
        except Refused as refused:
            yield Expected(row.place, None, str(refused))
        except Unknown:
            yield Expected(row.place, None)


def said(conversation: Conversation) -> tuple[Said, ...]:
    return tuple([(m.role, m.content, m.trained) for m in conversation.messages])


def split_of(messages: Sequence[Said], holdout: float) -> str:
    """The split of a row by the sha256 of its messages, as docs/tasks.md has it: of the numbers from 0 to 1, the
    lowest half of `holdout` is the validation set, the highest the test set."""
    listed = [[role, text] if trained else [role, text, False] for role, text, trained in messages]
    number = int(hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16], 16) / 2**64
    if number < holdout / 2:
        return "validation"
    return "test" if number >= 1 - holdout / 2 else "train"


# The named sets of the hub: folder, configuration and split.
_HUB: dict[str, dict[str, tuple[str, str | None, str]]] = {
    "gsm8k": {"train": ("openai/gsm8k", "main", "train")},
    "chatdoctor": {"train": ("lavita/ChatDoctor-HealthCareMagic-100k", None, "train")},
    "openorca": {"train": ("Open-Orca/OpenOrca", None, "train")},
    "orca-math": {"train": ("microsoft/orca-math-word-problems-200k", None, "train")},
}
for _split in ("validation", "test"):
    _HUB["gsm8k"][_split] = _HUB["orca-math"][_split] = ("openai/gsm8k", "main", "test")
    _HUB["chatdoctor"][_split] = ("lavita/ChatDoctor-iCliniq", None, "train")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?(?:@([\w./-]+))?")


def _readable(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; a file that this reading cannot go on with is not compared."""
    try:
        yield from rows
    except (ValueError, LookupError, OSError, csv.Error) as error:
        raise _NotAtHand(f"{type(error).__name__}: {error}") from None


def _rows(request: Request) -> Iterator[Row]:
    base, _, rest = request.name.partition(":")
    if base in _HUB and not Path(request.name).is_file() and rest and not re.fullmatch(r"\d+(@[\w./-]+)?", rest):
        return chain.from_iterable(map(file_rows, data_files(rest, KINDS)))
    if (found := data_files(request.name, KINDS)) and all(path.exists() for path in found):
        return chain.from_iterable(map(file_rows, found))
    return _hub_rows(request)


def _hub_rows(request: Request) -> Iterator[Row]:
    """The rows of a data set of the hub, once more from the copy that the first reading left."""
    import datasets

    split, count, name = "train" if request.holdout else request.split, 0, request.name
    if re.split("[:@]", name, maxsplit=1)[0] in _HUB:
        asked, _, revision = name.partition("@")
        name, _, number = asked.partition(":")
        repository, config, split = _HUB[name][split]
        count = int(number or 0)
    elif found := _ID.fullmatch(name):
        repository, config, split, revision = found[1], found[2], found[3] or split, found[4] or ""
    else:
        raise _NotAtHand("it is neither a file nor a name of the hub")
    how = ({"revision": revision} if revision else {}) | ({"streaming": True} if request.in_turn else {})
    try:
        rows = datasets.load_dataset(repository, config, split=split, **how)
    except Exception as error:  # any: without a network, this reading is left out and says so
        raise _NotAtHand(type(error).__name__) from None
    if count:
        rows = rows.shuffle(seed=0).select(range(min(count, len(rows))))
    return (Row(f"{name}/{split}:{i}", row) for i, row in enumerate(rows, 1))


def _differences(
    rows: Sequence[Expected], conversations: Sequence[Conversation], request: Request
) -> Iterator[Finding]:
    """What happened to each row, by place."""
    bad, splits = _places(request.errors), dict[str, str]()
    wanted = list[Expected]()
    for row in rows:
        split = split_of(row.meant.messages, request.holdout) if row.meant and request.holdout else request.split
        splits[row.place] = split
        if row.place not in bad and split == request.split and not (request.holdout and row.meant is None):
            wanted.append(row)
    wanted = wanted[: request.limit] if request.holdout else wanted
    by_place = {row.place: row for row in rows}
    due, seen = Counter(row.place for row in wanted), Counter(c.source for c in conversations)
    for row in wanted:
        if seen[row.place] < due[row.place]:
            due[row.place] = seen[row.place]
            yield Finding("row-lost", row.place, "the row is in the file, and no conversation comes from it")
    for place, number in seen.items():
        known = by_place.get(place)
        if known is None or (place not in due and place not in bad and splits[place] == request.split):
            if known is None or known.meant is not None:
                yield Finding("row-unknown", place, "no row that was asked for has this place")
        elif splits[place] != request.split:
            cause = f"the row belongs to the {splits[place]} set and was read for the {request.split} set"
            yield Finding("split-leak", place, cause)
        elif number > due[place] and not (request.holdout and known.meant is None):
            what = "and its error" if place in bad else f"{number} conversations come from it"
            yield Finding("row-twice", place, f"the row is used more than once: {what}")
    yield from _out_of_order([row.place for row in wanted], [c.source for c in conversations])
    owners = {row.meant.messages: row.place for row in reversed(rows) if row.meant}
    for conversation in conversations:
        if known := by_place.get(conversation.source):
            yield from _check_messages(conversation, known, owners)


def _out_of_order(wanted: Sequence[str], seen: Sequence[str]) -> Iterator[Finding]:
    """The first conversation that comes before one whose row is earlier in the file."""
    known = {place: number for number, place in enumerate(wanted)}
    numbers = [known[place] for place in seen if place in known]
    for before, after in pairwise(numbers):
        if after < before:
            cause = f"the row comes after {wanted[before]}, which follows it in the file"
            yield Finding("row-exchanged", wanted[after], cause)
            return


def _check_messages(
    conversation: Conversation, row: Expected, owners: dict[tuple[Said, ...], str]
) -> Iterator[Finding]:
    """The messages of a conversation against those of its row."""
    seen = said(conversation)
    if row.refused:
        cause = f"the row was read, and it may not be: {row.refused}"
        yield Finding("row-differs", row.place, cause, expected="an error", seen=f"{len(seen)} messages")
    elif row.meant is None or seen == row.meant.messages:
        return
    elif seen in owners:
        cause = f"the conversation has the messages of {owners[seen]}"
        yield Finding("row-exchanged", row.place, cause, expected=_short(row.meant.messages), seen=_short(seen))
    else:
        yield _difference(row.place, row.meant.messages, seen)


def _short(messages: Sequence[Said]) -> str:
    return repr(messages[-1][1][:40])


def _difference(place: str, expected: Sequence[Said], seen: Sequence[Said]) -> Finding:
    """The first message that differs, around its first other character."""
    if len(expected) != len(seen):
        shown = ["|".join(role for role, *_ in side) for side in (expected, seen)]
        return Finding("row-differs", place, "the number of messages differs", expected=shown[0], seen=shown[1])
    number = next(i for i, pair in enumerate(zip(expected, seen, strict=True), 1) if pair[0] != pair[1])
    (role, text, trained), (other, got, flag) = expected[number - 1], seen[number - 1]
    if role != other:
        return Finding("row-differs", place, f"message {number} has another role", expected=role, seen=other)
    if text == got:
        sides = ["trained" if side else "not trained" for side in (trained, flag)]
        return Finding("row-differs", place, f"message {number} ({role})", expected=sides[0], seen=sides[1])
    at = next((i for i, (a, b) in enumerate(zip(text, got, strict=False)) if a != b), min(len(text), len(got)))
    shown = [repr(side[max(0, at - 12) : at + 24]) for side in (text, got)]
    cause = f"message {number} ({role}) differs at character {at}"
    return Finding("row-differs", place, cause, expected=shown[0], seen=shown[1])
