"""Comparisons with the model folder's chat template and with a finished run's record."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.reference_formats import template_words
from ptst.errors import UserError
from ptst.records import TrainRecord
from ptst.text.chat_template import default_system_prompt, read_chat_template, render_chat_template
from ptst.text.encode import first_difference
from ptst.text.known_differences import DATE_PREAMBLE, DEFAULT_SYSTEM_PROMPT, OUTER_WHITESPACE, KnownDifference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message, Segment, plain_turns

SAMPLE = 20


def check_chat_template(
    folder: Path, conversations: Sequence[Conversation], prompt_format: PromptFormat
) -> Iterator[Finding]:
    """Generation prompts of the first rows: ours against those of the folder's chat template."""
    if prompt_format.template.is_text or read_chat_template(folder) is None:
        return
    prompts = [_prompt(c, prompt_format) for c in conversations[:SAMPLE]]
    try:
        default = default_system_prompt(folder)
        switches = prompt_format.chat_format.switches
        rendered = render_chat_template(folder, [prompt.to_json() for prompt in prompts], switches=switches)
    except UserError as error:
        yield Finding("chat-template", "", str(error))
        return
    found: dict[str, Finding] = {}  # the first of each kind
    for prompt, theirs in zip(prompts, rendered, strict=True):
        ours = _render(prompt.system, prompt.turns, prompt_format)
        if ours == theirs:
            continue
        if known := _known_difference(prompt, prompt_format, default, theirs):
            cause = f"{known.name}: {known.owner}; here, {known.ours}"
            found.setdefault(known.name, Finding("known-difference", prompt.source, cause))
        else:
            at = first_difference(ours, theirs)
            cause = f"at character {at} the format has {ours[at : at + 16]!r}, the model's own {theirs[at : at + 16]!r}"
            found.setdefault("", Finding("chat-template", prompt.source, cause))
    yield from found.values()


def _prompt(conversation: Conversation, prompt_format: PromptFormat) -> Conversation:
    """The conversation's prompt in the template's words."""
    system, texts = template_words(conversation.prompt(), prompt_format)
    turns = (Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Conversation((*([] if system is None else [Message("system", system)]), *turns), conversation.source)


def _known_difference(
    prompt: Conversation, prompt_format: PromptFormat, default: str | None, theirs: str
) -> KnownDifference | None:
    """The known difference that explains all of the difference, if one does."""
    system, turns = prompt.system, prompt.turns
    if system is None and default is not None and _render(default, turns, prompt_format) == theirs:
        return DEFAULT_SYSTEM_PROMPT
    stripped = [Message(m.role, m.content.strip()) for m in turns]
    for base in (system, default if system is None else system.strip()):
        if _render(base, stripped, prompt_format) == theirs:
            return OUTER_WHITESPACE
    body = _render(system, turns, prompt_format).removeprefix(prompt_format.tokenizer.bos or "")
    if prompt_format.chat_format.name == "llama3" and system is None and theirs.endswith(body):
        return DATE_PREAMBLE
    return None


def _render(system: str | None, turns: Sequence[Message], prompt_format: PromptFormat) -> str:
    block = None if system is None else [Segment(system, "system")]
    return "".join(s.text for s in prompt_format.chat_format.render(block, plain_turns(turns), prompt_format.tokenizer))


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
