"""`tokenizer.model` as the oracle reads it (see `reference.tokenizer`): sentencepiece.

The library matches user-defined pieces in a text, and some models' role markers are such pieces. The file is therefore
taken apart and put together again with every control token as a control piece, which no text becomes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ptst.audit.reference.settings import Said, broken
from ptst.errors import UserError

SPACE = "\u2581"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types in sentencepiece_model.proto
_BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")


class PiecesFile:
    """A tokenizer.model with the control tokens that the files beside it name."""

    def __init__(self, path: Path, said: Said):
        data = path.read_bytes()
        sp = _load(data, path)
        own = _control_pieces(sp).keys()
        added = {name for name, flags in said.added.items() if said.controls(name, flags.special)}
        named = {name for name in (said.named | added) - own if not said.is_text(name)}

        def becomes_control(name: str, kind: int) -> bool:
            return (kind == _NORMAL and name in named) or (kind == _USER_DEFINED and said.controls(name))

        # Taking a file apart takes longer than reading it: only where there may be such a piece.
        if b"\x18\x04" in data or any(sp.id_to_piece(sp.piece_to_id(name)) == name for name in named):
            sp = _load(_rebuilt(data, becomes_control), path)
        self._sp, self._path = sp, path
        self.control = _control_pieces(sp)
        for name, flags in said.added.items():
            self._add(name, flags.id, name in added)
        self.own, self.spaced, self.flags = frozenset(own), said.spaced is True, said.added
        bos, eos = (sp.id_to_piece(i) if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))
        self.bos = said.bos if said.bos in self.control else bos
        self.eos = said.eos if said.eos in self.control else eos
        self.opening: tuple[str, ...] = () if self.bos is None or said.opens is False else (self.bos,)
        self.dummy: bool = sp.id_to_piece(sp.encode("a")[0])[0] == SPACE
        self.bytes_of = _Surfaces(sp)

    def _add(self, name: str, number: int, control: bool) -> None:
        """A token of the files beside it. Raises UserError where it is another piece, or text."""
        piece = self._sp.id_to_piece(number) if number < self._sp.vocab_size() else None
        if piece not in (None, name):
            raise broken(f"its piece {number} is {piece!r}, and the files beside it call it {name!r}", self._path)
        if piece is None and not control:
            raise UserError(f"sentencepiece cannot read the added text {name!r}", "use tokenizer.json", self._path)
        if piece is None:
            self.control[name] = number

    def encode(self, texts: Sequence[str], bare: bool) -> list[list[int]]:
        if not bare:
            return self._sp.encode([*texts], num_threads=1)
        first = len(self._newline)
        found = self._sp.encode(["\n" + text for text in texts], num_threads=1)
        return [
            ids[first:] if ids[:first] == self._newline else self._behind_another(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    @cached_property
    def _newline(self) -> list[int]:
        return self._sp.encode("\n")

    def _before(self, text: str) -> str:
        """What is put before a bare text to take the dummy space: a line break, or, where the vocabulary joins both, a
        character without a piece."""
        for before in ("\n", "\U0010fffd"):
            own = self._sp.encode(before)
            if self._sp.encode(before + text)[: len(own)] == own:
                return before
        raise UserError(f"the tokenizer joins the text {text[:20]!r} with what precedes it", "leave it out")

    def _behind_another(self, text: str) -> list[int]:
        before = self._before(text)
        return self._sp.encode(before + text)[len(self._sp.encode(before)) :]

    def spans(self, text: str, bare: bool) -> list[tuple[int, int, int]]:
        (ids,) = self.encode([text], bare)
        before = self._before(text) if bare else ""
        names = self._sp.encode(before + text, out_type=str)[-len(ids) :] if ids else []
        # Without normalization a piece is as long as the text that it stands for; the dummy space stands for nothing.
        out, at = [], -1 if self.dummy and not bare else 0
        for number, name in zip(ids, names, strict=True):
            if self._sp.is_byte(number):
                at += not 0x80 <= self.bytes_of[number][0] < 0xC0  # else a character goes on
                out.append((number, max(0, at - 1), at))
                continue
            out.append((number, max(0, at), at + len(name)))
            at += len(name)
        return out if at == len(text) else self._spread(ids, text)

    def _spread(self, ids: list[int], text: str) -> list[tuple[int, int, int]]:
        """Places where normalization changed lengths: as far as what is decoded up to a token reaches."""
        ends = [min(len(text), len(self.decode(ids[: at + 1]))) for at in range(len(ids))]
        places = pairwise(accumulate(ends, max, initial=0))
        return [(number, *place) for number, place in zip(ids, places, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._sp.decode([i for i in ids if i < self._sp.vocab_size()])

    def vocabulary(self) -> dict[str, int]:
        return {self._sp.id_to_piece(i): i for i in range(self._sp.vocab_size())} | self.control


class _Surfaces(dict[int, bytes]):
    """The bytes of each piece, found out when first asked for. A row of an embedding without a piece has none."""

    def __init__(self, sp: Any):
        super().__init__()
        self._sp = sp

    def __missing__(self, number: int) -> bytes:
        sp = self._sp
        found = b""
        if number < sp.vocab_size() and not sp.is_control(number):
            name = sp.id_to_piece(number)
            byte = _BYTE_NAME.fullmatch(name) if sp.is_byte(number) else None
            found = bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()
            found = " \u2047 ".encode() if sp.is_unknown(number) else found
        self[number] = found
        return found


def _control_pieces(sp: Any) -> dict[str, int]:
    numbers = [*range(sp.vocab_size())]
    return {sp.id_to_piece(i): i for i, control in zip(numbers, sp.is_control(numbers), strict=True) if control}


def _load(data: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not data:
            raise ValueError("the file is empty")
        sp = SentencePieceProcessor(model_proto=data)
        sp.id_to_piece([*range(sp.vocab_size())])
        return sp
    except (OSError, RuntimeError, ValueError):
        raise broken("not a sentencepiece model", path) from None


# A tokenizer.model is a protobuf message: tag, value, tag, value. Its field 1, once for each piece, is a message, too:
# 1 the piece's name, 2 its score, 3 its type.


def _parts(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, the whole field, its content) of each field of a message; a number's content is its one byte."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _number(message, at)
        wire = tag & 7
        if wire == 2:
            size, at = _number(message, at)
        elif wire == 0:
            size = _number(message, at)[1] - at
        else:
            size = 8 if wire == 1 else 4
        yield tag >> 3, message[start : at + size], message[at : at + size]
        at += size


def _number(message: bytes, at: int) -> tuple[int, int]:
    end = at
    while message[end] & 0x80:
        end += 1
    return sum((byte & 0x7F) << 7 * n for n, byte in enumerate(message[at : end + 1])), end + 1


def _named(piece: bytes) -> tuple[str, int]:
    """The name and type of a piece."""
    content = {number: value for number, _, value in _parts(piece)}
    return content.get(1, b"").decode("utf-8", "replace"), content[3][0] if 3 in content else _NORMAL


def _rebuilt(data: bytes, becomes_control: Callable[[str, int], bool]) -> bytes:
    out = []
    for number, whole, piece in _parts(data):
        if number == 1 and becomes_control(*_named(piece)):
            content = b"".join(field for kind, field, _ in _parts(piece) if kind != 3) + bytes([0x18, _CONTROL])
            out.append(b"\x0a" + _length(len(content)) + content)
        else:
            out.append(whole)
    return b"".join(out)


def _length(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _length(value >> 7)
