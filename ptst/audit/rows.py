"""The rules on the rows of the data: role markers and control tokens in their text, blanks, duplicates, overlap."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ptst.audit.findings import Finding
from ptst.data.kept_rows import serialized
from ptst.errors import UserError
from ptst.text.added_tokens import is_marker
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message

HASH = 16  # bytes: enough that no two rows have the same one by chance


def check_rows(
    conversations: Iterable[Conversation], prompt_format: PromptFormat, repeats: "Repeats | None" = None
) -> Iterator[Finding]:
    """Rules on the messages: markers of chat templates in their text, blank turns; duplicates, where `repeats` knows
    those of these very rows."""
    control_text, again = ControlText(prompt_format), {} if repeats is None else repeats.places
    for number_of_row, conversation in enumerate(conversations):
        for cause in prompt_format.forged_markers(conversation):
            yield Finding("role-markers", conversation.source, cause)
        yield from control_text.check(conversation)
        for number, message in enumerate(conversation.messages, 1):
            if not message.content.strip():
                rule = {"assistant": "blank-answer", "user": "blank-prompt"}.get(message.role, "blank-system")
                yield Finding(rule, conversation.source, f"message {number} ({message.role}) is {message.content!r}")
        if number_of_row in again:
            yield Finding("duplicate", conversation.source, f"the same as {again[number_of_row]}")


class Repeats:
    """The rows whose messages are those of an earlier one. `places`: by their numbers, the place of the first such row;
    `read` gives all rows, and is called twice: of each, only a hash is kept."""

    def __init__(self, read: Callable[[], Iterable[Conversation]]):
        hashes = np.frombuffer(b"".join(map(_hash_of, read())), np.dtype((np.void, HASH)))
        self.rows = len(hashes)
        order = np.argsort(hashes, kind="stable")
        in_order = hashes[order]
        new = np.concatenate([np.ones(min(1, self.rows), np.bool_), in_order[1:] != in_order[:-1]])
        first = order[np.maximum.accumulate(np.where(new, np.arange(self.rows), 0))]
        self._first = dict(zip(order[~new].tolist(), first[~new].tolist(), strict=True))
        wanted = set(self._first.values())
        names = {n: c.source for n, c in enumerate(read()) if n in wanted} if wanted else {}
        self.places = {row: names[first] for row, first in self._first.items()}

    @property
    def distinct(self) -> int:
        """How many rows there are without them."""
        return self.rows - len(self.places)


def _hash_of(conversation: Conversation) -> bytes:
    return hashlib.blake2b(serialized(conversation), digest_size=HASH).digest()


# Of chat templates in wide use, whatever the tokenizer.
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
    *("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    # Terminators of others: text that was templated for another model keeps them.
    *("<s>", "</s>", "<bos>", "<eos>", "<|end|>", "<|eom_id|>", "<|end_of_text|>", "<|endofprompt|>", "<|im_sep|>"),
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)


_TAG = re.compile(r"</?\w+>")


class ControlText:
    """Finds messages that spell control tokens. As text they never become one, so the model reads, or learns to write,
    the signs one by one before the real token."""

    def __init__(self, prompt_format: PromptFormat):
        tokenizer = prompt_format.tokenizer
        sample = [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
        sample = sample[prompt_format.template.is_text :]
        used = {s.text for s in prompt_format.segments(Conversation(tuple(sample))) if s.control}
        used |= {tokenizer.control_names[i] for i in prompt_format.stop_ids if i in tokenizer.control_names}
        self._used = used | {name for name in (tokenizer.bos, tokenizer.eos) if name}
        self._used = {name for name in self._used if is_marker(name)}  # Falcon's BOS is >>, which text may well hold
        self._own = self._used | {name for name in tokenizer.control_names.values() if is_marker(name)}
        # Role markers that are text have a rule of their own.
        names = sorted({*self._own, *_MARKERS} - {"", *prompt_format.chat_format.role_markers}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)))

    def check(self, conversation: Conversation) -> Iterator[Finding]:
        """At most one finding for each message: an error for a token of the format in use. What could be a tag of HTML,
        such as <s>, and markers that are not this tokenizer's, count where they begin or end the message."""
        for number, message in enumerate(conversation.messages, 1):
            levels: dict[str, str] = {}
            for found in self._pattern.finditer(message.content):
                outer = not (message.content[: found.start()].strip() and message.content[found.end() :].strip())
                tag = not outer and (_TAG.fullmatch(found[0]) or found[0] not in self._own)
                rule = "tag-text" if tag else "control-text" if found[0] in self._used else "marker-text"
                levels.setdefault(rule, found[0])
            for rule in ("control-text", "marker-text", "tag-text"):
                if rule in levels:
                    cause = f"message {number} ({message.role}) holds {levels[rule]}"
                    yield Finding(rule, conversation.source, cause)
                    break


def check_overlap(conversations: Sequence[Conversation], asked: Mapping[str, str]) -> Iterator[Finding]:
    """Training questions among `asked`: test texts (`normalized`), with the name of the set that each is from."""
    for conversation in conversations:
        for message in conversation.messages:
            name = asked.get(normalized(message.content)) if message.role == "user" and asked else None
            if name is not None:
                yield Finding("overlap", conversation.source, f"this question is also in {name}")


def bad_row(error: UserError, row: str = "") -> Finding:
    """The finding for a row that cannot be read or encoded."""
    cause = UserError(error.cause, error.remedy).tell(lambda name: f"the setting {name}")
    return Finding("bad-row", row or error.where, cause)


def normalized(text: str) -> str:
    """Text without case, extra whitespace and punctuation at its ends."""
    return " ".join(text.lower().split()).strip(".?! ")
