"""A user's own template, a few lines of TOML:

    name = "chat:my-safety"
    user = "{question}"                      # or {x} for the bare text; exactly one of them, once
    system = "Decline whatever could hurt somebody, and say why."
    safety = true

`docs/templates.md` explains every key. Nothing in the file is executed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError, unknown_name
from ptst.text.templates import TEMPLATES, Template

_TYPES: dict[str, type] = dict.fromkeys(("name", "user", "system", "join", "task_system", "task_user"), str)
_TYPES |= {"safety": bool, "tight": bool, "demonstration": list}


def load_template(path: Path | str) -> Template:
    """The template of a TOML file. Raises UserError, naming file and key, for a file that cannot be read, unknown or
    missing keys, wrong types, a name that is taken, and words without exactly one place for the user's text."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        cause = f"the template file cannot be read ({error.strerror})"
        raise UserError(cause, ("check the path of ", Setting("template_file")), path) from None
    except ValueError as error:  # of TOML, or of the encoding
        raise UserError(f"not valid TOML ({error})", where=path) from None
    try:
        return _template(raw)
    except UserError as error:
        raise UserError(error.cause, error.remedy, path) from None


def _template(raw: dict[str, Any]) -> Template:
    for key, value in raw.items():
        if key not in _TYPES:
            raise unknown_name("key", key, _TYPES)
        if not isinstance(value, _TYPES[key]):
            raise UserError(f"{key} must be of type {_TYPES[key].__name__}, not {type(value).__name__}")
    for key in ("name", "user"):
        if key not in raw:
            raise UserError(f"{key} is missing")
    name = raw["name"]
    if not name.startswith(("chat:", "text:")) or name in TEMPLATES:
        raise UserError(f"name {name!r} must begin with chat: or text: and not be a built-in one")
    for key in ("user", "task_user"):
        words = raw.get(key)
        if words is not None and words.count("{x}") + words.count("{question}") != 1:
            raise UserError(f"{key} must hold {{question}} or {{x}} exactly once, for the user's text")
    if "task_user" in raw and "{task}" not in raw["task_user"]:
        raise UserError("task_user must hold {task}, the place of the task's own system prompt")
    if "task_system" in raw and "{task}" not in raw["task_system"] + raw.get("task_user", ""):
        raise UserError("task_system must hold {task}, the place of the task's own system prompt")
    chat_only = {"system", "task_system", "task_user", "tight", "demonstration"} & set(raw)
    if name.startswith("text:") and chat_only:
        raise UserError(f"a text: template has no {sorted(chat_only)[0]}", "write all words into user")
    demonstration = raw.get("demonstration")
    if demonstration is None:
        return Template(**raw)
    if len(demonstration) != 2 or not all(isinstance(text, str) for text in demonstration):
        raise UserError("demonstration must be two texts, the user's and the assistant's")
    return Template(**raw | {"demonstration": tuple(demonstration)})
