"""Segments to token ids, one trained-or-not flag each.

Every run of text between control tokens is encoded in one call: the natural tokenization, the one the model saw in its
own training. Only where that would change the ids of the prompt (an answer that begins with a newline, say) does the
prompt keep its ids and the answer is encoded as a continuation; the place is reported as a seam. So the ids of the
generation prompt are always an exact prefix of the training ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from ptst.text.formats import marks
from ptst.text.segments import Conversation, Segment
from ptst.text.templates import Family, Template, render
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids with a trained flag each; `seams` are the indices where an answer was encoded as a continuation."""

    ids: list[int]
    trained: list[bool]
    seams: tuple[int, ...] = ()

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True)
class Prompting:
    """Everything that turns a conversation into ids: shared by training and testing, so that they cannot differ."""

    template: Template
    family: Family
    chat_format: str
    tokenizer: Tokenizer
    allow_marks: bool = False

    def encode(self, conversation: Conversation, train: str = "all") -> Encoded:
        """Ids of the whole conversation, or, where it ends in a user turn, of the generation prompt.

        Raises ValueError, naming the row, for what the template or format cannot say, for text that is not Unicode,
        and, unless `allow_marks`, for messages that hold the chat format's own marks where those are plain text.
        """
        if not self.allow_marks and not self.template.is_text:
            refuse_marks(conversation, self.chat_format)
        segments = render(conversation, self.template, self.family, self.chat_format, self.tokenizer, train)
        try:
            return encode(segments, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{conversation.where}{error}") from None


def refuse_marks(conversation: Conversation, chat_format: str) -> None:
    """Raise ValueError if a message spells a mark of the format that is plain text: the model could not tell it from
    a real one, so a user's text could open or close a turn."""
    for number, message in enumerate(conversation.messages, 1):
        for mark in marks(chat_format):
            if mark in message.content:
                raise ValueError(
                    f"{conversation.where}message {number} ({message.role}) holds {mark}, a role mark of the format "
                    f"{chat_format}; take it out, or allow it with --allow-role-marks"
                )


def encode(segments: list[Segment], tokenizer: Tokenizer) -> Encoded:
    """Ids and flags of segments. Raises ValueError for lone surrogates and control tokens the tokenizer lacks."""
    ids: list[int] = []
    trained: list[bool] = []
    seams: list[int] = []
    for control, group in groupby(segments, key=lambda s: s.control):
        if control:
            for segment in group:
                ids.append(tokenizer.control_id(segment.text))
                trained.append(segment.trained)
            continue
        run = list(group)
        said = [s.sampled for s in run]
        assert said == sorted(said), "within a run of text, what the model says comes last"
        prompt = "".join(s.text for s in run if not s.sampled)
        reply = "".join(s.text for s in run if s.sampled)
        prompt_ids = tokenizer.encode(prompt)
        all_ids = tokenizer.encode(prompt + reply) if reply else prompt_ids
        if all_ids[: len(prompt_ids)] != prompt_ids:
            seams.append(len(ids) + len(prompt_ids))
            all_ids = prompt_ids + tokenizer.encode(reply, continuation=True)
        ids += all_ids
        flag = any(s.trained for s in run)
        trained += [False] * len(prompt_ids) + [flag] * (len(all_ids) - len(prompt_ids))
    return Encoded(ids, trained, tuple(seams))


def cut(encoded: Encoded, max_length: int) -> Encoded:
    """The first `max_length` tokens. A cut answer gets no terminator: the model is not taught to stop there."""
    seams = tuple(s for s in encoded.seams if s < max_length)
    return Encoded(encoded.ids[:max_length], encoded.trained[:max_length], seams)
