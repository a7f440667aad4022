"""What every row must become, as the reference formats write it."""

from collections.abc import Sequence

from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.text.segments import Conversation

UNANSWERED = "the conversation ends without an assistant turn to train on"


def build_references(conversations: Sequence[Conversation], setup: Setup) -> list[Reference | UserError]:
    """The reference of every row, or why it has none."""
    answered = iter(setup.oracle.references([c for c in conversations if c.answered], setup.train_on))
    return [next(answered) if c.answered else UserError(UNANSWERED, "", c.source) for c in conversations]
