"""What every row must become, as the reference formats write it."""

from collections.abc import Iterator, Mapping, Sequence

from ptst.audit.reference.formats import Reference
from ptst.audit.setup import BLOCK, Setup
from ptst.errors import UserError
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

    def in_order(self) -> Iterator[Reference | UserError]:
        """Those of all rows."""
        if self._kept is not None:
            yield from self._kept
            return
        for at in range(0, len(self), BLOCK):
            yield from build_references(self._conversations[at : at + BLOCK], self._setup, at)
