"""A document with the reference for its row, as the tests of `causes` need it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ptst.audit.causes.characters import quoted
from ptst.audit.causes.other_rows import OtherRows
from ptst.audit.causes.stretches import Layout, Stretch, stretches
from ptst.audit.reference.formats import Reference, reference
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.text.encode import first_difference
from ptst.text.segments import Conversation
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cause:
    """A rule that is broken, at a token of the document; None where it is about all of it."""

    rule: str
    token: int | None
    words: str
    expected: str = ""
    seen: str = ""

    @property
    def shown(self) -> tuple[str, str]:
        """What was expected and what was seen."""
        return self.expected, self.seen


def limited(ids: list[int], setup: Setup) -> list[int]:
    """The ids of a row, cut to the limit where the setup cuts rows."""
    return ids[: setup.max_length] if setup.too_long == "cut" else ids


@dataclass(frozen=True)
class Compared:
    """One document of a batch, with its loss mask and the reference for its row, and the other rows of the data."""

    ids: list[int]
    loss_mask: list[bool]
    reference: Reference
    conversation: Conversation
    setup: Setup
    others: OtherRows

    @property
    def tokenizer(self) -> Tokenizer:
        return self.setup.prompt_format.tokenizer

    @cached_property
    def is_cut(self) -> bool:
        """Whether the row must be cut to the limit."""
        limit = self.setup.max_length
        return self.setup.too_long == "cut" and limit is not None and len(self.reference.ids) > limit

    @cached_property
    def expected(self) -> list[int]:
        """The ids that the document must have."""
        return limited(self.reference.ids, self.setup)

    @property
    def tokens_agree(self) -> bool:
        return self.ids in (self.expected, self.reference.ids)

    @cached_property
    def at(self) -> int:
        """The first token that differs."""
        return first_difference(self.ids, self.expected)

    @cached_property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids)

    @cached_property
    def expected_text(self) -> str:
        return self.tokenizer.decode(self.expected)

    @cached_property
    def seen(self) -> list[Stretch]:
        return stretches(self.ids, self.tokenizer)

    @cached_property
    def layout(self) -> Layout:
        whole = replace(self.reference, ids=self.expected) if self.is_cut else self.reference
        return Layout(self.conversation, self.setup, whole)

    @property
    def stop(self) -> str:
        """The token that ends an answer."""
        return self.tokenizer.control_names[self.setup.prompt_format.terminator_id]

    @property
    def bos(self) -> str | None:
        """The tokenizer's BOS, where the chat format has one."""
        has_bos = self.setup.prompt_format.chat_format.has_bos(self.tokenizer)
        return self.tokenizer.bos if has_bos else None

    def control(self, ids: Sequence[int], index: int) -> str | None:
        """The name of the control token at an index."""
        return self.tokenizer.control_names.get(ids[index]) if 0 <= index < len(ids) else None

    def controls(self, ids: Sequence[int]) -> list[str]:
        """The names of all control tokens, in order."""
        names = self.tokenizer.control_names
        return [names[i] for i in ids if i in names]

    def show(self, ids: Sequence[int], at: int) -> str:
        """One token for a reader."""
        if not 0 <= at < len(ids):
            return "the end"
        name = self.tokenizer.control_names.get(ids[at])
        if name is not None:
            return name
        first = next((i + 1 for i in range(at - 1, max(-1, at - 8), -1) if ids[i] in self.tokenizer.control_names), 0)
        run, after = list(ids[max(first, at - 7) : at + 1]), self.control(ids, first - 1)
        before = self.tokenizer.decode_text(run[:-1], after) if len(run) > 1 else ""
        return f"{quoted(self.tokenizer.decode_text(run, after)[len(before) :])} id {ids[at]}"

    def cause(self, rule: str, words: str, expected: str | None = None, seen: str | None = None) -> Cause:
        """A cause at the first difference; by default the two tokens there are shown."""
        shown = self.show(self.expected, self.at) if expected is None else expected
        return Cause(rule, self.at, words, shown, self.show(self.ids, self.at) if seen is None else seen)

    def written_layout(self, conversation: Conversation | None = None, **changes: object) -> Layout | None:
        """Another conversation, or this one under a changed prompt format (`changes` of its fields), held to the same
        limit; None where that cannot be written."""
        try:
            changed = replace(self.setup, prompt_format=replace(self.setup.prompt_format, **changes))  # type: ignore[arg-type]
            row = conversation or self.conversation
            whole = reference(row, changed.prompt_format, changed.train_on)
        except (UserError, LookupError, ValueError, AssertionError):
            return None
        return Layout(row, changed, replace(whole, ids=limited(whole.ids, changed)))

    def written(self, conversation: Conversation | None = None, **changes: object) -> list[int] | None:
        """The ids of the same."""
        layout = self.written_layout(conversation, **changes)
        return None if layout is None else layout.reference.ids

    def written_text(self, conversation: Conversation | None = None, **changes: object) -> str | None:
        """The same, decoded."""
        ids = self.written(conversation, **changes)
        return None if ids is None else self.tokenizer.decode(ids)
