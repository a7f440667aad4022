"""The chat template of a model folder: a Jinja program that came with the model.

It never encodes training or test data. It serves to find or derive the chat format, to compare ours with the owner's,
and to know the owner's default system prompt. Since it is foreign code, it runs in jinja2's immutable sandbox, in a
child process with limits on time and memory.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ptst.errors import UserError
from ptst.progress import say
from ptst.reading import read_text
from ptst.storage import write_atomically
from ptst.text.added_tokens import optional_json, token_config, token_name
from ptst.text.baked import Baked, read_baked

SECONDS = 20
MEGABYTES = 1024
JINJA_FILE, MORE = Path("chat_template.jinja"), Path("additional_chat_templates")
JINJA = (str(JINJA_FILE), f"{MORE}/*.jinja")
_JSON_FILES = ("tokenizer_config.json", "chat_template.json")
_FILE_NAME = re.compile(r"\w[\w.-]*")
_CHILD = Path(__file__).with_name("_jinja_child.py")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
Message = dict[str, Any]
Conversation = Sequence[Message]
T = TypeVar("T")


class TemplateFailed(UserError):
    """A chat template that refuses or fails to render a conversation."""


@dataclass(frozen=True)
class ChatTemplate:
    """A folder's chat template, and what it is rendered with: the names of control tokens, and `switches` that are not
    at their defaults."""

    folder: str
    text: str
    tokens: tuple[tuple[str, str], ...] = ()
    switches: tuple[tuple[str, bool], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of all that its renderings depend on, with every switch at its default."""
        return hashlib.sha256(json.dumps([self.text, self.tokens]).encode()).hexdigest()[:16]

    def render(
        self, conversations: Sequence[Conversation], seconds: int = SECONDS, prompts: Sequence[bool] | None = None
    ) -> list[str | TemplateFailed]:
        """Each conversation ({"role", "content"} messages) as text, or the reason why the template fails on it.
        `prompts`: whether each gets a generation prompt (None: where it ends in a user's turn). Raises UserError if it
        needs more than `seconds` of CPU time or 1 GB of memory, or calls what the sandbox forbids, and TemplateFailed
        if it is no template at all."""
        asked = prompts or [c[-1]["role"] == "user" for c in conversations]
        rows = [{"messages": list(c), "add_generation_prompt": a} for c, a in zip(conversations, asked, strict=True)]
        found = _run(self, json.dumps(rows), seconds)
        failed = "the chat template "
        return [
            row["text"] if "text" in row else TemplateFailed(failed + row["error"], where=self.folder)
            for row in found["rows"]
        ]

    @property
    def thinks(self) -> bool:
        """Whether it has Qwen3's switch of reasoning."""
        return "enable_thinking" in self.text

    @property
    def is_dated(self) -> bool:
        """Whether it writes today's date, for which ours has a fixed one."""
        return "strftime_now" in self.text


@lru_cache(32)
def _run(template: ChatTemplate, rows: str, seconds: int) -> dict:
    """The child's answer."""
    # As transformers passes them: absent tools and documents are None.
    variables: dict[str, object] = {
        "bos_token": "",
        "eos_token": "",
        **dict(template.tokens),
        "tools": None,
        "documents": None,
    }
    variables |= dict(template.switches)
    job = {"template": template.text, "variables": variables, "rows": json.loads(rows)}
    job |= {"seconds": seconds, "megabytes": MEGABYTES}
    try:
        # -I: neither the user's environment nor the current folder can put another jinja2 in the way.
        command, limit = [sys.executable, "-I", str(_CHILD)], 3 * seconds
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, check=True, text=True, timeout=limit)
    except subprocess.SubprocessError:
        cause = f"the chat template did not end within {seconds} s"
        raise UserError(cause, "it may loop for ever", template.folder) from None
    answer = json.loads(done.stdout)
    if "error" in answer:
        kind = TemplateFailed if answer.get("failed") else UserError
        raise kind(f"the chat template {answer['error']}", where=template.folder)
    return answer


def read_chat_template(folder: Path | str) -> str | None:
    """The text of the model's own chat template: that of the folder, and where ptst baked a template into that one, the
    one that it replaced. None where there is none. Raises UserError as `written_chat_template`, and for a baked one
    that was edited."""
    text = written_chat_template(folder)
    baked = None if text is None else read_baked(text, folder)
    return text if baked is None else baked.own


def baked_into(folder: Path | str) -> Baked | None:
    """What was baked into a folder's chat template, None where nothing was. Raises as `read_chat_template`."""
    text = written_chat_template(folder)
    return None if text is None else read_baked(text, folder)


