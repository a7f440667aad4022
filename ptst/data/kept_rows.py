"""Conversations of large files, kept on disk: read once, one after another, and read again from there where they are
asked for, so that memory does not grow with them.

`messages` holds each conversation's messages as one line of JSON, the text that fingerprints of data are over; the
other files say where each begins, and which row of which file it is.
"""

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash

from ptst.array_folder import ArrayFolder, ArrayWriter, file_digest, find_or_make, forget
from ptst.collector import paused_collector
from ptst.errors import UserError
from ptst.fingerprints import combined
from ptst.text.segments import Conversation, Message

LARGE = 8 << 20  # bytes of files, as they are when unpacked, from which their conversations are kept on disk
_GROWTH = {".gz": 4, ".parquet": 4}  # about how much smaller files of these names are than their rows
FOLDER = "rows"
VERSION = 1  # of the format
_LINE = "\n"
_BLOCK = 4096  # conversations that are read at once
_AT_ONCE = 64  # that are written at once
_NOT_TRAINED = ", false"
_quoted = json.encoder.encode_basestring_ascii


def serialized(conversation: Conversation) -> bytes:
    """The messages as fingerprints and splits have them, in JSON as `json.dumps` writes it. An answer that is left out
    of the loss has one entry more."""
    found = [
        f"[{_quoted(m.role)}, {_quoted(m.content)}{'' if m.trained else _NOT_TRAINED}]" for m in conversation.messages
    ]
    return f"[{', '.join(found)}]".encode()


class KeptRows(Sequence[Conversation]):
    """The conversations in a folder. `fingerprint`: sha256 over all messages in order. `key`: under which they are
    found again; "" for those of this process alone."""

    def __init__(self, folder: ArrayFolder):
        about = folder.about
        self.key = folder.path.name if folder.kept else ""
        self.fingerprint: str = about["fingerprint"]
        self._files: list[str] = about["sources"]
        self._handle = folder.open("messages")
        weakref.finalize(self, os.close, self._handle)
        self._offsets = folder.array("offsets", np.int64)
        self._file_of = folder.array("file_of", np.int32)
        self._numbers = folder.array("numbers", np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Conversation]: ...
    def __getitem__(self, at: int | slice) -> Conversation | list[Conversation]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self._read(start, stop) if step == 1 else [self[i] for i in range(start, stop, step)]
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        return self._read(at % len(self), at % len(self) + 1)[0]

    def __iter__(self) -> Iterator[Conversation]:
        for at in range(0, len(self), _BLOCK):
            yield from self._read(at, min(len(self), at + _BLOCK))

    def place(self, at: int) -> str:
        """The row that a conversation comes from (`file:line`), without reading it."""
        return f"{self._files[self._file_of[at]]}:{self._numbers[at]}"

    @property
    def identity(self) -> str:
        """Of messages and places."""
        places = (xxhash.xxh3_128_hexdigest(column.tobytes()) for column in (self._file_of, self._numbers))
        return combined(self.fingerprint, *self._files, *places)

    def _read(self, start: int, stop: int) -> list[Conversation]:
        if stop <= start:
            return []
        first = int(self._offsets[start])
        text = os.pread(self._handle, int(self._offsets[stop]) - first, first)
        found = json.loads(f"[{text[:-1].decode().replace(_LINE, ',')}]")  # ends of lines stand between rows alone
        files, numbers = self._file_of[start:stop].tolist(), self._numbers[start:stop].tolist()
        return [
            Conversation(tuple([Message(*message) for message in messages]), f"{self._files[file]}:{number}")
            for messages, file, number in zip(found, files, numbers, strict=True)
        ]


class JoinedRows(Sequence[Conversation]):
    """Several sequences of conversations in turn."""

    def __init__(self, parts: Sequence[Sequence[Conversation]]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Conversation]: ...
    def __getitem__(self, at: int | slice) -> Conversation | list[Conversation]:
        if isinstance(at, slice):
            return self._slice(at)
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        at %= len(self)
        for part in self.parts:
            if at < len(part):
                return part[at]
            at -= len(part)
        raise AssertionError

    def __iter__(self) -> Iterator[Conversation]:
        for part in self.parts:
            yield from part

    def _slice(self, at: slice) -> list[Conversation]:
        start, stop, step = at.indices(len(self))
        found: list[Conversation] = []
        for part in self.parts if step == 1 else ():
            found += part[max(0, start) : max(0, stop)]
            start, stop = start - len(part), stop - len(part)
        return found if step == 1 else [self[i] for i in range(start, stop, step)]


