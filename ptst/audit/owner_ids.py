"""Texts of chat templates to ids: what spells a control token outside of messages is one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ptst.text.derive import Reader
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation: a message's text, or the format's. `sampled`: the model begins to write here."""

    text: str
    message: bool = False
    sampled: bool = False


def read(pieces: Sequence[Piece], tokenizer: Tokenizer, apart: bool = False) -> list[int]:
    """Ids of a conversation. Text between control tokens is encoded in one call; `apart`: every message in a call of
    its own, and an answer as the continuation of its prompt, where the ids of that would change otherwise."""
    parts: list[tuple[str, bool, bool, bool]] = []  # text, control token, message, the model begins
    reader = Reader(tokenizer)
    for is_message, group in groupby(pieces, key=lambda piece: piece.message):
        for piece in group if is_message else _joined(list(group)):
            read_as = [] if is_message else reader.read(piece.text)
            made = [(s.text, s.control, False) for s in read_as] or [(piece.text, False, is_message)]
            parts += [(*part, piece.sampled and i == 0) for i, part in enumerate(made)]
    ids: list[int] = []
    after: str | None = None
    for is_control, run in groupby(parts, key=lambda part: part[1]):
        if is_control:
            for text, *_ in run:
                ids.append(tokenizer.control_id(text))
                after = text
        else:
            ids += _run([*run], tokenizer, after, apart)
    return ids


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the format as one piece, so that control tokens are found by their names alone."""
    starts = [0, *(i for i, piece in enumerate(pieces) if piece.sampled and i), len(pieces)]
    return [Piece("".join(p.text for p in pieces[a:b]), False, pieces[a].sampled) for a, b in pairwise(starts)]


def _run(run: list[tuple[str, bool, bool, bool]], tokenizer: Tokenizer, after: str | None, apart: bool) -> list[int]:
    texts = [text for text, *_ in run]
    whole = tokenizer.encode("".join(texts), after=after)
    if not apart:
        return whole
    begins = next((i for i, part in enumerate(run) if part[3]), None)
    if begins:
        prompt = tokenizer.encode("".join(texts[:begins]), after=after)
        if whole[: len(prompt)] == prompt:
            return whole
        return prompt + tokenizer.encode("".join(texts[begins:]), continuation=True)
    return [i for text in texts for i in tokenizer.encode(text, after=after)]


def token_at(ids: Sequence[int], place: int, tokenizer: Tokenizer) -> int:
    """Index of the token that writes the character at a place."""
    return bisect_right(range(len(ids)), place, key=lambda i: len(tokenizer.decode([*ids[: i + 1]])))
