"""What every row must become, as the reference formats write it."""

from collections.abc import Sequence

from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.text.segments import Conversation

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
