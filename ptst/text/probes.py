"""How a folder's chat template writes conversations: it is rendered on short ones whose messages are marks that occur
nowhere else, so that every character of the result is either a message's or the template's.

All renderings of a folder come from one run of the sandbox.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

from ptst.text.chat_template import ChatTemplate, TemplateFailed
from ptst.text.segments import Message

SECONDS = 5
_MARK = "\ue0f0{}\ue0f1"  # of the private use area, which no template spells
_MARKS = re.compile("\ue0f0(S|[UA]\\d+)\ue0f1")
_SPACED = "\n  {} \n"
_REASONED = "<think>\nr\n</think>\n\n{}"
_ODD = ("$5 {}", "<tool_response>{}</tool_response>", "<<SYS>> {}")
_INNER = "{}a\n\n\nb \t c\r\nd <b> & {{x}} %s \"q\" 'q' \\n \u00e9 I"


@dataclass(frozen=True)
class Shape:
    """A kind of conversation: with a system prompt or without, its number of turns, and what its texts look like.
    `prompt` None: a generation prompt where it ends in a user's turn. The messages of the roles `of` have the `form`.
    """

    system: bool
    turns: int
    prompt: bool | None = None
    form: str = "{}"
    of: str = "SUA"

    @property
    def messages(self) -> list[Message]:
        marks = ["S"] * self.system + [f"{'UA'[i % 2]}{i // 2 + 1}" for i in range(self.turns)]
        roles = {"S": "system", "U": "user", "A": "assistant"}
        forms = ((m, self.form if m[0] in self.of else "{}") for m in marks)
        return [Message(roles[m[0]], form.replace("{}", _MARK.format(m))) for m, form in forms]

    @property
    def wants_prompt(self) -> bool:
        return self.turns % 2 == 1 if self.prompt is None else self.prompt

    def __str__(self) -> str:
        kind = "a generation prompt" if self.turns % 2 else "a conversation that ends in an answer"
        return f"{kind} of {self.turns} turns {'with' if self.system else 'without'} a system prompt"


# Four generation prompts, four conversations that end in an answer; then longer ones, for what was derived from these.
PROMPTS = tuple(Shape(s, n) for n in (1, 3) for s in (False, True))
ANSWERED = tuple(Shape(s, n) for n in (2, 4) for s in (False, True))
LONGER = tuple(Shape(s, n) for n in (5, 6) for s in (False, True))
_FLAG = Shape(False, 1, prompt=False), Shape(True, 1, prompt=False)
_ODD_TEXTS = ((_SPACED, "SUA"), (_INNER, "SUA"), (_REASONED, "A"), *((form, "UA") for form in _ODD))
_FORMS = tuple(Shape(s, n, form=form, of=of) for s in (False, True) for n in (2, 3) for form, of in _ODD_TEXTS)
_ALL = (*PROMPTS, *ANSWERED, *LONGER, *_FLAG, *_FORMS)


@dataclass(frozen=True)
class Spelling:
    """A rendered conversation: `literals[i]` precedes the message `slots[i]`, the last one follows all."""

    text: str
    literals: tuple[str, ...]
    slots: tuple[str, ...]

    def between(self, before: str, after: str) -> str:
        """The template's text between two messages that are neighbours, "" where they are none."""
        at = self.slots.index(before) + 1
        return self.literals[at] if self.slots[at : at + 1] == (after,) else ""


def split_marks(text: str) -> list[str]:
    """A text of a chat template, cut around the marks of messages."""
    return re.split("(\ue0f0(?:S|[UA]\\d+)\ue0f1)", text)


def spelling(text: str) -> Spelling:
    parts = _MARKS.split(text)
    return Spelling(text, tuple(parts[::2]), tuple(parts[1::2]))


@dataclass(frozen=True)
class Probes:
    """The spellings of all shapes; a shape that the template refuses has its error."""

    template: ChatTemplate
    found: dict[Shape, Spelling | TemplateFailed]

    def get(self, shape: Shape) -> Spelling | None:
        """The spelling of a shape, None where the template refuses it."""
        found = self.found[shape]
        return found if isinstance(found, Spelling) else None

    def error(self, shape: Shape) -> str:
        found = self.found[shape]
        return found.cause if isinstance(found, TemplateFailed) and isinstance(found.cause, str) else ""

    @cached_property
    def ignores_flag(self) -> bool:
        """Whether a generation prompt makes no difference to the template."""
        return all(self.get(replace(f, prompt=None)) == self.get(f) for f in _FLAG)

    @cached_property
    def default(self) -> str | None:
        """The system prompt that is inserted where a conversation has none."""
        given, bare = self.get(Shape(True, 1)), self.get(Shape(False, 1))
        if given is None or bare is None or given.slots != ("S", "U1") or bare.slots != ("U1",):
            return None
        (before, after, _), start = given.literals, bare.literals[0]
        if not (start.startswith(before) and start.endswith(after)):
            return None
        return start[len(before) : len(start) - len(after)] or None

    def changes(self, form: str, of: str = "SUA") -> bool:
        """Whether messages of a form come out otherwise than as they are, or change what is around them."""
        for shape in _FORMS:
            plain, odd = self.get(replace(shape, form="{}", of="SUA")), self.get(shape)
            if (shape.form, shape.of) != (form, of) or plain is None:
                continue
            wanted = plain.text
            for message in shape.messages:
                mark = _MARKS.search(message.content)
                wanted = wanted.replace(mark[0], message.content) if mark else wanted
            if odd is None or odd.text != wanted:
                return True
        return False

    @cached_property
    def strips(self) -> bool:
        return self.changes(_SPACED)

    @cached_property
    def depends_on_text(self) -> bool:
        return self.changes(_REASONED, "A") or any(self.changes(odd, "UA") for odd in _ODD)

    @cached_property
    def rewrites(self) -> bool:
        return self.changes(_INNER)


def probe(template: ChatTemplate) -> Probes:
    """Render a chat template on all shapes. Raises UserError for one that is no template, does not end, or calls what
    the sandbox forbids."""
    conversations = [[{"role": m.role, "content": m.content} for m in shape.messages] for shape in _ALL]
    texts = template.render(conversations, SECONDS, [shape.wants_prompt for shape in _ALL])
    pairs = zip(_ALL, texts, strict=True)
    return Probes(
        template, {shape: text if isinstance(text, TemplateFailed) else spelling(text) for shape, text in pairs}
    )