def written_chat_template(folder: Path | str) -> str | None:
    """The text of a folder's chat template, as other programs read it: chat_template.jinja, or the entry of
    tokenizer_config.json or chat_template.json; of several named ones, the default. Named ones in
    additional_chat_templates/ replace the entry, as in transformers. None where there is none. Raises UserError for a
    file that is not text, and for named templates without a default one."""
    folder = Path(folder)
    if (folder / JINJA_FILE).exists():
        return _text(folder / JINJA_FILE)
    if named := {path.stem: path for path in sorted((folder / MORE).glob("*.jinja"))}:
        return _text(_default(named, folder / MORE))
    for name in _JSON_FILES:
        entry = optional_json(folder / name).get("chat_template")
        if (texts := _named(entry)) or (entry and isinstance(entry, dict)):
            return _default(texts, folder / name)
    return None


def copy_chat_templates(folder: Path, out: Path) -> None:
    """Put a model folder's chat templates, wherever it has them, into another folder as files: chat_template.jinja, and
    the other named ones in additional_chat_templates/, where `transformers`, `peft`'s trainers and vLLM have them."""
    files = {path.relative_to(folder): path.read_bytes() for pattern in JINJA for path in sorted(folder.glob(pattern))}
    for name, text in () if files else _entries(folder):
        if not _FILE_NAME.fullmatch(name):
            say(f"note: {folder}: its chat template {name!r} is left out: the name cannot be a file's")
            continue
        files[JINJA_FILE if name == "default" else MORE / f"{name}.jinja"] = text.encode(errors="surrogatepass")
    for path, content in files.items():
        if path.parent == MORE and not (out / MORE).is_dir():
            (out / MORE).mkdir()
        write_atomically(out / path, content)


def _entries(folder: Path) -> list[tuple[str, str]]:
    """Names and texts of the chat templates in a folder's JSON files."""
    for file in _JSON_FILES:
        if named := _named(optional_json(folder / file).get("chat_template")):
            return list(named.items())
    return []


def _named(entry: object) -> dict[str, str]:
    """The chat templates of an entry of a JSON file, by name: one text, a list of named ones, or an object of them."""
    if isinstance(entry, list):
        entry = {e.get("name"): e.get("template") for e in entry if isinstance(e, dict)}
    if isinstance(entry, str):
        entry = {"default": entry}
    pairs = entry.items() if isinstance(entry, dict) else ()
    return {str(name): text for name, text in pairs if isinstance(text, str)}


def _default(named: Mapping[str, T], where: Path) -> T:
    if "default" not in named:
        cause = f"of its chat templates ({', '.join(map(str, named))}) none is named default"
        raise UserError(cause, "write the one to use into chat_template.jinja", where)
    return named["default"]


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", "fetch the file again", path) from None


def open_chat_template(folder: Path | str, implied: Mapping[str, str] | None = None) -> ChatTemplate | None:
    """The chat template of a folder, None where there is none. `implied`: the tokenizer's own names, for roles to which
    the folder gives none. Raises UserError as `read_chat_template`."""
    text, where = read_chat_template(folder), Path(folder) / "tokenizer_config.json"
    if text is None:
        return None
    config = token_config(Path(folder))
    # Any other key of this form names a token, too, in transformers.
    more = {key: value for key, value in config.items() if key.endswith("_token") and key not in _TOKENS}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        more |= config[key] if isinstance(config.get(key), dict) else {}
    given = {key: config[key] for key in _TOKENS if key in config} | {key: more[key] for key in more if key in text}
    named = {key: token for key, value in given.items() if (token := token_name(value, where)) is not None}
    tokens = {key: token for key, token in (implied or {}).items() if key not in given} | named
    return ChatTemplate(str(folder), text, tuple(sorted(tokens.items())))


def render_chat_template(
    folder: Path | str,
    conversations: Sequence[Conversation],
    seconds: int = SECONDS,
    switches: tuple[tuple[str, bool], ...] = (),
) -> list[str]:
    """Each conversation as the folder's chat template renders it, with a generation prompt where it ends in a user's
    turn. `switches` as in `ChatFormat`. Raises UserError if the folder has no chat template, and as
    `ChatTemplate.render`; TemplateFailed if one of them cannot be rendered."""
    template = open_chat_template(folder)
    if template is None:
        raise UserError("there is no chat template", "choose another model folder", folder)
    texts = []
    for text in replace(template, switches=switches).render(conversations, seconds):
        if isinstance(text, TemplateFailed):
            raise text
        texts.append(text)
    return texts


def default_system_prompt(folder: Path | str) -> str | None:
    """The system prompt that the folder's chat template inserts where a conversation has none, if it inserts one."""
    template = open_chat_template(folder)
    if template is None:
        return None
    system, user = "a system prompt to look for", "a user's text to look for"
    asked = [{"role": "user", "content": user}]
    try:
        given, bare = template.render([[{"role": "system", "content": system}, *asked], asked])
    except TemplateFailed:
        return None
    if isinstance(given, TemplateFailed) or isinstance(bare, TemplateFailed):
        return None  # a template that refuses system prompts has no default one
    before, found, after = given.partition(system)
    if not (found and bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after)):
        return None
    return bare[len(before) : len(bare) - len(after)]
