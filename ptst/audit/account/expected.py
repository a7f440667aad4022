"""What every row must become, as the reference formats write it."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from ptst.audit.account.fates import Fate, expected_document, find_fate
from ptst.audit.agreement import agreed_ids
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import BLOCK, Setup
from ptst.errors import UserError
from ptst.text.encode import Example
from ptst.text.segments import Conversation

MOST = 16 * BLOCK  # rows up to which their references are kept: each takes several times its example
UNANSWERED = "the conversation ends without an assistant turn to train on"


def build_references(
    conversations: Sequence[Conversation], setup: Setup, first: int = 0
) -> list[Reference | UserError]:
    """The reference of every row under the setup of its source, or why it has none. `first`: the index of the first row
    among those of all sources."""
    found: list[Reference | UserError] = []
    for rows, own in setup.stretches(first + len(conversations), first):
        part = conversations[rows.start - first : rows.stop - first]
        answered = iter(own.oracle.references([c for c in part if c.answered], own.train_on))
        found += [next(answered) if c.answered else UserError(UNANSWERED, "", c.source) for c in part]
    return found


class ReferencesByRow(Mapping[int, Reference | UserError]):
    """The reference of every row, made where it is asked for; of data that are not large, made once."""

    def __init__(self, conversations: Sequence[Conversation], setup: Setup):
        self._conversations, self._setup = conversations, setup
        self._kept = build_references(conversations, setup) if len(conversations) <= MOST else None

    def __getitem__(self, row: int) -> Reference | UserError:
        if self._kept is not None:
            return self._kept[row]
        return build_references([self._conversations[row]], self._setup, row)[0]

    def __len__(self) -> int:
        return len(self._conversations)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def blocks(self) -> Iterator[tuple[int, list[Conversation], list[Reference | UserError]]]:
        """All rows, some thousands at a time: the index of the first, the rows, and their references."""
        for at in range(0, len(self), BLOCK):
            rows = list(self._conversations[at : at + BLOCK])
            kept = None if self._kept is None else self._kept[at : at + BLOCK]
            yield at, rows, build_references(rows, self._setup, at) if kept is None else kept


class Expected:
    """By row, what must become of it (`fates`), and the hash of the document that it must be (`hashes`; 0 without one).
    `plain`: 1 for a row of whose document nothing is to be said, not even a note, if that has this hash."""

    def __init__(self) -> None:
        self.fates, self.hashes, self.plain = list[Fate](), array("Q"), bytearray()

    @classmethod
    def of(cls, references: ReferencesByRow, setup: Setup) -> Self:
        """Those of all rows."""
        expected, known = cls(), dict[Fate, Fate]()  # most fates are that of another row as well
        for first, rows, found in references.blocks():
            prompts = build_prompts(rows, setup, first)
            for row, (reference, prompt) in enumerate(zip(found, prompts, strict=True), first):
                own = setup.of_row(row)
                fate = find_fate(reference, own)
                expected.fates.append(known.setdefault(fate, fate))
                expected.hashes.append(expected_document(reference, own) if fate.is_example else 0)
                without_notes = fate.is_example and not fate.boundaries
                expected.plain.append(without_notes and agreed_ids(reference, prompt, own) is not None)
        return expected


def build_prompts(rows: Sequence[Conversation], setup: Setup, first: int = 0) -> list[Example | UserError]:
    """The prompt of every row at test time, under the setup of its source. `first`: as in `build_references`."""
    found: list[Example | UserError] = []
    for stretch, own in setup.stretches(first + len(rows), first) if rows else ():
        asked = [row.prompt() for row in rows[stretch.start - first : stretch.stop - first]]
        found += own.prompt_format.encode_all(asked)
    return found
