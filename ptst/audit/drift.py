"""Against other sources of truth: the model's own chat_template, and a finished run's record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptst.audit.findings import Finding
from ptst.audit.spelling import words
from ptst.text.departures import DATE_PREAMBLE, DEFAULT_SYSTEM_TEXT, OUTER_WHITESPACE, Departure
from ptst.text.encode import Prompting
from ptst.text.files import chat_template
from ptst.text.formats import render
from ptst.text.own_template import default_system, render_own
from ptst.text.segments import Conversation, Message

SAMPLE = 20


def check_own_template(folder: Path, conversations: Sequence[Conversation], prompting: Prompting) -> Iterator[Finding]:
    """Generation prompts of the first rows, as the format spells them and as the folder's own template does."""
    if prompting.template.is_text or chat_template(folder) is None:
        return
    sample = conversations[:SAMPLE]
    every = [words(c.prompt(), prompting) for c in sample]
    try:
        default = default_system(folder)
        spelled = render_own(folder, [_messages(system, texts) for system, texts in every])
    except ValueError as error:
        yield Finding("own-template", "", str(error))
        return
    seen: set[str] = set()
    for conversation, (system, texts), theirs in zip(sample, every, spelled, strict=True):
        ours = _spell(system, texts, prompting)
        if ours == theirs:
            continue
        departure = _explain(system, texts, prompting, default, theirs)
        name = departure.name if departure else "own-template"
        if name in seen:
            continue
        seen.add(name)
        if departure:
            yield Finding(
                "departure", conversation.source, f"{departure.name}: {departure.owner}; here, {departure.ours}"
            )
        else:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            cause = f"at character {at} the format has {ours[at : at + 16]!r}, the model's own {theirs[at : at + 16]!r}"
            yield Finding("own-template", conversation.source, cause)


def _explain(
    system: str | None, texts: list[str], prompting: Prompting, default: str | None, theirs: str
) -> Departure | None:
    """The departure on purpose that makes the difference, if one does."""
    ours = _spell(system, texts, prompting)
    if system is None and default is not None and _spell(default, texts, prompting) == theirs:
        return DEFAULT_SYSTEM_TEXT
    bare = [t.strip() for t in texts]
    for base in (system, system.strip() if system is not None else default):
        if _spell(base, bare, prompting) == theirs:
            return OUTER_WHITESPACE
    body = ours.removeprefix(prompting.tokenizer.bos or "")
    if prompting.chat_format == "llama3" and system is None and theirs.endswith(body):
        return DATE_PREAMBLE
    return None


def _messages(system: str | None, texts: list[str]) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts))]


def _spell(system: str | None, texts: list[str], prompting: Prompting) -> str:
    turns = [Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)]
    return "".join(s.text for s in render(prompting.chat_format, system, turns, prompting.tokenizer))


def check_run(run: dict[str, Any], prompting: Prompting, fingerprint: str, encoding: str) -> Iterator[Finding]:
    """Would a finished run's data be encoded the same today? `run` is its run.json."""
    data = run.get("data", {})
    for what, then, now in (
        ("template", run.get("template"), asdict(prompting.template)),
        ("family", run.get("family"), asdict(prompting.family)),
        ("chat format", run.get("chat_format"), prompting.chat_format),
        ("data", data.get("fingerprint"), fingerprint),
        ("token ids", data.get("encoding"), encoding),
    ):
        if _plain(then) != _plain(now):
            detail = f": {then} then, {now} now" if isinstance(now, str) else ""
            yield Finding("run-drift", "run.json", f"the {what} of the run is not today's{detail}")


def _plain(value: Any) -> Any:
    """As JSON gives it back: no tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
