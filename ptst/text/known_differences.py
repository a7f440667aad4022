"""Where our prompts differ from the formats' owners, on purpose.

Apart from these, the ids of every conversation are the owner's own: proven on random conversations by
tests/text/test_conformance.py. Each difference below has a test there that shows both sides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownDifference:
    """`formats` it concerns, what the `owner` does, what `ours` does, and why."""

    name: str
    formats: tuple[str, ...]
    owner: str
    ours: str
    why: str


OUTER_WHITESPACE = KnownDifference(
    "outer-whitespace",
    ("llama2", "mistral-v3"),
    "Meta's Llama-2 code strips every message; mistral-common (v2, v3) strips the end of answers",
    "every message is kept as the data has it",
    "what is trained must be what the data says, and a template's words may end in a line break",
)
ROLE_MARKERS = KnownDifference(
    "role-markers",
    ("llama2", "mistral-v1"),
    "Meta's code answers with an error text in place of the model; mistral-common encodes the marks as text",
    "a message that holds a mark is refused, unless allowed",
    "the model cannot tell a mark in a message from a real one",
)
SINGLE_TURN_CLOSE = KnownDifference(
    "single-turn-close",
    ("llama2",),
    "Meta's code puts a space before </s> after every answer",
    "an answer that is the only one closes with </s> alone",
    "the paper's templates, and the released code of its experiments, end so",
)
DEFAULT_SYSTEM_PROMPT = KnownDifference(
    "default-system-prompt",
    ("chatml",),
    "SmolLM2's template puts a system prompt of its own where a conversation has none",
    'no system prompt is put in; a template can ask for it with system = "model-default"',
    "templates are compared, so each says all of its words itself",
)
DATE_PREAMBLE = KnownDifference(
    "date-preamble",
    ("llama3",),
    "the chat_template of Llama 3.1 and later opens with a system turn that holds a cut-off date and today's",
    "nothing is put in, as in Meta's own code",
    "a prompt must not change from day to day",
)
LONG_RUNS = KnownDifference(
    "long-runs",
    ("llama3",),
    "Meta's code cuts runs of more than 25,000 characters without whitespace before it encodes them",
    "the text is encoded as the folder's tokenizer.json says, whole",
    "it is what every other reader of these folders does",
)
KNOWN_DIFFERENCES = (OUTER_WHITESPACE, ROLE_MARKERS, SINGLE_TURN_CLOSE, DEFAULT_SYSTEM_PROMPT, DATE_PREAMBLE, LONG_RUNS)
