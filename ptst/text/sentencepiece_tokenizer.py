"""`tokenizer.model`: sentencepiece, the tokenizer of Llama 1 and 2, Mistral, TinyLlama, Yi.

Its library never turns text into a control piece, but it does match user-defined pieces in text, and Yi's role markers
are such pieces. The model is therefore loaded with those retyped as control pieces; all else stays as it is.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.reading import open_regular, refuse_pointer
from ptst.text.added_tokens import TokenSettings
from ptst.text.base_tokenizer import Origin, Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
_USER_DEFINED_TYPE = bytes([3 << 3, _USER_DEFINED])


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` with the control tokens that the settings add to it. Raises UserError for a file of another
    kind, and for settings that it cannot follow: tokens of text, and another name for one of its pieces."""

    def __init__(self, path: Path, settings: TokenSettings | dict | None = None):
        self.path, self.origin = path, Origin(path, settings)
        settings = settings if isinstance(settings, TokenSettings) else TokenSettings.of(settings or {})
        with open_regular(path) as file:
            data = file.read()
        refuse_pointer(data, path)
        sp = self._sp = _load(data, path)
        self._control = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        own = frozenset(self._control)
        added = {token.name for token in settings.added if settings.is_control(token.name, token.special)}
        named = {name for name in (settings.special | added) - own if not settings.borrows(name)}
        named = {name for name in named if not sp.is_unknown(sp.piece_to_id(name))}

        def is_control(name: str, kind: int) -> bool:
            return (kind == _NORMAL and name in named) or (kind == _USER_DEFINED and settings.is_control(name))

        # A piece ends with its type; reading all takes longer than looking for that.
        if any(_USER_DEFINED_TYPE + tag in data for tag in (b"\x0a", b"\x12")) or named:
            try:
                data = retyped(data, is_control)
            except (IndexError, KeyError):  # a field that the library passes over
                raise UserError("not a sentencepiece model", "fetch the file again", path) from None
            sp = self._sp = _load(data, path)
            self._control = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        for token in settings.added:
            self._add(token.name, token.id, token.name in added, path)
        self._take_flags(settings.added)
        self.own, self.spaced = own, settings.spaced is True
        self._ids = sp.encode
        self.vocab_size = max(sp.vocab_size(), *(token.id + 1 for token in settings.added), 0)
        bos, eos = (sp.id_to_piece(i) if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))
        self.bos = settings.bos if settings.bos in self._control else bos
        self.eos = settings.eos if settings.eos in self._control else eos
        self.opening = (self.bos,) if self.bos is not None and settings.adds_bos is not False else ()
        self.implied = {key: name for key, name in (("bos_token", bos), ("eos_token", eos)) if name is not None}

    def _add(self, name: str, number: int, control: bool, path: Path) -> None:
        """Take a token of the settings. Raises UserError where it does not fit the pieces."""
        size = self._sp.vocab_size()
        if number < size and (piece := self._sp.id_to_piece(number)) != name:
            cause = f"its piece {number} is {piece!r}, and the settings beside it call it {name!r}"
            raise UserError(cause, "fetch the tokenizer's files again", path)
        if number >= size and not control:
            cause = f"the settings beside it add the text {name!r}, which sentencepiece cannot read"
            raise UserError(cause, "save the tokenizer as tokenizer.json", path)
        if number >= size:
            self._control[name] = number

    @property
    def tokens(self) -> dict[str, int]:
        return {self._sp.id_to_piece(i): i for i in range(self._sp.vocab_size())} | self._control

    def _piece(self, number: int) -> str | None:
        return self._sp.id_to_piece(number) if number < self._sp.vocab_size() else None

    def _continued(self, text: str) -> list[int]:
        # What is put in front takes the dummy space, and its own ids are removed again. A line break hardly ever merges
        # with what follows it; a character without a piece, which becomes bytes or unknown, never does.
        for before in ("\n", "\U0010fffd"):
            own, ids = self._ids(before), self._ids(before + text)
            if own and ids[: len(own)] == own:
                return ids[len(own) :]
        cause = f"the tokenizer joins the text {text[:20]!r} with whatever precedes it"
        raise UserError(f"{cause}, so an answer cannot be encoded after its prompt", "leave the text out", self.path)

    def _ids_all(self, texts: list[str]) -> list[list[int]]:
        return self._sp.encode(texts, num_threads=1)

    def _continued_all(self, texts: list[str]) -> list[list[int]]:
        own = self._ids("\n")
        found = self._ids_all(["\n" + text for text in texts])
        pairs = zip(texts, found, strict=True)
        return [ids[len(own) :] if own and ids[: len(own)] == own else self._continued(text) for text, ids in pairs]

    @cached_property
    def _dummy_space(self) -> bool:  # sentencepiece's add_dummy_prefix
        return self._sp.id_to_piece(self._ids("a")[0]).startswith("\u2581")

    def _decode(self, ids: list[int]) -> str:
        # An embedding may be padded to more rows than there are pieces; such a row has no text.
        size = self._sp.vocab_size()
        return self._sp.decode([i for i in ids if i < size])

    def _decode_all(self, runs: list[list[int]]) -> list[str]:
        size = self._sp.vocab_size()
        runs = [ids if max(ids, default=0) < size else [i for i in ids if i < size] for ids in runs]
        return self._sp.decode(runs, num_threads=1) if runs else []


def _load(data: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not data:  # which the library accepts
            raise RuntimeError("the file is empty")
        sp = SentencePieceProcessor(model_proto=data)
        sp.id_to_piece([*range(sp.vocab_size())])  # raises UnicodeDecodeError for a name that is no text
        return sp
    except (OSError, RuntimeError, UnicodeDecodeError):
        cause, remedy = "not a sentencepiece model", "fetch the file again"
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            cause, remedy = f"{cause} but a tiktoken file", "put the model's tokenizer.json into the folder"
        raise UserError(cause, remedy, path) from None


def retyped(data: bytes, is_control: Callable[[str, int], bool]) -> bytes:
    """A sentencepiece model in which the pieces for which `is_control(name, type)` holds are control pieces. The file
    is a protobuf message: field 1 is a piece, whose own field 1 is its name and field 3 its type."""
    out, done = [], 0
    for field, start, inner, end in _fields(data, 0, len(data)):
        if field != 1:
            continue
        parts = [(f, s, i, e) for f, s, i, e in _fields(data, inner, end)]
        name = next((data[i:e].decode("utf-8", "replace") for f, _, i, e in parts if f == 1), "")
        kind = next((data[i] for f, _, i, _ in parts if f == 3), _NORMAL)
        if is_control(name, kind):
            piece = b"".join(data[s:e] for f, s, _, e in parts if f != 3) + bytes([3 << 3, _CONTROL])
            out += [data[done:start], b"\x0a", _varint(len(piece)), piece]
            done = end
    return b"".join((*out, data[done:]))


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, start of the tag, start of the content, end) of each field of a protobuf message."""
    while at < end:
        start = at
        tag, at = _read_varint(data, at)
        kind, inner = tag & 7, at
        if kind == 2:
            size, inner = _read_varint(data, at)
            at = inner + size
        elif kind == 0:
            _, at = _read_varint(data, at)
        else:
            at += {1: 8, 5: 4}[kind]  # no other kind passes the library
        yield tag >> 3, start, inner, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))
