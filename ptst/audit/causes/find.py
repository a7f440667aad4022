"""Why a document's tokens are not those of its row: each test knows one kind of cause, and the first that explains the
difference names it. What follows from that cause is no finding of its own."""

from collections.abc import Callable

from ptst.audit.causes.characters import difference
from ptst.audit.causes.compared import Cause, Compared
from ptst.audit.causes.control import (
    control_cause,
    cut_cause,
    cut_left_cause,
    double_bos_cause,
    end_of_cut_cause,
    forged_cause,
    inserted_cause,
    removed_cause,
    same_text_cause,
)
from ptst.audit.causes.text import (
    other_row_cause,
    other_turns_cause,
    other_words_cause,
    stretch_cause,
    system_cause,
    system_moved_cause,
)


def _same_controls(c: Compared) -> Cause | None:
    """The difference lies in the text if the control tokens are those of the row."""
    return stretch_cause(c) if c.controls(c.ids) == c.controls(c.expected) else None


def _other_text(c: Compared) -> Cause | None:
    return stretch_cause(c) or c.cause("text-differs", "other text", *difference(c.expected_text, c.text)[1:])


# In this order: from the cause that explains the whole document to the one that only names the first difference.
TESTS: tuple[Callable[[Compared], Cause | None], ...] = (
    cut_cause,
    same_text_cause,
    double_bos_cause,
    forged_cause,
    end_of_cut_cause,
    other_row_cause,
    system_cause,
    inserted_cause,
    removed_cause,
    other_turns_cause,
    _same_controls,
    other_words_cause,
    cut_left_cause,
    system_moved_cause,
    control_cause,
    _other_text,
)


def why_tokens_differ(c: Compared) -> Cause:
    """The likely cause of the first difference."""
    return next(cause for test in TESTS if (cause := test(c)) is not None)
