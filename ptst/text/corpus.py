"""Conversations that a baked chat template is proven on: plain ones, and ones that mean no good. They are made for the
prompt format at hand: its control tokens, its role markers and its template's own words are among the texts.

The texts are those of the laws (tests/text/test_laws.py) and what can go wrong in a Jinja template besides.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message

PLAIN = (
    *("What is 2 + 2?", "It is 4.", "Are you sure?", "Yes, by counting.", "Why?", "Because 1 + 1 + 1 + 1 is 4."),
    *("Name three rivers in Europe.", "The Rhine, the Danube and the Loire.", "Explain it to a child, please."),
    *("def f(x):\n    return x * 2\n\nprint(f(3))", "1. First,\n2. then.", "Na\u00efve caf\u00e9, \u65e5\u672c\u8a9e."),
)
SYSTEMS = ("Be brief.", "You are a pirate.\n\nAnswer in rhyme.")
ODD = (
    *(
        "",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\r",
        " a ",
        "  two",
        "\n\nb\n",
        "c \n ",
        "\u3000d\xa0",
        "\u200b",
        "\ufeffe",
    ),
    *("\u00e9\u65e5\U0001f600", "e\u0301", "\u0323\u0307", "\u202eabc", "\ufdfa", "\uac01", "\u2581", "\u2581the"),
    *(
        "\U0001f469\u200d\U0001f4bb",
        "\x00",
        "\x7f",
        "\ufffd",
        "3.14",
        "4,5 123",
        "%s %d %(a)s",
        "<0x0A>",
        "### Response:",
    ),
    *(
        "{x}",
        "{question}",
        "{task}",
        "{{",
        "}}",
        "{{ messages }}",
        "{% if x %}",
        "{% endfor %}",
        "{# c #}",
        "#}",
        "-%}",
    ),
    *(
        '"',
        "'",
        "\\",
        "\\n",
        '\\"',
        "\\u0041",
        "{{ raise_exception('no') }}",
        "{%- generation -%}",
        "<b>&amp;</b>",
        "`",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|endoftext|>",
        "[INST]",
    ),
    *("[/INST]", "<<SYS>>", "<</SYS>>", "<|im", "_end|>", "< s >", "<S>", "true", "none", "0", "system", "user\n"),
)
RANDOM = 120  # mixed conversations


@dataclass(frozen=True)
class Case:
    """A conversation to prove a template on. `plain`: nothing in it is out of the ordinary."""

    conversation: Conversation
    plain: bool

    def __str__(self) -> str:
        shown = ", ".join(f"{m.role} {m.content[:40]!r}" for m in self.conversation.messages)
        return f"the conversation ({shown})"


def corpus(prompt_format: PromptFormat) -> list[Case]:
    """The conversations for a prompt format, the same every time: generation prompts and whole conversations of one to
    eight turns, with a system prompt and without one; of one turn and without one under a `text:` template."""
    short = prompt_format.template.is_text
    cases = [Case(c, True) for c in _plain(short)]
    return cases + [Case(c, False) for c in _hostile(prompt_format, short)]


def conversation(system: str | None, texts: list[str]) -> Conversation:
    """The conversation of these texts."""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Conversation((*([Message("system", system)] if system is not None else []), *turns))


def _plain(short: bool) -> Iterator[Conversation]:
    for turns in (1, 2) if short else range(1, 9):
        for number, system in enumerate((None,) if short else (None, *SYSTEMS)):
            for start in range(0, len(PLAIN), 4):
                texts = [PLAIN[(start + 4 * number + i) % len(PLAIN)] for i in range(turns)]
                yield conversation(system, texts)


def _hostile(prompt_format: PromptFormat, short: bool) -> Iterator[Conversation]:
    own = _own_texts(prompt_format)
    odd = list(dict.fromkeys((*ODD, *own)))
    places = 2 if short else 4  # of the user and the assistant, and in the longer kind of the system
    for number, text in enumerate(odd):
        for place in range(places):
            texts = ["Why?", "So.", "And?", "Yes."][: 2 if short else 2 + 2 * (number % 2)]
            if place < len(texts):
                texts[place] = text
                yield conversation(None, texts)
                yield conversation(None, texts[:-1])
        if not short:
            yield conversation(text, ["Why?"])
            yield conversation(text, ["Why?", "So."])
    rng = random.Random(7)
    for _ in range(RANDOM):
        texts = [_mixed(rng, odd) for _ in range(rng.randint(1, 2 if short else 6))]
        yield conversation(None if short or rng.random() < 0.5 else _mixed(rng, odd), texts)


def _mixed(rng: random.Random, odd: list[str]) -> str:
    words = rng.choices((*odd, *PLAIN), k=rng.randint(0, 4))
    return rng.choice(("", " ", "\n")).join(words)


def _own_texts(prompt_format: PromptFormat) -> Iterator[str]:
    """The format's own names, and the template's own words."""
    yield from prompt_format.chat_format.role_markers
    names = sorted(prompt_format.tokenizer.control_names.items())
    yield from (name for _, name in (*names[:40], *names[-4:]))
    template = prompt_format.template
    yield from filter(None, (template.system, template.task_system, template.user))
    yield from template.demonstration or ()
