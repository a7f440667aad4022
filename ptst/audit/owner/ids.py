"""Texts of chat templates to ids by the audit's own tokenizer: outside of messages, control tokens are read."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ptst.audit.reference.tokenizer import ReferenceTokenizer
from ptst.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation: a message's text, or the format's. `sampled`: the model begins to write here."""

    text: str
    message: bool = False
    sampled: bool = False


@dataclass(frozen=True)
class _Part:
    """A control token, or text; `begins`: the model begins to write here."""

    text: str
    control: bool = False
    begins: bool = False


# What is encoded apart from what precedes it: nothing; answers, where the ids of their prompt would change otherwise;
# these, and every other message.
APART = ("nothing", "answers", "messages")


def read(pieces: Sequence[Piece], tokenizer: ReferenceTokenizer, apart: str = "nothing") -> list[int]:
    """Ids of a conversation: text between control tokens is encoded in one call, but for what is `apart`. Raises
    UserError for text that cannot be encoded."""
    ids: list[int] = []
    after: str | None = None
    for is_control, run in groupby(_parts(pieces, tokenizer), key=lambda part: part.control):
        if is_control:
            names = [part.text for part in run]
            ids += map(tokenizer.id_of, names)
            after = names[-1]
        else:
            ids += _run([*run], tokenizer, after, apart)
    return ids


def _parts(pieces: Sequence[Piece], tokenizer: ReferenceTokenizer) -> Iterator[_Part]:
    """The pieces, cut at control tokens outside of messages; without the whitespace that these swallow."""
    names = sorted(filter(str.strip, tokenizer.control), key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, names))})")
    for is_message, group in groupby(pieces, key=lambda piece: piece.message):
        for piece in group if is_message else _joined([*group]):
            found = [piece.text] if is_message else cut.split(piece.text)
            begins = piece.sampled
            for i, text in enumerate(found):
                if i % 2 == 0 and not is_message:
                    text = text.lstrip() if i and found[i - 1] in tokenizer.rstrip else text
                    text = text.rstrip() if found[i + 1 : i + 2] and found[i + 1] in tokenizer.lstrip else text
                if text:
                    yield _Part(text, i % 2 == 1, begins)
                    begins = False


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Neighbours of the format as one piece, so that control tokens are found by their names alone."""
    for piece, *more in _runs(pieces):
        yield Piece(piece.text + "".join(p.text for p in more), False, piece.sampled)


def _runs(pieces: list[Piece]) -> list[list[Piece]]:
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not runs or piece.sampled:
            runs.append([])
        runs[-1].append(piece)
    return runs


def _run(run: list[_Part], tokenizer: ReferenceTokenizer, after: str | None, apart: str) -> list[int]:
    texts, bare = [part.text for part in run], tokenizer.is_bare(after)
    whole = _encoded("".join(texts), bare, tokenizer)
    if apart == "nothing":
        return whole
    begins = next((i for i, part in enumerate(run) if part.begins), None)
    if begins:
        prompt = _encoded("".join(texts[:begins]), bare, tokenizer)
        if whole[: len(prompt)] == prompt:
            return whole
        return prompt + _encoded("".join(texts[begins:]), tokenizer.is_bare(None, True), tokenizer)
    if apart == "answers":
        return whole
    return [i for text in texts for i in _encoded(text, bare, tokenizer)]


def _encoded(text: str, bare: bool, tokenizer: ReferenceTokenizer) -> list[int]:
    ids = tokenizer.encode([(text, bare)])[(text, bare)]
    if isinstance(ids, UserError):
        raise ids
    return ids


def token_at(ids: Sequence[int], place: int, tokenizer: ReferenceTokenizer) -> int:
    """Index of the token that writes the character at a place."""
    return bisect_right(range(len(ids)), place, key=lambda i: len(tokenizer.decode(ids[: i + 1])))
