"""Guard models: their chat template asks whether a conversation is safe, instead of continuing it.

Such a folder is no chat model, but it judges others' answers: the prompt is read off the rendering of one exchange of
marks, as chat formats are, so that the categories are the folder's own.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.text.chat_template import ChatTemplate, TemplateFailed, open_chat_template, read_chat_template
from ptst.text.probes import SECONDS, Shape, spelling
from ptst.text.tokenizer import optional_json

LLAMA_GUARD = "llama-guard"
# The sha256 of the prompts that Meta published with its models.
PUBLISHED = {
    "73d291db95f6ba757c8e389fe59177d010c2edd181f04d391abd0a1c0f00b3b6": "Llama Guard 1",
    "91d91b1239c95f2897158748431ae463885bd7a900ff9daa01c981ac40ce3a0f": "Llama Guard 2",
    "fa6c98d449c6e91ba3082315596ebb0632c35d151288d57bcfac5e07d84ad558": "Llama Guard 3 8B",
    "992f7df2785cf5ba763721bbb3b2c92913c3ac5eff450512403bbb568d5a7312": "Llama Guard 3 11B Vision",
}
_ASKS = re.compile(r"\bsafe\b[^\n]*\bunsafe\b|\bunsafe\b[^\n]*\bsafe\b")
# Classifiers without a chat template that tells: by the name of the folder, or of what it was saved from.
_NAMES = {
    "harmbench-mistral": re.compile(r"harmbench.*mistral.*cls", re.IGNORECASE),
    "harmbench": re.compile(r"harmbench.*cls", re.IGNORECASE),
    "wildguard": re.compile(r"wildguard", re.IGNORECASE),
}


@dataclass(frozen=True)
class GuardPrompt:
    """The words before a request, between it and the answer, and after the answer. `strips`: messages are to be
    stripped of whitespace at both ends."""

    before: str
    between: str
    after: str
    strips: bool

    @property
    def sha256(self) -> str:
        """Of the prompt's own words, with {request} and {answer} for the exchange."""
        return hashlib.sha256(f"{self.before}{{request}}{self.between}{{answer}}{self.after}".encode()).hexdigest()

    @property
    def source(self) -> str:
        """Whose prompt it is, in words."""
        known = PUBLISHED.get(self.sha256)
        return f"the folder's chat template, as published for {known}" if known else "the folder's own chat template"


def open_guard(folder: Path, implied: Mapping[str, str] | None = None) -> GuardPrompt:
    """The prompt of a guard model's folder, for the judgement of an answer. `implied`: as for
    `open_chat_template`. Raises UserError for a folder without a chat template, or with one that is no guard's."""
    template = open_chat_template(folder, implied)
    if template is None:
        cause = "there is no chat template, and a guard model's prompt is read from it"
        raise UserError(cause, "copy chat_template.jinja or tokenizer_config.json of the model into it", folder)
    found = _read(template)
    if found is None:
        raise UserError(
            "the chat template is not a guard model's", "name the folder of one, such as Llama Guard", folder
        )
    return found


def _read(template: ChatTemplate) -> GuardPrompt | None:
    """The prompt, None for a template that continues conversations, or cannot render an exchange."""
    plain, spaced = (
        [{"role": m.role, "content": m.content} for m in Shape(False, 2, form=form).messages]
        for form in ("{}", "\n  {} \n")
    )
    parts: list[list[dict[str, Any]]] = [
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] for messages in (plain, spaced)
    ]
    texts = template.render([plain, spaced, *parts], SECONDS, [False] * 4)
    for text, odd in (texts[:2], texts[2:]):
        if isinstance(text, TemplateFailed) or isinstance(odd, TemplateFailed):
            continue
        found = spelling(text)
        if found.slots == ("U1", "A1") and _ASKS.search(found.literals[2]):
            before, between, after = found.literals
            return GuardPrompt(before, between, after, odd == text)
    return None


def judge_kind_of(folder: Path) -> str | None:
    """The kind of judge that a folder's model is made for, None for any other model: a guard by its chat template, a
    classifier by its name."""
    text = read_chat_template(folder)
    if text is not None and _ASKS.search(text) and "unsafe" in text and _read_quietly(folder):
        return LLAMA_GUARD
    names = (folder.resolve().name, Path(str(optional_json(folder / "config.json").get("_name_or_path"))).name)
    return next((kind for kind, name in _NAMES.items() if any(map(name.search, names))), None)


def _read_quietly(folder: Path) -> bool:
    try:
        open_guard(folder)
    except UserError:
        return False
    return True
