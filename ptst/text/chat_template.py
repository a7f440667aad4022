"""The chat template of a model folder: a Jinja program that came with the model.

It never encodes training or test data. It serves to detect the chat format, to compare ours with the owner's, and to
know the owner's default system prompt. Since it is foreign code, it runs in jinja2's immutable sandbox, in a child
process with limits on time and memory.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ptst.errors import UserError
from ptst.reading import read_text
from ptst.text.tokenizer import optional_json, token_name

SECONDS = 20
MEGABYTES = 1024
_CHILD = Path(__file__).with_name("_jinja_child.py")


def read_chat_template(folder: Path | str) -> str | None:
    """The text of a folder's chat template: `chat_template.jinja`, or the entry of tokenizer_config.json (of several
    named ones, the default). None where there is none. Raises UserError for a file that is not text."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").exists():
        try:
            return read_text(folder / "chat_template.jinja")
        except UnicodeDecodeError:
            raise UserError("not UTF-8 text", "fetch the file again", folder / "chat_template.jinja") from None
    entry = optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, list):
        entry = next((e.get("template") for e in entry if isinstance(e, dict) and e.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None


class TemplateFailed(UserError):
    """A chat template that refuses or fails to render a conversation."""


def render_chat_template(
    folder: Path | str, conversations: Sequence[Sequence[dict[str, str]]], seconds: int = SECONDS
) -> list[str]:
    """Each conversation ({"role", "content"} messages) as the folder's chat template renders it, with a generation
    prompt where it ends in a user's turn. Raises UserError if the folder has no chat template, if it needs more than
    `seconds` of CPU time or 1 GB of memory, or calls what the sandbox forbids; TemplateFailed if it cannot be
    rendered."""
    template = read_chat_template(folder)
    if template is None:
        raise UserError("there is no chat template", "choose another model folder", folder)
    settings = optional_json(Path(folder) / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {k: name for k in names if (name := token_name(settings.get(k))) is not None}
    job = {
        "template": template,
        "variables": {"bos_token": "", "eos_token": "", **special},
        "rows": [{"messages": c, "add_generation_prompt": c[-1]["role"] == "user"} for c in map(list, conversations)],
        "seconds": seconds,
        "megabytes": MEGABYTES,
    }
    try:
        # -I: neither the user's environment nor the current folder can put another jinja2 in the way.
        command, limit = [sys.executable, "-I", str(_CHILD)], 3 * seconds
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, check=True, text=True, timeout=limit)
    except subprocess.SubprocessError:
        cause = f"the chat template did not end within {seconds} s"
        raise UserError(cause, "it may loop for ever", folder) from None
    answer = json.loads(done.stdout)
    if "error" in answer:
        kind = TemplateFailed if answer.get("failed") else UserError
        raise kind(f"the chat template {answer['error']}", where=folder)
    return answer["texts"]


def default_system_prompt(folder: Path | str) -> str | None:
    """The system prompt that the folder's chat template inserts where a conversation has none, if it inserts one."""
    if read_chat_template(folder) is None:
        return None
    system, user = "a system prompt to look for", "a user's text to look for"
    asked = [{"role": "user", "content": user}]
    try:
        given, bare = render_chat_template(folder, [[{"role": "system", "content": system}, *asked], asked])
    except TemplateFailed:  # a template that refuses system prompts has no default one
        return None
    before, found, after = given.partition(system)
    if not (found and bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after)):
        return None
    return bare[len(before) : len(bare) - len(after)]
