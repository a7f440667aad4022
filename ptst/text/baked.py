"""The head of a baked chat template: a comment that says what it was made of, for people and for this project.

A baked chat template takes the place of the model's own, from which its chat format is found or derived and which the
audit compares with. The head keeps that one, so that this project reads through to it: such a folder opens as before,
under any template, and the words of the baked one are not taken for the model's. It is kept compressed, since programs
look for words in a chat template to tell what a model can do.
"""

import base64
import binascii
import hashlib
import json
import zlib
from dataclasses import dataclass

from ptst.errors import UserError

VERSION = 1
MEGABYTES = 8  # that a chat template may have
_OPEN, _MARK, _CLOSE = "{#- ptst: ", "ptst-baked ", " -#}"
_REMEDY = "bake it again (ptst export --template), or remove its first comment to use it as the model's own"


@dataclass(frozen=True)
class Baked:
    """What a chat template was baked from: names of the template, its task format (family) and the chat format, and the
    text of the model's own chat template, None where the folder has none."""

    template: str
    family: str
    chat_format: str
    own: str | None

    def __str__(self) -> str:
        return f"{self.template} for {self.family}, baked by ptst"


def with_head(baked: Baked, body: str) -> str:
    """A chat template with its head."""
    record = {
        "version": VERSION,
        "template": baked.template,
        "family": baked.family,
        "chat_format": baked.chat_format,
        "sha256": _checksum(body),
        "own": None if baked.own is None else base64.b64encode(zlib.compress(baked.own.encode(), 9)).decode(),
    }
    name = json.dumps(baked.template, ensure_ascii=False)[1:-1]  # on one line
    words = [
        f"{_OPEN}{_quiet(name)} in the chat format {baked.chat_format}, task format {baked.family}.",
        "    Rendered, and read as text with control tokens, it gives the token ids of ptst. Where the format has BOS",
        "    it is in it. Not for editing: the next line holds the model's own chat template, and ptst reads that.",
        f"    {_MARK}{_quiet(json.dumps(record, separators=(',', ':')))}{_CLOSE}",
    ]
    return "\n".join(words) + "\n" + body


def read_baked(text: str, where: object = "") -> Baked | None:
    """The head of a chat template, None for one that was not baked. Raises UserError for a head that is damaged or of
    another version, and for a body that was edited."""
    if not text.startswith(_OPEN):
        return None
    head, closed, body = text.partition(_CLOSE)
    _, marked, words = head.partition(f"\n    {_MARK}")
    if not (closed and marked):
        return None
    try:
        record = json.loads(words)
        version, checksum = record["version"], record["sha256"]
        names = [record[key] for key in ("template", "family", "chat_format")]
        own = None if record["own"] is None else _unpacked(record["own"])
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error, binascii.Error):
        raise UserError("the head of the baked chat template is damaged", _REMEDY, where) from None
    if version != VERSION:
        raise UserError("the chat template was baked by another version of ptst", _REMEDY, where)
    if checksum != _checksum(body):
        raise UserError(f"the chat template is {names[0]}, baked by ptst, and was edited since", _REMEDY, where)
    return Baked(names[0], names[1], names[2], own)


def _unpacked(packed: str) -> str:
    data = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), MEGABYTES << 20)
    return data.decode()


def _checksum(body: str) -> str:
    return hashlib.sha256("\n".join(body.split()).encode(errors="surrogatepass")).hexdigest()


def _quiet(words: str) -> str:
    """Words that cannot end a comment of Jinja: in JSON, # is an escape like any other."""
    return words.replace("#", "\\u0023")
