"""Documents as stretches: control tokens one by one, and the text between them, in pieces by who wrote what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest

from ptst.audit.reference.formats import Reference, template_words
from ptst.audit.setup import Setup
from ptst.text.segments import Conversation
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of a stretch: a message of the row (`message`: its index), the system prompt, or words of the scaffold."""

    text: str
    message: int | None = None
    is_system: bool = False

    @property
    def is_scaffold(self) -> bool:
        return self.message is None and not self.is_system


@dataclass(frozen=True)
class Stretch:
    """Tokens `start` to `end`: one control token (`control`: its name), or all text up to the next one."""

    start: int
    end: int
    control: str | None
    text: str


def stretches(ids: Sequence[int], tokenizer: Tokenizer) -> list[Stretch]:
    """The stretches of a document."""
    out: list[Stretch] = []
    start, after = 0, None
    for name, run in groupby(ids, tokenizer.control_names.get):
        run_ids = list(run)
        if name is None:
            out.append(Stretch(start, start + len(run_ids), None, tokenizer.decode_text(run_ids, after)))
        else:
            out += [Stretch(start + i, start + i + 1, name, name) for i in range(len(run_ids))]
        start, after = start + len(run_ids), name
    return out


@dataclass(frozen=True)
class Layout:
    """What a row's document must be: the reference and its stretches with their pieces."""

    conversation: Conversation
    setup: Setup
    reference: Reference

    @cached_property
    def stretches(self) -> list[Stretch]:
        return stretches(self.reference.ids, self.setup.prompt_format.tokenizer)

    @cached_property
    def system(self) -> str | None:
        """The system prompt, in the template's words."""
        return template_words(self.conversation, self.setup.prompt_format)[0]

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """The pieces of each stretch; one of scaffold where the tokenizer loses text, so that they are not known."""
        numbers = (i for i, m in enumerate(self.conversation.messages) if m.role != "system")
        written = [pieces for pieces in _pieces(self.reference, numbers) if any(p.text for p in pieces)]
        out = []
        for stretch, pieces in zip_longest(self.stretches, written[: len(self.stretches)], fillvalue=None):
            assert stretch is not None
            shown = _cut(pieces or [], len(stretch.text))
            out.append(shown if "".join(p.text for p in shown) == stretch.text else [Piece(stretch.text)])
        return out

    @cached_property
    def spans(self) -> list[tuple[int, int, Piece]]:
        """The tokens of each message and system prompt: (first, end, piece). A token on a border belongs to both."""
        out = []
        for stretch, pieces in zip(self.stretches, self.pieces, strict=True):
            ends = _text_ends(self.reference.ids[stretch.start : stretch.end], stretch, self.setup)
            done = 0
            for piece in pieces:
                first, last = done, done + len(piece.text)
                done = last
                inside = [i for i, (a, b) in enumerate(ends) if a < last and b > first]
                if not piece.is_scaffold and inside:
                    out.append((stretch.start + inside[0], stretch.start + inside[-1] + 1, piece))
        return out


def _pieces(written: Reference, numbers: Iterator[int]) -> Iterator[list[Piece]]:
    """The pieces of each stretch of a reference: runs without a control token between them are one. `numbers`: the
    indices of its messages without the system prompt."""
    for is_control, runs in groupby((run for _, run in written.runs), lambda run: run.control):
        if is_control:
            yield from ([Piece(run.text)] for run in runs)
            continue
        parts = [part for run in runs for part in run.parts]
        pieces: list[Piece] = []
        for author, text in parts:
            if author in ("user", "assistant"):
                pieces.append(Piece(text, next(numbers)))
            elif author == "scaffold" and pieces and pieces[-1].is_scaffold:
                pieces[-1] = Piece(pieces[-1].text + text)
            elif text:
                pieces.append(Piece(text, is_system=author == "system"))
        yield pieces


def _cut(pieces: Sequence[Piece], length: int) -> list[Piece]:
    """The pieces of a text that is cut to so many characters."""
    out, left = [], length
    for piece in pieces:
        if left > 0 or not piece.text:
            out.append(replace(piece, text=piece.text[:left]))
        left -= len(piece.text)
    return out


def _text_ends(ids: Sequence[int], stretch: Stretch, setup: Setup) -> list[tuple[int, int]]:
    """The characters (first, end) of each token of a stretch."""
    if stretch.control is not None:
        return [(0, len(stretch.text))]
    texts = token_texts(ids, setup.prompt_format.tokenizer)
    out, done = [], 0
    for text in texts:
        out.append((done, done + len(text)))
        done += len(text)
    return out


def token_texts(ids: Sequence[int], tokenizer: Tokenizer, after: str | None = None) -> list[str]:
    """The text of each token of a run of text. Of a character whose bytes are several tokens, the first of these shows
    it and the others nothing."""
    out: list[str] = []
    group: list[int] = []  # tokens whose characters are not complete
    context: list[int] = []  # before them
    for number, token in enumerate(ids):
        group.append(token)
        before = tokenizer.decode_text(context, after) if context else ""
        text = tokenizer.decode_text([*context, *group], after)[len(before) :]
        last = number + 1 == len(ids)
        if not last and len(group) < 8 and (not text or text.endswith("\ufffd")):
            continue
        out += [text, *[""] * (len(group) - 1)]
        context, group = [*context, *group][-24:], []
    return out
