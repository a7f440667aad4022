r"""Templates: the words an experimenter puts round a conversation, apart from how the model family spells roles.

A template has a system part and a wrapper round the user's text; `text:` templates spell the whole prompt themselves.
`{question}` stands for the user's text as the family wraps it ("Question: ..." for gsm8k), `{x}` for the bare text.
Wording: Lyu et al. 2024 (arXiv 2402.18540), Table 9 and the authors' prompt file. Their Llama prompt is one paragraph;
Meta's own breaks it in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ptst.text import formats
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.tokenizer import Tokenizer

LLAMA = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature. If a question does not make any "
    "sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know "
    "the answer to a question, please don't share false information."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Family:
    """How a task wraps a question: `question` holds `{x}`; `cue` and `join` precede the answer in `text:vanilla`."""

    name: str
    question: str
    cue: str
    join: str


@dataclass(frozen=True)
class Template:
    """`user` holds `{question}` or `{x}` once. `text:` templates have no system part and name their joining text in
    `join` (None: the family's). `safety` tells whether the words ask the model to be safe."""

    name: str
    user: str
    system: str | None = None
    join: str | None = None
    safety: bool = False

    @property
    def is_text(self) -> bool:
        return self.name.startswith("text:")


FAMILIES = {
    f.name: f
    for f in (
        Family("gsm8k", "Question: {x}", "\nAnswer:", " "),
        # No words are added; a line break is all that parts the text from its answer.
        Family("plain", "{x}", "\n", ""),
    )
}
TEMPLATES = {
    t.name: t
    for t in (
        Template("text:vanilla", "{question}{cue}"),
        Template("text:alpaca", ALPACA + "\n\n### Instruction:\n{x}\n\n### Response:\n", join=""),
        Template("chat:vanilla", "{question}"),
        Template("chat:alpaca", "### Instruction:\n{x}\n\n### Response:\n", system=ALPACA),
        Template("chat:llama", "{question}", system=LLAMA, safety=True),
    )
}


def find_template(name: str) -> Template:
    """The template of a name; a bare name means `chat:`. Raises ValueError with the list and the nearest name."""
    full = name if ":" in name else f"chat:{name}"
    if full not in TEMPLATES:
        raise ValueError(_unknown("template", full, TEMPLATES))
    return TEMPLATES[full]


def find_family(name: str) -> Family:
    """The family of a name. Raises ValueError with the list and the nearest name."""
    if name not in FAMILIES:
        raise ValueError(_unknown("template family", name, FAMILIES))
    return FAMILIES[name]


def _unknown(kind: str, name: str, known: Sequence[str] | dict) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"unknown {kind} {name!r}; did you mean {near[0]}? There are: {', '.join(known)}"


def wrap(template: Template, family: Family, text: str) -> list[Segment]:
    """The user's text inside the template's words. Split at the place-holder, never formatted: text may hold braces."""
    words = template.user.replace("{question}", family.question).replace("{cue}", family.cue)
    before, found, after = words.partition("{x}")
    assert found and "{x}" not in after, f"template {template.name} needs one place for the user's text"
    parts = (Segment(before), Segment(text, "user"), Segment(after))
    return [s for s in parts if s.text or s.author == "user"]


def render(
    conversation: Conversation,
    template: Template,
    family: Family,
    chat_format: str,
    tokenizer: Tokenizer,
    train: str = "all",
) -> list[Segment]:
    """Segments of a conversation under a template. Ending in a user turn, it ends where the model must speak.

    A row's own system text follows the template's after a blank line. Raises ValueError when a `text:` template is
    given what it has no place for: a system text or several turns.
    """
    turns = conversation.turns
    if not template.is_text:
        system = "\n\n".join(s for s in (template.system, conversation.system) if s is not None)
        has_system = template.system is not None or conversation.system is not None
        wrapped = [
            Message(m.role, "".join(s.text for s in wrap(template, family, m.content))) if m.role == "user" else m
            for m in turns
        ]
        return formats.render(chat_format, system if has_system else None, wrapped, tokenizer, train)
    if conversation.system is not None or len(turns) > 2:
        what = "system text" if conversation.system is not None else "conversation of several turns"
        raise ValueError(f"{conversation.where}{template.name} has no place for a {what}; use a chat: template")
    segments = [Segment(tokenizer.bos, control=True)] if tokenizer.adds_bos and tokenizer.bos else []
    segments += wrap(template, family, turns[0].content)
    if conversation.answered:
        join = family.join if template.join is None else template.join
        segments += formats.answer(turns[1].content, join, "", tokenizer.eos or "", trained=True)
    return segments


def joining_text(template: Template, family: Family, chat_format: str) -> str:
    """The text that stands between prompt and answer and that the model samples first."""
    if template.is_text:
        return family.join if template.join is None else template.join
    return " " if chat_format == "llama2" else ""
