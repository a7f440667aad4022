"""A user's own template, a few lines of TOML:

    name = "chat:my-safety"
    user = "{question}"                      # or {x} for the bare text; exactly one of them, once
    system = "Decline whatever could hurt somebody, and say why."
    safety = true

`docs/templates.md` explains every key. Nothing in the file is executed or formatted.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from ptst.errors import UserError
from ptst.text.templates import TEMPLATES, Template

_TYPES = {"name": str, "user": str, "system": str, "join": str, "safety": bool, "task_system": str, "task_user": str}
_TYPES |= {"tight": bool, "demonstration": list}


def load_template(path: Path | str) -> Template:
    """The template of a TOML file.

    Raises UserError, naming file and key, for a file that cannot be read, unknown or missing keys, wrong types, a
    name that is taken, and a wrapper without exactly one place for the user's text.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path of --template-file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({error})") from None
    for key, value in raw.items():
        if key not in _TYPES:
            raise UserError(f"{path}: unknown key {key!r}; there are {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]):
            raise UserError(f"{path}: {key} must be of type {_TYPES[key].__name__}, not {type(value).__name__}")
    for key in ("name", "user"):
        if key not in raw:
            raise UserError(f"{path}: {key} is missing")
    name = raw["name"]
    if not name.startswith(("chat:", "text:")) or name in TEMPLATES:
        raise UserError(f"{path}: name {name!r} must begin with chat: or text: and not be a built-in one")
    for key in ("user", "task_user"):
        words = raw.get(key)
        if words is not None and words.count("{x}") + words.count("{question}") != 1:
            raise UserError(f"{path}: {key} must hold {{question}} or {{x}} exactly once, for the user's text")
    for key in ("task_system", "task_user"):
        if key in raw and "{task}" not in raw[key]:
            if key == "task_system" and "{task}" in raw.get("task_user", ""):
                continue
            raise UserError(f"{path}: {key} must hold {{task}}, the place of the task's own system prompt")
    chat_only = {"system", "task_system", "task_user", "tight", "demonstration"} & set(raw)
    if name.startswith("text:") and chat_only:
        raise UserError(f"{path}: a text: template has no {sorted(chat_only)[0]}; write all words into user")
    demonstration = raw.pop("demonstration", None)
    if demonstration is not None:
        if len(demonstration) != 2 or not all(isinstance(t, str) for t in demonstration):
            raise UserError(f"{path}: demonstration must be two texts, the user's and the assistant's")
        raw["demonstration"] = tuple(demonstration)
    assert set(raw) <= {f.name for f in dataclasses.fields(Template)}
    return Template(**raw)
