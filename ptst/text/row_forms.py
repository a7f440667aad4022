"""The form of a row: its segments, laid out as what is encoded in one call each, with places for the texts of messages.

Conversations of the same roles differ under one prompt format in these texts alone, so that one form serves them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from ptst.errors import UserError
from ptst.text.base_tokenizer import Run
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.tokenizer import Tokenizer

Runs = tuple[Run, Run]  # the prompt's part of a run of text, and all of it; the same object where that is all
Pieces = list[str | int]  # texts, and indices of messages


@dataclass(slots=True)
class RunForm:
    """Segments that are encoded in one call: a control token (`given` None), or a run of text. `given`, `said`: what
    the prompt has of it, and what the model samples, which comes last. `fixed`: the run itself, where it holds no
    message's text."""

    segments: list[Segment]
    bare: bool = False
    given: Pieces | None = None
    said: Pieces | None = None
    fixed: Runs | None = None
    trained: bool = False
    words: tuple["Words", "Words"] | None = None

    def set(self, given: Pieces, said: Pieces) -> None:
        """Set what it is made of."""
        self.given, self.said, self.words = given, said, (Words(given), Words(said))
        self.trained = any(segment.trained for segment in self.segments)
        if all(isinstance(piece, str) for piece in (*given, *said)):
            self.fixed = self.fill(())

    def fill(self, texts: Sequence[str]) -> Runs:
        """The run with the texts of messages."""
        assert self.words is not None
        given, said = self.words
        prompt = given.fill(texts)
        run = prompt, self.bare
        return run, ((prompt + said.fill(texts), self.bare) if self.said else run)

    def parts(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        """(author, text) of each segment."""
        pieces = [*(self.given or ()), *(self.said or ())]
        filled = [piece if isinstance(piece, str) else texts[piece] for piece in pieces]
        return [(segment.author, text) for segment, text in zip(self.segments, filled, strict=True)]


class Words:
    """Pieces to fill many times: one place with words around it, mostly."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        texts = ["".join(map(str, run)) for is_place, run in groupby(pieces, _is_place) if not is_place]
        places = [piece for piece in pieces if isinstance(piece, int)]
        self._place = places[0] if len(places) == 1 else None
        self._constant = "".join(texts) if not places else None
        first = bool(pieces) and _is_place(pieces[0])
        self._before = "" if first or not texts else texts[0]
        self._after = "" if not texts or _is_place(pieces[-1]) else texts[-1]

    def fill(self, texts: Sequence[str]) -> str:
        """All of them as one text."""
        if self._place is not None:
            return f"{self._before}{texts[self._place]}{self._after}"
        if self._constant is not None:
            return self._constant
        return "".join([piece if isinstance(piece, str) else texts[piece] for piece in self._pieces])


def _is_place(piece: str | int) -> bool:
    return isinstance(piece, int)


class RowForm:
    """The runs of a row. `places`: indices of the segments whose text is a message's, with the message's index."""

    def __init__(self, segments: Sequence[Segment], tokenizer: Tokenizer, places: dict[int, int] | None = None):
        self.runs: list[RunForm] = []
        after: str | None = None  # the control token before
        pieces: list[Pieces] = []
        for at, segment in enumerate(segments):
            piece = segment.text if places is None else places.get(at, segment.text)
            if segment.control:
                self.runs.append(RunForm([segment]))
                after = segment.text
            elif segment.apart or not self.runs or self.runs[-1].segments[0].control:
                self.runs.append(RunForm([segment], tokenizer.is_bare(after), [piece]))
                pieces.append([piece])
            else:
                self.runs[-1].segments.append(segment)
                pieces[-1].append(piece)
        for run, own in zip((run for run in self.runs if run.given is not None), pieces, strict=True):
            number = sum(not segment.sampled for segment in run.segments)
            last = all(segment.sampled for segment in run.segments[number:])
            assert last, "within a run of text, what the model samples comes last"
            run.set(own[:number], own[number:])

    @cached_property
    def open(self) -> list[RunForm]:
        """The runs that hold texts of messages."""
        return [run for run in self.runs if run.given is not None and run.fixed is None]

    @cached_property
    def fixed(self) -> list[Runs]:
        """The runs that are the same in every row."""
        return [run.fixed for run in self.runs if run.fixed is not None]


Row = tuple[RowForm, Sequence[str]]  # with the texts of its messages


class Forms:
    """The forms of rows under one prompt format. `render`: the segments of a conversation, which depend on the texts of
    its messages only in that they hold them."""

    def __init__(self, render: Callable[[Conversation], list[Segment]], tokenizer: Tokenizer):
        self._render, self._tokenizer = render, tokenizer
        self._known: dict[Any, RowForm | None] = {}

    def row(self, conversation: Conversation) -> Row:
        """The row of a conversation. Raises UserError as `render` does."""
        messages = conversation.messages
        roles = tuple([(m.role, m.trained) for m in messages])
        # A system prompt may be joined to a template's words; most are those of many rows.
        for key, number in ((roles, 0), ((roles, messages[0].content), 1)):
            if key not in self._known:
                self._known[key] = self._form(conversation, number)
            if (form := self._known[key]) is not None:
                return form, [m.content for m in messages]
        return RowForm(self._render(conversation), self._tokenizer), ()

    def _form(self, conversation: Conversation, first: int) -> RowForm | None:
        """The form of conversations with these roles, and the texts of the messages before the `first`; None where
        another's text is joined to other words, or stands in several places or none."""
        messages = list(conversation.messages)
        marks = {at: f"\0message {at}\0" for at in range(first, len(messages))}
        for at, mark in marks.items():
            messages[at] = Message(messages[at].role, mark, messages[at].trained)
        try:
            segments = self._render(Conversation(tuple(messages), conversation.source))
        except UserError:
            return None  # the conversation itself will have it, in its own words
        places = {}
        for number, mark in marks.items():
            found = [at for at, segment in enumerate(segments) if mark in segment.text]
            if len(found) != 1 or segments[found[0]].text is not mark or segments[found[0]].control:
                return None
            places[found[0]] = number
        return RowForm(segments, self._tokenizer, places)
