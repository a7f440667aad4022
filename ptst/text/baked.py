"""The head of a baked chat template: a comment that says what it was made of, for people and for this project.

A folder with a baked chat template has lost its own, from which its chat format was found or derived. The head keeps
that: the chat format, and the model's default system prompt. So the folder opens as before, under any template, and the
words of the baked one are not taken for the model's own. A checksum tells a body that was edited afterwards.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS, ChatFormat, Literals
from ptst.text.segments import Segment

VERSION = 1
_OPEN, _MARK, _CLOSE = "{#- ptst: ", "ptst-baked ", " -#}"
_AGAIN = "bake it again (ptst export --template)"


@dataclass(frozen=True)
class Baked:
    """What a chat template was baked from: names of the template and its task format (family), the chat format (None
    under a `text:` template), the model's default system prompt. `intact`: the body is as it was made."""

    template: str
    family: str
    chat_format: ChatFormat | None
    default_system_prompt: str | None
    intact: bool = True

    def __str__(self) -> str:
        return f"{self.template} for {self.family}"


def with_head(baked: Baked, body: str) -> str:
    """A chat template with its head."""
    made = baked.chat_format
    own = made is None or CHAT_FORMATS.get(made.name) == made
    record = {
        "version": VERSION,
        "template": baked.template,
        "family": baked.family,
        "chat_format": (made.name if made else None) if own else _to_json(made),
        "default_system_prompt": baked.default_system_prompt,
        "sha256": _checksum(body),
    }
    form = "without a chat format" if made is None else f"in the chat format {made.name}"
    words = [
        f"{_OPEN}{_quiet(baked.template)} {_quiet(form)}, with the words of the task format {baked.family}.",
        "    Rendered, and read as text with control tokens, it gives the token ids of ptst. It has BOS already, where",
        "    there is one. Not for editing: ptst knows the folder's own chat format by the next line alone.",
        f"    {_MARK}{_quiet(json.dumps(record, separators=(',', ':')))}{_CLOSE}",
    ]
    return "\n".join(words) + "\n" + body


def read_baked(text: str) -> Baked | None:
    """The head of a chat template, None for one that was not baked. Raises UserError for a head that is damaged or was
    written by a newer version."""
    if not text.startswith(_OPEN):
        return None
    head, closed, body = text.partition(_CLOSE)
    _, marked, words = head.partition(_MARK)
    if not (closed and marked):
        return None
    try:
        record = json.loads(words)
        if record["version"] != VERSION:
            raise UserError("the chat template was baked by another version of ptst", _AGAIN)
        names = record["template"], record["family"]
        made, default = record["chat_format"], record["default_system_prompt"]
        if not all(isinstance(n, str) for n in names) or not isinstance(default, str | None):
            raise TypeError
        chat_format = CHAT_FORMATS[made] if isinstance(made, str) else None if made is None else _from_json(made)
        return Baked(*names, chat_format, default, record["sha256"] == _checksum(body))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the head of the baked chat template is damaged", _AGAIN) from None


def _checksum(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()


def _quiet(words: str) -> str:
    """Words that cannot end a comment of Jinja: in JSON, # is an escape like any other."""
    return words.replace("#", "\\u0023")


def _to_json(chat_format: ChatFormat | None) -> dict[str, Any]:
    """The fields of a chat format that are not at their defaults, tuples as lists."""
    assert chat_format is not None
    given = {f.name: getattr(chat_format, f.name) for f in fields(ChatFormat)}
    kept = {f.name: given[f.name] for f in fields(ChatFormat) if given[f.name] != f.default}
    return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Segment):
        return {"control": value.text} if value.control else value.text
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


_LITERALS = ("start", "later", "user_end", "answer_prefix", "closing", "after_answer")
_FLAGS = ("system_last", "closes_single", "apart")
_NAMES = ("role_markers", "control_tokens", "differences")


def _from_json(record: dict[str, Any]) -> ChatFormat:
    """The chat format of a record. Raises TypeError, ValueError or KeyError for one that is none."""
    made: dict[str, Any] = {}
    for name, value in record.items():
        if value is None:
            made[name] = None
        elif name in _LITERALS:
            made[name] = _literals(value)
        elif name in ("system", "history"):
            first, second = value
            made[name] = _literals(first), _literals(second)
        elif name in _FLAGS:
            made[name] = bool(value)
        elif name in _NAMES:
            made[name] = tuple(_text(v) for v in value)
        elif name == "switches":
            made[name] = tuple((_text(key), bool(on)) for key, on in value)
        elif name in ("name", "terminator"):
            made[name] = _text(value)
        else:
            raise KeyError(name)
    return ChatFormat(**{"start": None} | made)


def _literals(value: Any) -> Literals:
    if not isinstance(value, list):
        raise TypeError
    return tuple(
        Segment(_text(v["control"]), control=True) if isinstance(v, dict) else Segment(_text(v)) for v in value
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
