"""Texts of the whole data set by what they say, to tell whose text is in a row's place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ptst.audit.causes.stretches import Piece, Stretch
from ptst.text.segments import Conversation

if TYPE_CHECKING:
    from ptst.audit.causes.compared import Compared

MOST = 8  # rows that are tried for one document


class OtherRows:
    """The rows of a data set, of those that lie on disk some. Its index is built when a difference is first looked up.
    `found`: the other ways to write a row that explained documents, newest last; `failed`: documents that none
    explained."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = conversations
        self.found: list[str] = []
        self.failed = 0

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        nearby = getattr(self.conversations, "nearby", None)  # of rows that lie on disk
        for row, conversation in nearby() if nearby else enumerate(self.conversations):
            for number, message in enumerate(conversation.messages):
                found.setdefault(message.content, []).append((row, number))
        return found

    def having(self, text: str) -> list[tuple[Conversation, int]]:
        """The first rows with a message of this text, and the message's index."""
        return [(self.conversations[row], number) for row, number in self._places.get(text, ())[:MOST]]


_newest: list[OtherRows] = []  # that of the data set whose batches are checked


def other_rows(conversations: Sequence[Conversation]) -> OtherRows:
    """The index of a data set, built once for all of its batches."""
    if not _newest or _newest[0].conversations is not conversations:
        _newest[:] = [OtherRows(conversations)]
    return _newest[0]


def message_pattern(pieces: Sequence[Piece], of_system: bool = False) -> str | None:
    """A regular expression of a stretch: the scaffold's words, and anything in the places of messages (`of_system`: of
    the system prompt, too). None without a message."""
    if all(p.message is None for p in pieces) or sum(len(p.text) for p in pieces) > 50_000:
        return None
    parts = ["(.*?)" if p.message is not None or (of_system and p.is_system) else re.escape(p.text) for p in pieces]
    if pieces[-1].message is None and not pieces[-1].text.strip():
        parts[-1] = f"(?:{parts[-1]})?"  # some formats close answers otherwise in conversations of one turn
    return "".join(parts)


def rows_in(c: Compared, seen: Sequence[Stretch]) -> Iterator[Conversation]:
    """Other rows that have a message which the first stretches hold in the place of one."""
    patterns = {pattern for pieces in c.layout.pieces if (pattern := message_pattern(pieces)) is not None}
    tried: set[str] = set()
    for stretch in seen[: 8 * MOST]:
        for pattern in patterns:
            match = re.fullmatch(pattern, stretch.text, re.DOTALL) if stretch.control is None else None
            for text in filter(None, match.groups() if match else ()):
                for other, _ in c.others.having(text):
                    if other.source not in tried and other != c.conversation and other.answered and len(tried) < MOST:
                        tried.add(other.source)
                        yield other
