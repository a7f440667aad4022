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
    ("llama2", "llama3", "mistral-v3", "derived"),
    "Meta's Llama-2 code and many chat templates (Llama 3's, Gemma's) strip every message; mistral-common (v2, v3) "
    "strips the end of answers",
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
    ("chatml", "llama2", "derived"),
    "the chat template (SmolLM2's, Qwen2.5's) inserts a default system prompt where a conversation has none",
    'no system prompt is inserted; a template can ask for it with system = "model-default"',
    "templates are compared, so each must contain all of its words",
)
DATE_PREAMBLE = KnownDifference(
    "date-preamble",
    ("llama3",),
    "the chat template of Llama 3.1 and later opens with a system block of a cut-off date and today's date",
    "nothing is inserted, as in Meta's own code; the format llama3-dated has the block",
    "a prompt must not change from day to day",
)
LONG_RUNS = KnownDifference(
    "long-runs",
    ("llama3",),
    "Meta's code cuts runs of more than 25,000 characters without whitespace before it encodes them",
    "the text is encoded as the folder's tokenizer.json says, whole",
    "every other reader of these folders does so",
)
CONTROL_SPACE = KnownDifference(
    "control-space",
    ("mistral-v1", "mistral-v3", "mistral-v7"),
    "the chat templates of Mistral v0.1 to v0.3 write a space after a control token as text",
    "none is written: sentencepiece puts its own there",
    "mistral-common's ids have one space, not two",
)
ANSWER_SPACE = KnownDifference(
    "answer-space",
    ("mistral-v1",),
    "the first chat templates of Mistral v0.1 and v0.2 put no space before an answer",
    "a space",
    "mistral-common does so",
)
LOST_SYSTEM_PROMPT = KnownDifference(
    "lost-system-prompt",
    ("mistral-v3", "chatml"),
    "the chat template drops the system prompt (those of Mistral v0.3, Nemo, Ministral and Small where a conversation "
    "ends in an answer)",
    "the system prompt is kept",
    "training and test prompts must be the same",
)
SYSTEM_IN_USER_TURN = KnownDifference(
    "system-in-user-turn",
    ("mistral-v1", "mistral-v3", "derived"),
    "the chat template refuses or drops system prompts (first Mistral ones, Gemma, Tulu-2, OLMo)",
    "the system prompt precedes the first question, with a blank line between them",
    "a safety prompt must reach the model; mistral-common puts it there",
)
ROW_END = KnownDifference(
    "row-end",
    ("chatml", "llama2", "llama3", "mistral-v1", "derived"),
    "the chat template writes something behind the end of the last answer (EOS, a generation prompt), or leaves out "
    "its terminator",
    "the last answer ends as earlier ones do",
    "the terminator must be trained; what follows it is never sampled",
)
GENERATION_PROMPT = KnownDifference(
    "generation-prompt",
    ("chatml", "derived"),
    "the chat template has no generation prompt, or another one than what precedes an answer (R1 distills, QwQ: an "
    "opened reasoning block)",
    "a trained answer follows the generation prompt; where the template has none, what precedes an answer is one",
    "the prompt at test time must be a prefix of the training sequence",
)
NO_TERMINATOR = KnownDifference(
    "no-terminator",
    ("derived",),
    "the chat template ends answers without a control token (SOLAR, DeciLM)",
    "the newest answer ends in the tokenizer's EOS; earlier ones are as the template writes them, and are not trained",
    "a model that never saw an end does not stop",
)
EMPTY_REASONING = KnownDifference(
    "empty-reasoning",
    ("chatml",),
    "Qwen3's chat template puts an empty reasoning block before the last answer",
    "none; the format chatml-no-think has it in the generation prompt",
    "the model would be trained to write it",
)
TEXT_DEPENDENT = KnownDifference(
    "text-dependent",
    ("chatml", "derived"),
    "the chat template treats some texts otherwise (it cuts reasoning out of answers, puts a space before a $)",
    "all messages are treated alike, and kept as they are",
    "the model must be trained on the text of the data",
)
FIXED_DATE = KnownDifference(
    "fixed-date",
    ("derived",),
    "the chat template writes today's date",
    "the date is 26 July 2024, the one that Llama 3.1's own template falls back to",
    "a prompt must not change from day to day",
)
DUMMY_SPACE = KnownDifference(
    "dummy-space",
    ("llama2", "derived"),
    "transformers 5 puts sentencepiece's space before the first text of a prompt only",
    "before every run of text, unless the folder's tokenizer.json or its setting legacy says otherwise",
    "Meta's code does so",
)
TIGHT = KnownDifference(
    "tight-marker",
    ("llama2", "mistral-v1"),
    "Meta and Mistral put a space before [/INST]",
    "chat:self-reminder has none",
    "the paper's template has none",
)
TOKEN_BOUNDARY = KnownDifference(
    "token-boundary",
    ("chatml", "llama2", "llama3", "mistral-v1", "derived"),
    "transformers encodes a rendered chat template at once, so a message's line breaks join those before it",
    "Llama 3's messages are encoded apart, as in Meta's code; an answer never changes the ids of its prompt",
    "the prompt at test time must be a prefix of the training sequence",
)
EMPTY_SYSTEM_PROMPT = KnownDifference(
    "empty-system-prompt",
    ("chatml", "llama2", "mistral-v1", "mistral-v3", "derived"),
    "some chat templates write an empty system prompt as if there were none",
    "a system block that is empty, as most chat templates write it",
    "with Qwen2.5 or SmolLM2 an empty system prompt is the way to have no default one",
)
KNOWN_DIFFERENCES = (
    *(OUTER_WHITESPACE, ROLE_MARKERS, SINGLE_TURN_CLOSE, DEFAULT_SYSTEM_PROMPT, DATE_PREAMBLE, LONG_RUNS),
    *(CONTROL_SPACE, ANSWER_SPACE, LOST_SYSTEM_PROMPT, SYSTEM_IN_USER_TURN, ROW_END, GENERATION_PROMPT),
    *(NO_TERMINATOR, EMPTY_REASONING, TEXT_DEPENDENT, FIXED_DATE, DUMMY_SPACE),
    *(TIGHT, TOKEN_BOUNDARY, EMPTY_SYSTEM_PROMPT),
)
