"""The words everything in this room speaks: messages come in, segments go to the tokenizer.

A segment is a stretch of a prompt with one author. Whether a token is trained follows from the segment it came from,
never from searching for marks in the ids afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptst.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn as data has it. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with the place they came from (`file:line`) for error messages and reports."""

    messages: tuple[Message, ...]
    source: str = ""

    def __post_init__(self) -> None:
        roles = [m.role for m in self.messages]
        for message in self.messages:
            if message.role not in ROLES:
                raise UserError(f"{self.where}role {message.role!r} is unknown; use {', '.join(ROLES)}")
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or any(r != ("user", "assistant")[i % 2] for i, r in enumerate(turns)):
            order = ", ".join(roles) or "nothing"
            raise UserError(
                f"{self.where}roles are {order}; an optional system, then user and assistant in turn, are needed"
            )

    @property
    def where(self) -> str:
        return f"{self.source}: " if self.source else ""

    @property
    def system(self) -> str | None:
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system prompt."""
        return self.messages[1:] if self.system is not None else self.messages

    @property
    def answered(self) -> bool:
        """Whether the last message is the assistant's, as a training example's must be."""
        return self.messages[-1].role == "assistant"

    def prompt(self) -> Conversation:
        """The conversation up to where the model must speak: without its final answer."""
        return Conversation(self.messages[:-1], self.source) if self.answered else self


@dataclass(frozen=True)
class Segment:
    """A stretch of one author (scaffold, system, user or assistant).

    `control` segments are one control token, by name; all others are text and never become one. `sampled` marks what
    the model itself says: answer prefix, answer, closing text, terminator. `trained` is the part of it that this run
    trains on. `apart`: encoded in a call of its own, because the format's owner does so.
    """

    text: str
    author: str = "scaffold"
    control: bool = False
    sampled: bool = False
    trained: bool = False
    apart: bool = False
