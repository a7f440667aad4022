"""Small files of a model folder that may be absent."""

from __future__ import annotations

import json
from pathlib import Path

from ptst.errors import UserError


def optional_json(path: Path) -> dict:
    """The parsed object, or {} where there is no such file. Raises UserError for a broken one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch the file again")
    return value


def read_chat_template(folder: Path | str) -> str | None:
    """The text of a folder's own chat template, a Jinja program: `chat_template.jinja`, or the entry of
    tokenizer_config.json (of several named ones, the default). None where there is none."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    entry = optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, list):
        entry = next((e.get("template") for e in entry if isinstance(e, dict) and e.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None
