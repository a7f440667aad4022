"""Against other sources of truth: the model's own chat_template, and a finished run's record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.reference_formats import words
from ptst.records import TrainRecord
from ptst.text.chat_template import default_system_prompt, read_chat_template, render_chat_template
from ptst.text.known_differences import DATE_PREAMBLE, DEFAULT_SYSTEM_PROMPT, OUTER_WHITESPACE, KnownDifference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message, Segment, plain_turns

SAMPLE = 20


def check_chat_template(
    folder: Path, conversations: Sequence[Conversation], prompt_format: PromptFormat
) -> Iterator[Finding]:
    """Generation prompts of the first rows, as the format spells them and as the folder's own template does."""
    if prompt_format.template.is_text or read_chat_template(folder) is None:
        return
    sample = conversations[:SAMPLE]
    every = [words(c.prompt(), prompt_format) for c in sample]
    try:
        default = default_system_prompt(folder)
        spelled = render_chat_template(folder, [_messages(system, texts) for system, texts in every])
    except ValueError as error:
        yield Finding("chat-template", "", str(error))
        return
    seen: set[str] = set()
    for conversation, (system, texts), theirs in zip(sample, every, spelled, strict=True):
        ours = _spell(system, texts, prompt_format)
        if ours == theirs:
            continue
        difference = _explain(system, texts, prompt_format, default, theirs)
        name = difference.name if difference else "chat-template"
        if name in seen:
            continue
        seen.add(name)
        if difference:
            yield Finding(
                "known-difference",
                conversation.source,
                f"{difference.name}: {difference.owner}; here, {difference.ours}",
            )
        else:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            cause = f"at character {at} the format has {ours[at : at + 16]!r}, the model's own {theirs[at : at + 16]!r}"
            yield Finding("chat-template", conversation.source, cause)


def _explain(
    system: str | None, texts: list[str], prompt_format: PromptFormat, default: str | None, theirs: str
) -> KnownDifference | None:
    """The difference on purpose that makes the difference, if one does."""
    ours = _spell(system, texts, prompt_format)
    if system is None and default is not None and _spell(default, texts, prompt_format) == theirs:
        return DEFAULT_SYSTEM_PROMPT
    bare = [t.strip() for t in texts]
    for base in (system, system.strip() if system is not None else default):
        if _spell(base, bare, prompt_format) == theirs:
            return OUTER_WHITESPACE
    body = ours.removeprefix(prompt_format.tokenizer.bos or "")
    if prompt_format.chat_format.name == "llama3" and system is None and theirs.endswith(body):
        return DATE_PREAMBLE
    return None


def _messages(system: str | None, texts: list[str]) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts))]


def _spell(system: str | None, texts: list[str], prompt_format: PromptFormat) -> str:
    turns = plain_turns([Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)])
    block = None if system is None else [Segment(system, "system")]
    return "".join(s.text for s in prompt_format.chat_format.render(block, turns, prompt_format.tokenizer))


def check_run(run: TrainRecord, prompt_format: PromptFormat, fingerprint: str, encoding: str) -> Iterator[Finding]:
    """Would a finished run's data be encoded the same today?"""
    for what, then, now in (
        ("template", run.template, prompt_format.template),
        ("family", run.family, prompt_format.family),
        ("chat format", run.chat_format, prompt_format.chat_format.name),
        ("data", run.data.fingerprint, fingerprint),
        ("token ids", run.data.encoding, encoding),
    ):
        if then != now:
            detail = f": {then} then, {now} now" if isinstance(now, str) else ""
            yield Finding("run-drift", "run.json", f"the {what} of the run is not today's{detail}")
