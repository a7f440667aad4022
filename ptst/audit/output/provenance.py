"""Where a report comes from: versions, date, settings, and fingerprints of all that was read."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ptst import __version__
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.fingerprints import TOKENIZER
from ptst.records import git_commit
from ptst.settings import CommandSettings, to_dict
from ptst.text.chat_template import read_chat_template
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message

PACKAGES = ("tokenizers", "sentencepiece", "datasets", "jinja2")
_TURNS = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def provenance(
    config: CommandSettings,
    folder: Path,
    sources: Mapping[str, Source],
    prompt_format: PromptFormat,
    more: Iterable[Path] = (),
    mixed: Mapping[str, PromptFormat] = MappingProxyType({}),
) -> dict[str, Any]:
    """Date (UTC), versions, git commit, the settings that were given, and sha256 of the data (sources by name), `more`
    files or folders of files, the folder's tokenizer and chat template, the prompt format, and those of `mixed` sources
    that have their own."""
    files = sorted({path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()})
    defaults, template = to_dict(type(config)()), None
    with suppress(UserError):  # a damaged one is a finding
        template = read_chat_template(folder)
    fingerprints = {
        **{f"data {name}": source.fingerprint for name, source in sources.items()},
        **{str(path): _sha256(path) for each in more for path in _files(each)},
        **{str(path.relative_to(folder)): _sha256(path) for path in files},
        **({"chat template": hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()} if template else {}),
        "prompt format": prompt_fingerprint(prompt_format),
        **{f"prompt format of {name}": prompt_fingerprint(own) for name, own in mixed.items()},
    }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "versions": {"ptst": __version__, "python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
        "settings": {name: value for name, value in to_dict(config).items() if value != defaults[name]},
        "fingerprints": fingerprints,
    }


def prompt_fingerprint(prompt_format: PromptFormat) -> str:
    """sha256 of what template, chat format and family write around fixed messages, with and without system prompt."""
    written: list[Any] = []
    for system in ((), (("system", "s"),)):
        messages = tuple(Message(role, content) for role, content in (*system, *_TURNS))
        try:
            segments = prompt_format.segments(Conversation(messages))
            written.append([[s.text, s.control, s.author, s.trained] for s in segments])
        except UserError as error:  # a format without system prompts
            written.append(str(error))
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
