"""The model's own `chat_template`: a Jinja program that came with the folder.

Nothing here is used to encode training or test data; it serves to compare our formats with the owner's, and to know
the system prompt that the owner puts in by default. The program is somebody else's: it runs in jinja2's immutable
sandbox, in a child process with limits on time and memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptst.errors import UserError
from ptst.text.files import optional_json, read_chat_template
from ptst.text.templates import MODEL_DEFAULT, Template

SECONDS = 20
MEGABYTES = 1024
_CHILD = Path(__file__).with_name("_jinja_child.py")


def render_chat_template(
    folder: Path | str, conversations: Sequence[Sequence[dict[str, str]]], seconds: int = SECONDS
) -> list[str]:
    """Each conversation ({"role", "content"} messages) as the folder's own template spells it, with a generation prompt
    where it ends in a user's turn.

    Raises UserError where the folder has no template, and where the template fails, reaches for what the sandbox
    forbids, or passes its limits of `seconds` of CPU time and 1 GB of memory.
    """
    template = read_chat_template(folder)
    if template is None:
        raise UserError(f"{folder} has no chat_template of its own")
    settings = optional_json(Path(folder) / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k in names}
    job = {
        "template": template,
        "variables": {"bos_token": "", "eos_token": "", **{k: v for k, v in special.items() if v is not None}},
        "rows": [{"messages": c, "add_generation_prompt": c[-1]["role"] == "user"} for c in map(list, conversations)],
        "seconds": seconds,
        "megabytes": MEGABYTES,
    }
    try:
        # -I: neither the user's environment nor the current folder can put another jinja2 in the way.
        done = subprocess.run(
            [sys.executable, "-I", str(_CHILD)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=3 * seconds,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise UserError(f"the chat_template of {folder} did not end within {seconds} s; it may loop for ever")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise UserError(f"the chat_template of {folder} {answer['error']}")
    return answer["texts"]


def default_system_prompt(folder: Path | str) -> str | None:
    """The system prompt that the folder's own template puts in where a conversation has none; None: it puts in none."""
    if read_chat_template(folder) is None:
        return None
    system, user = "a system prompt to look for", "a user's text to look for"
    asked = [{"role": "user", "content": user}]
    try:
        given, bare = render_chat_template(folder, [[{"role": "system", "content": system}, *asked], asked])
    except ValueError as error:
        if "cannot be rendered" in str(error):  # a template that refuses system prompts has no default one
            return None
        raise
    before, found, after = given.partition(system)
    if not (found and bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after)):
        return None
    return bare[len(before) : len(bare) - len(after)]


def with_default_system_prompt(template: Template, folder: Path | str) -> Template:
    """The template with `model-default` replaced by the text that this folder's own template would put in."""
    if template.system != MODEL_DEFAULT:
        return template
    return replace(template, system=default_system_prompt(folder))
