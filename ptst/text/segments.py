"""Messages, as data has them, and segments, as the tokenizer gets them.

A segment is a stretch of a prompt with one author. The loss mask follows from the segment that a token came from, never
from searching for role markers in the ids afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from ptst.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)  # there are as many as a data set has messages
class Message:
    """One message of the data. `role` is system, user or assistant. `trained`: whether an answer is trained on; one
    that is not is read all the same."""

    role: str
    content: str
    trained: bool = True


@lru_cache(1024)
def _in_turn(roles: tuple[str, ...]) -> bool:
    turns = roles[1:] if roles[:1] == ("system",) else roles
    return bool(turns) and all(role == ROLES[1 + i % 2] for i, role in enumerate(turns))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: an optional system prompt, then user and assistant in turn. `source` is the row they came from
    (`file:line`). Raises UserError for other roles or another order."""

    messages: tuple[Message, ...]
    source: str = ""

    def __post_init__(self) -> None:
        roles = tuple([m.role for m in self.messages])
        if _in_turn(roles):
            return
        for role in roles:
            if role not in ROLES:
                raise UserError(f"role {role!r} is unknown", f"use {', '.join(ROLES)}", self.source)
        cause = f"roles are {', '.join(roles) or 'missing'}"
        raise UserError(cause, "give an optional system message, then user and assistant in turn", self.source)

    @property
    def where(self) -> str:
        """The row as the beginning of a message."""
        return f"{self.source}: " if self.source else ""

    @property
    def system(self) -> str | None:
        """The system prompt, None where there is none."""
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system prompt."""
        return self.messages[1:] if self.system is not None else self.messages

    @property
    def answered(self) -> bool:
        """Whether the last message is the assistant's, as a training example's must be."""
        return self.messages[-1].role == "assistant"

    def to_json(self) -> list[dict[str, str]]:
        """The messages as chat templates and data files have them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]

    def prompt(self) -> "Conversation":
        """The conversation without its final answer: what a test prompt is made of."""
        return Conversation(self.messages[:-1], self.source) if self.answered else self


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one author: the data's system, user or assistant, or the scaffold (template and chat format).

    `control`: one control token, by name; other segments are text and never become one. `sampled`: the model itself
    produces it at test time (answer prefix, answer, closing text, terminator). `trained`: the part of it that this run
    trains on. `apart`: encoded by a tokenizer call of its own, because the format's owner does so."""

    text: str
    author: str = "scaffold"
    control: bool = False
    sampled: bool = False
    trained: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's or assistant's turn in a template's words, split by author. `demonstration`: shown, never trained."""

    role: str
    segments: tuple[Segment, ...]
    demonstration: bool = False


def plain_turns(messages: Sequence[Message]) -> list[Turn]:
    """Messages as turns, with no words of a template."""
    return [Turn(m.role, (Segment(m.content, m.role),)) for m in messages]


def leave_out(segments: Sequence[Segment], answers: Sequence[bool]) -> list[Segment]:
    """The segments with only those answers trained that `answers` says, which has an entry for each of the last ones: a
    conversation may begin with answers of a demonstration."""
    runs = [list(run) for _, run in groupby(segments, lambda s: s.sampled)]
    sampled = [run for run in runs if run[0].sampled]
    for run, trained in zip(reversed(sampled), reversed(answers), strict=False):
        if not trained:
            run[:] = [replace(segment, trained=False) for segment in run]
    return [segment for run in runs for segment in run]
