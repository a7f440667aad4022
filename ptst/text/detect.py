"""Which chat format a model folder has, how that was found, and whether it is the folder's own."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ptst.errors import Setting, UserError, unknown_name
from ptst.text.chat_formats import CHAT_FORMATS, NO_CHAT_FORMAT, ChatFormat
from ptst.text.chat_template import baked_into, open_chat_template
from ptst.text.derive import NotDerived, derive
from ptst.text.laws import LawBroken, check_laws
from ptst.text.owner_check import Fit, fit
from ptst.text.probes import ANSWERED, LONGER, PROMPTS, Probes, probe
from ptst.text.tokenizer import Tokenizer

DERIVED = "derived"
probed = lru_cache(32)(probe)


@dataclass(frozen=True)
class Found:
    """A chat format, and in words how it was found and what differs from the folder's chat template."""

    chat_format: ChatFormat
    how: str


def check_name(chosen: str | None) -> None:
    """Raise UserError for an unknown chat format."""
    known = (*CHAT_FORMATS, DERIVED)
    if chosen and chosen.partition(":")[0] not in (*known, NO_CHAT_FORMAT.name):
        raise unknown_name("chat format", chosen, known)


def find_format(
    folder: Path | str,
    tokenizer: Tokenizer,
    chosen: str | None = None,
    *,
    ends: Collection[str] = (),
    allow_chat_template: bool = False,
) -> Found:
    """The chat format of a model folder, or the `chosen` one, compared with the folder's chat template. `ends`: control
    tokens that end an answer, besides EOS. Raises UserError where none is found, and for a difference from the chat
    template that is no known one, unless these are allowed."""
    check_name(chosen)
    baked = baked_into(folder)
    if baked is not None:
        found = _find(folder, tokenizer, chosen or baked.chat_format, ends, allow_chat_template or not chosen)
        how = found.how if chosen else found.how.replace("the one asked for", "the one that it was baked in")
        return Found(found.chat_format, f"{how}; the folder's chat_template.jinja is {baked}")
    return _find(folder, tokenizer, chosen, ends, allow_chat_template)


def _find(
    folder: Path | str, tokenizer: Tokenizer, chosen: str | None, ends: Collection[str], allow_chat_template: bool
) -> Found:
    name, _, fingerprint = (chosen or "").partition(":")
    if name == NO_CHAT_FORMAT.name:  # recorded by a run under a text: template
        name = ""
    template = open_chat_template(folder, tokenizer.implied)
    if template is None:
        return _without_template(folder, tokenizer, name)
    if fingerprint and fingerprint != template.fingerprint:
        cause = f"the chat template is not the one that the chat format {chosen} was derived from"
        raise UserError(cause, "put that back, or train again", folder)
    if tokenizer.bos and "bos_token" in template.text and not tokenizer.has_control(tokenizer.bos):
        cause = (
            f"the chat template writes bos_token, which is named {tokenizer.bos!r}, and the tokenizer has no such token"
        )
        raise UserError(cause, "name the right one as bos_token in tokenizer_config.json", folder)
    if name in CHAT_FORMATS:
        template = replace(template, switches=CHAT_FORMATS[name].switches)
    try:
        probes = probed(template)
    except UserError as error:
        if allow_chat_template and (usable := _usable(name, tokenizer)):
            return usable
        remedy = ("choose a ", Setting("chat_format"), " and allow it with ", Setting("allow"), " chat-template")
        raise UserError(error.cause, error.remedy or remedy, folder) from None
    if name == DERIVED:
        return _derived(folder, tokenizer, probes, ends)
    if name:
        return _compared(CHAT_FORMATS[name], probes, tokenizer, allow_chat_template)
    for chat_format in CHAT_FORMATS.values():
        if chat_format.suits(tokenizer):
            found = fit(chat_format, probes, tokenizer)
            if not found.wrong:
                return Found(chat_format, _told("as the folder's chat template has it", found, probes))
    try:
        return _derived(folder, tokenizer, probes, ends)
    except UserError:
        if allow_chat_template and (usable := _usable(name, tokenizer)):
            return usable
        raise


def _usable(name: str, tokenizer: Tokenizer) -> Found | None:
    """The chosen format, else the one that the vocabulary tells, beside a chat template of which nothing is known."""
    chosen = CHAT_FORMATS.get(name) if name else _by_vocabulary(tokenizer)
    how = "the one asked for" if name else "told by the vocabulary"
    return Found(chosen, f"{how}; the folder's chat template cannot be compared with it") if chosen else None


def _by_vocabulary(tokenizer: Tokenizer) -> ChatFormat | None:
    return next((f for f in CHAT_FORMATS.values() if f.control_tokens and f.suits(tokenizer)), None)


def detect_format(folder: Path | str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model folder. Raises UserError as `find_format`."""
    return find_format(folder, tokenizer).chat_format


def _without_template(folder: Path | str, tokenizer: Tokenizer, name: str) -> Found:
    if name == DERIVED:
        raise UserError("there is no chat template to derive a chat format from", "choose another one", folder)
    if name:
        return Found(CHAT_FORMATS[name], "the one asked for; the folder has no chat template")
    if told := _by_vocabulary(tokenizer):
        return Found(told, "told by the vocabulary; the folder has no chat template")
    remedy = ("choose ", Setting("chat_format"), f" {' or '.join(CHAT_FORMATS)}, or for a base model a text: template")
    raise UserError("cannot tell the chat format of this model, which has no chat template", remedy, folder)


def _compared(chat_format: ChatFormat, probes: Probes, tokenizer: Tokenizer, allowed: bool) -> Found:
    """A chosen format. Raises UserError for one that the tokenizer or the chat template contradicts."""
    folder = probes.template.folder
    for token in chat_format.control_tokens:
        tokenizer.control_id(token)
    found = fit(chat_format, probes, tokenizer)
    if found.wrong and not allowed:
        remedy = ("leave out ", Setting("chat_format"), ", or allow it with ", Setting("allow"), " chat-template")
        raise UserError(f"{chat_format.name} is not the chat format of this folder: {found.wrong}", remedy, folder)
    if found.wrong:
        return Found(chat_format, f"the one asked for, and not the folder's: {found.wrong}")
    return Found(chat_format, _told("the one asked for, as the folder's chat template has it", found, probes))


def _derived(folder: Path | str, tokenizer: Tokenizer, probes: Probes, ends: Collection[str]) -> Found:
    tokenizer = tokenizer.like_transformers()
    try:
        chat_format = derive(probes, tokenizer, tuple(ends))
        found = fit(chat_format, probes, tokenizer, (*PROMPTS, *ANSWERED, *LONGER))
        if found.wrong:
            cause = "the chat format derived from the chat template breaks law 8: it is not the owner's, "
            remedy = ("choose a ", Setting("chat_format"), ", or use a text: template")
            raise LawBroken(cause + found.wrong, remedy, folder)
        found = Fit((*found.differences, *check_laws(chat_format, tokenizer, folder)))
    except (NotDerived, LawBroken) as error:
        raise UserError(error.cause, error.remedy, folder) from None
    chat_format = replace(chat_format, differences=found.differences)
    return Found(chat_format, _told("derived from the folder's chat template", found, probes))


def _told(how: str, found: Fit, probes: Probes) -> str:
    template = probes.template
    if template.thinks:
        state = "off" if ("enable_thinking", False) in template.switches else "at its default"
        how += f" (enable_thinking {state})"
    return how + (f" but for {', '.join(found.differences)}" if found.differences else "")
