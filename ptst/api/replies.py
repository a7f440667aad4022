"""Replies of an API on disk: each is a line of a JSONL file as soon as it comes, and none is paid for twice.

A line has a digest of all that the reply depends on, and a checksum. An incomplete last line, which a kill leaves, is
dropped; any other that was not written so is refused. One process at a time asks for what a file lacks.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.progress import say
from ptst.reading import check_regular, parse_json
from ptst.storage import append_jsonl, lock, refuse_link


@dataclass(frozen=True)
class Reply:
    """What a model behind an API made of a prompt. `model`: as the endpoint names it, with its version. Tokens are None
    where the endpoint does not count them."""

    text: str
    refusal: str
    finish_reason: str
    model: str
    tokens_in: int | None
    tokens_out: int | None


@dataclass(frozen=True)
class Usage:
    """Replies and their tokens. `uncounted`: replies without a count."""

    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0

    def __add__(self, reply: Reply) -> "Usage":
        tokens_in, tokens_out = self.tokens_in + (reply.tokens_in or 0), self.tokens_out + (reply.tokens_out or 0)
        uncounted = None in (reply.tokens_in, reply.tokens_out)
        return Usage(self.replies + 1, tokens_in, tokens_out, self.uncounted + uncounted)

    def cost(self, price: tuple[float, float]) -> float:
        """In the unit of `price`: a million tokens in, a million out."""
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6

    def words(self, price: tuple[float, float] | None) -> str:
        text = f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        if self.uncounted:
            text += f" ({self.uncounted:,} replies without a count)"
        return text if price is None else f"{text}, cost {self.cost(price):.4f}"


class ReplyFile:
    """Replies by key, in memory only where there is no path."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[str, Reply] = {}
        self._read_bytes = self._read_lines = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file, with all replies that it has; waits while another process holds it. Raises UserError for a
        symbolic link, and for a line, other than an incomplete last one, that is not a reply."""
        if self.path is None:
            yield
            return
        name = f".{self.path.name}.lock"
        with lock(self.path.parent, name) as held:
            if held:
                self._read(self.path)
                yield
                return
        say(f"another process asks for replies in {self.path}; waiting for it")
        with lock(self.path.parent, name, wait=True):
            self._read(self.path)
            yield

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; the operating system has it when this returns."""
        if self.path:
            row = {"key": key, **asdict(reply)}
            append_jsonl(self.path, {**row, "check": _checksum(row)})
        self.known[key] = reply

    def _read(self, path: Path) -> None:
        refuse_link(path)
        if not path.exists():
            return
        check_regular(path)
        with open(path, "rb") as file:
            file.seek(self._read_bytes)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            os.truncate(path, self._read_bytes + len(whole))
        # Not splitlines: a reply may contain other line separators, which JSON does not escape.
        for line in whole.split(b"\n")[:-1]:
            self._read_lines += 1
            key, reply = _read_row(line, f"{path}:{self._read_lines}")
            self.known[key] = reply
        self._read_bytes += len(whole)


def _read_row(line: bytes, where: str) -> tuple[str, Reply]:
    try:
        row = parse_json(line.decode())
        if row.pop("check") == _checksum(row):
            return row.pop("key"), Reply(**row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError("is not a valid record", "delete the line to ask again", where)


def _checksum(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]
