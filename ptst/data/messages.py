"""Messages of a row: a list of objects with role and content, in the spellings of several owners, or a transcript.

[{role, content}]                 OpenAI's and most others'; ShareGPT's {from, value}
[{input, output}]                 one pair for each turn (Capybara)
[question, answer, ...]           texts in turn, the user's first (LIMA, UltraChat)
Human: ...  Assistant: ...        one text (Anthropic's transcripts, Guanaco)
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ptst.data.columns import Cells, ColumnRules, is_empty, keeps_books, refuse, several, to_text
from ptst.data.json_rows import parse_json
from ptst.errors import UserError
from ptst.text.segments import ROLES, Message

LISTS = ("messages", "conversations", "conversation", "items", "data")
TRANSCRIPTS = ("text", "transcript")
# By the names of others. What OpenAI calls developer is what was system before.
_ROLES = dict(zip(ROLES, ROLES, strict=True)) | {"developer": "system", "human": "user", "prompter": "user"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "ai", "model"), "assistant")
_TOOLS = frozenset(
    (
        *("tool", "function", "ipython", "environment", "observation", "function_call", "tool_call"),
        *("tool_calls", "function_response", "tool_response", "function-call", "function-response"),
    )
)
_NO_TOOLS = "no format here writes calls of tools or their results; leave the row out"
# axolotl's and OpenAI's flags, and verl's: 0 or false leaves an answer out of the loss.
_FLAGS = ("train", "training", "trainable", "weight", "loss_mask")
_OFF, _ON = (False, 0, "0", "0.0"), (True, 1, "1", "1.0")
_SPEAKERS = (re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?"), re.compile(r"### (Human|Assistant):[ ]?"))


def read_messages(cells: Cells, name: str, value: Any = None) -> list[Message]:
    """The messages of a column, or of `value` that stands in it. Raises UserError for anything else."""
    value = cells.get(name) if value is None else value
    if isinstance(value, str):  # a cell of a CSV
        if turns := transcript(value):
            return turns
        value = from_text(value, name, cells.place)
    if not isinstance(value, list) or not value:
        raise no_messages(name, "" if value else "it is empty", cells.place)
    if name in LISTS and all(type(text) is str for text in value):
        return in_turn(value)
    if all(isinstance(pair, dict) and pair.keys() == {"input", "output"} for pair in value):
        return in_turn([to_text(pair[key], key, cells.place) for pair in value for key in ("input", "output")])
    found: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise no_messages(name, f"message {number} is not an object", cells.place)
        place = f"{cells.place}, message {number}"
        unfolded = _Message(message, place, cells.rules)
        unfolded.check_rest(name, cells.unused)
        role, content = unfolded.plain()
        if not isinstance(role, str) or content is None:
            missing = "content" if isinstance(role, str) else "role"
            raise no_messages(name, f"message {number} has no {missing}", cells.place)
        if role.lower() in _TOOLS:
            raise UserError(f"the message has the role {role}", _NO_TOOLS, place)
        found.append(Message(role_of(role), _one_text(content, place), unfolded.trained()))
    return found


def plain_messages(value: Any) -> list[Message] | None:
    """Messages of role and content, also by ShareGPT's names, both text, and nothing else: most are. None for
    others."""
    if type(value) is not list or not value:
        return None
    found = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if type(role) is not str or type(content) is not str or role not in _ROLES:
            return None
        found.append(Message(_ROLES[role], content))
    return found


def role_of(name: str) -> str:
    """The role that an owner's name means; the name itself where no rule knows it."""
    return _ROLES.get(name.lower(), name)


def in_turn(texts: list[str]) -> list[Message]:
    """Texts of user and assistant in turn."""
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def untrained(messages: list[Message]) -> list[Message]:
    return [Message(m.role, m.content, trained=m.role != "assistant") for m in messages]