class ChosenRows(Sequence[Conversation]):
    """Some conversations of others that lie on disk, by their indices."""

    def __init__(self, rows: Sequence[Conversation], chosen: array):
        self._rows, self._chosen = rows, chosen

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all messages in order."""
        digest = hashlib.sha256()
        for conversation in self:
            digest.update(serialized(conversation) + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Conversation]: ...
    def __getitem__(self, at: int | slice) -> Conversation | list[Conversation]:
        if isinstance(at, slice):
            return [self._rows[i] for i in self._chosen[at]]
        return self._rows[self._chosen[at]]

    def place(self, at: int) -> str:
        """The row that a conversation comes from, without reading it."""
        return place_of(self._rows, self._chosen[at])

    @property
    def identity(self) -> str:
        """Of messages and places."""
        return combined(identity_of(self._rows), xxhash.xxh3_128_hexdigest(self._chosen.tobytes()))


def chosen_rows(conversations: Sequence[Conversation], chosen: Iterable[int]) -> Sequence[Conversation]:
    """Some of the conversations, by their indices."""
    if isinstance(conversations, tuple | list):
        return tuple(conversations[row] for row in chosen)
    return ChosenRows(conversations, array("q", chosen))


class PlacesOf(Sequence[str]):
    """The places of some of the conversations, `rows` of them from `first` on, without reading those."""

    def __init__(self, conversations: Sequence[Conversation], first: int, rows: int):
        self._conversations, self._rows = conversations, range(first, first + rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [place_of(self._conversations, row) for row in self._rows[at]]
        return place_of(self._conversations, self._rows[at])


def place_of(conversations: Sequence[Conversation], at: int) -> str:
    """The row that a conversation comes from (`file:line`)."""
    if isinstance(conversations, JoinedRows):
        for part in conversations.parts:
            if at < len(part):
                return place_of(part, at)
            at -= len(part)
    if isinstance(conversations, KeptRows | ChosenRows):
        return conversations.place(at)
    return conversations[at].source


def identity_of(conversations: Sequence[Conversation]) -> str:
    """A hash of messages and places."""
    if isinstance(conversations, KeptRows | ChosenRows):
        return conversations.identity
    if isinstance(conversations, JoinedRows):
        return combined(*map(identity_of, conversations.parts))
    digest = hashlib.sha256()
    for c in conversations:
        row = [c.source, *([m.role, m.content, m.trained] for m in c.messages)]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def joined(parts: Sequence[Sequence[Conversation]]) -> Sequence[Conversation]:
    """Several sources' conversations in turn; those that are in memory as one tuple."""
    if len(parts) == 1 and not isinstance(parts[0], tuple | list):
        return parts[0]
    if all(isinstance(part, tuple | list) for part in parts):
        return tuple(conversation for part in parts for conversation in part)
    return JoinedRows(parts)


def is_kept(conversations: Sequence[Conversation]) -> bool:
    """Whether the conversations lie on disk."""
    return not isinstance(conversations, tuple | list)


def are_large(paths: Sequence[Path]) -> bool:
    """Whether the conversations of these files are kept on disk."""
    return sum(path.stat().st_size * _GROWTH.get(path.suffix.lower(), 1) for path in paths) >= LARGE


def keep(
    key: str | None, rows: Callable[[], Iterable[Conversation]], after: Callable[[], dict[str, Any]]
) -> tuple[KeptRows, dict[str, Any]]:
    """The conversations under a key, read by `rows` if they are not there (None: always). `after`: what else is to be
    known of them once all were read. Returns them with that."""

    def make(writer: ArrayWriter) -> None:
        digest, at = hashlib.sha256(), 0
        sources: dict[str, int] = {}
        places = {"offsets": array("q", [0]), "file_of": array("i"), "numbers": array("q")}

        def write(lines: list[bytes]) -> None:
            joined = b"".join(lines)
            digest.update(joined)
            writer.add("messages", joined)
            for name, column in places.items():
                writer.add(name, column.tobytes())
                del column[:]
            lines.clear()

        with paused_collector():
            lines: list[bytes] = []
            for conversation in rows():
                line = serialized(conversation) + b"\n"
                lines.append(line)
                at += len(line)
                name, _, number = conversation.source.rpartition(":")
                places["offsets"].append(at)
                places["file_of"].append(sources.setdefault(name, len(sources)))
                places["numbers"].append(int(number))
                if len(lines) == _AT_ONCE:
                    write(lines)
            write(lines)
        writer.about |= {"fingerprint": digest.hexdigest(), "sources": [*sources], "known": after()}

    folder = find_or_make(FOLDER, key, make, "the rows of large data")
    kept = KeptRows(folder)
    forget(folder)
    return kept, folder.about["known"]


class Watched:
    """Files that may not change while they are read. Raises UserError, at the end of the block, for one that did."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __enter__(self) -> "Watched":
        self.stamps = [_stamp(path) for path in self.paths]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, UserError | None):
            for path, stamp in zip(self.paths, self.stamps, strict=True):
                if _stamp(path) != stamp:
                    cause = "the file changed while it was read"
                    raise UserError(cause, "run this again when nothing writes to it any more", path)

    @property
    def identity(self) -> list[Any]:
        """What the files are: names, sizes, times and every byte."""
        return [[str(p), s, file_digest(p)] for p, s in zip(self.paths, self.stamps, strict=True)]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
