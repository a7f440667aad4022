"""Known differences: where our prompts differ from those of the formats' owners, and why.

Otherwise the ids of every conversation are the owner's, as tests/text/test_conformance.py shows on random
conversations; a test there shows both sides of each difference.
"""

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
    "the model must be trained on the text of the data, and a template's words may end in a line break",
)
ROLE_MARKERS = KnownDifference(
    "role-markers",
    ("llama2", "mistral-v1"),
    "Meta's code answers with an error text in place of the model; mistral-common encodes the markers as text",
    "a message that holds a role marker is refused, unless allowed",
    "the model cannot tell a marker in a message from a real one",
)
SINGLE_TURN_CLOSE = KnownDifference(
    "single-turn-close",
    ("llama2",),
    "Meta's code puts a space before </s> after every answer",
    "the answer of a single-turn conversation closes with </s> alone",
    "the paper's templates, and the released code of its experiments, end so",
)
DEFAULT_SYSTEM_PROMPT = KnownDifference(
    "default-system-prompt",
    ("chatml",),
    "SmolLM2's chat template inserts a default system prompt where a conversation has none",
    'no system prompt is inserted; a template can ask for it with system = "model-default"',
    "templates are compared, so each must contain all of its words",
)
DATE_PREAMBLE = KnownDifference(
    "date-preamble",
    ("llama3",),
    "the chat template of Llama 3.1 and later opens with a system block of a cut-off date and today's date",
    "nothing is inserted, as in Meta's own code",
    "a prompt must not change from day to day",
)
LONG_RUNS = KnownDifference(
    "long-runs",
    ("llama3",),
    "Meta's code cuts runs of more than 25,000 characters without whitespace before it encodes them",
    "the text is encoded as the folder's tokenizer.json says, whole",
    "every other reader of these folders does so",
)
KNOWN_DIFFERENCES = (OUTER_WHITESPACE, ROLE_MARKERS, SINGLE_TURN_CLOSE, DEFAULT_SYSTEM_PROMPT, DATE_PREAMBLE, LONG_RUNS)