def transcript(text: object) -> list[Message] | None:
    """The turns of a text that begins with `Human:` and has an `Assistant:`, each text after one space at most. None
    for anything else."""
    for speakers in _SPEAKERS:
        before, *parts = speakers.split(text) if isinstance(text, str) else [""]
        if not before.strip() and parts[::2][:1] == ["Human"] and "Assistant" in parts[::2]:
            return [Message(role_of(who), said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return None


def open_transcript(text: object) -> bool:
    r"""Whether a prompt is Anthropic's, which ends where the answer begins: `\n\nHuman: ...\n\nAssistant:`."""
    return isinstance(text, str) and text.startswith("\n\nHuman:") and text.rstrip(" ").endswith("\n\nAssistant:")


def from_text(text: str, name: str, place: str) -> Any:
    """The list that a text holds as JSON. Raises UserError for a text without one."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise no_messages(name, f"it is text, and not valid JSON ({error})", place) from None


def _one_text(content: Any, place: str) -> str:
    """What a message says: a text, or OpenAI's list of one part that is a text. Raises UserError for several parts,
    which programs join differently, and for parts of another kind."""
    if not isinstance(content, list):
        return to_text(content, "content", place)
    kinds = [part.get("type", "text") if isinstance(part, dict) else "unknown" for part in content]
    if other := next((kind for kind in kinds if kind != "text"), None):
        raise UserError(f"content has a part of type {other}", "only text is read; leave the row out", place)
    if len(content) != 1:
        cause = f"content has {len(content)} parts of text, which programs join differently"
        raise UserError(cause, "write them as one text", place)
    return to_text(content[0].get("text"), "content", place)


def no_messages(name: str, remedy: str, place: str) -> UserError:
    entries = "[question, answer]" if name == "history" else "objects with role and content"
    return UserError(f"{name} must be a list of {entries}", remedy, place)


class _Message:
    """A message with other keys than role and content. Raises UserError for two keys that are named alike."""

    def __init__(self, message: Mapping[str, Any], place: str, rules: ColumnRules):
        self._place, self._rules, self._keys = place, rules, dict[str, Any]()
        for key, value in message.items():
            name = key.strip().lower()
            name = rules.names.get(name, name)
            if value is not None:
                if name in self._keys:
                    raise UserError(f"two keys are {name}", "leave one out, or rename it", place)
                self._keys[name] = value

    def plain(self) -> tuple[Any, Any]:
        """Role and content, also by ShareGPT's names. Raises UserError where a message has both."""
        found = []
        for name, other in (("role", "from"), ("content", "value")):
            if name in self._keys and other in self._keys:
                raise several([name, other], self._place)
            found.append(self._keys.get(name, self._keys.get(other)))
        return found[0], found[1]

    def trained(self) -> bool:
        """Whether the flags leave it in the loss. Raises UserError for another value than 0 or 1, for flags that
        contradict each other, and for one that would train on anything but an answer."""
        flags = {k: v for k, v in self._keys.items() if k in _FLAGS and k not in self._rules.ignored}
        for name, value in flags.items():
            if isinstance(value, (list, dict)) or value not in (*_OFF, *_ON):
                raise UserError(f"{name} is {value!r}", "it must be 0 or 1 (false or true)", self._place)
        on = {name: value in _ON for name, value in flags.items()}
        if len(set(on.values())) > 1:
            raise UserError(f"{' and '.join(on)} contradict each other", "leave one out", self._place)
        role, _ = self.plain()
        answers = isinstance(role, str) and role_of(role) == "assistant"
        if any(on.values()) and not answers:
            cause = f"{next(iter(on))} asks to train on a message of {role}"
            raise UserError(cause, "only answers are trained", self._place)
        return all(on.values()) or not answers

    def check_rest(self, column: str, unused: Counter[str]) -> None:
        """As `Cells.check_rest`."""
        read = {"role", "content", "from", "value", *_FLAGS}
        rest = {k: v for k, v in self._keys.items() if k not in read and not is_empty(v)}
        refused = [n for n, v in rest.items() if n not in self._rules.ignored and not keeps_books(n, v)]
        if calls := next((n for n in refused if n in ("tool_calls", "function_call")), None):
            raise UserError(f"the message has {calls}", _NO_TOOLS, self._place)
        if refused:
            refuse(refused, "key", self._place)
        unused.update(f"{column}.{name}" for name in rest)
        unused.update(f"{column}.{name}" for name in _FLAGS if name in self._keys and name in self._rules.ignored)
