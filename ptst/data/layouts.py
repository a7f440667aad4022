"""A row as a conversation: messages, a question with its answer, a preference pair.

    messages | conversations    [{role, content}], or ShareGPT's [{from, value}]
    question                    answer | response | SQuAD's `answers`; `context` before it, as in SQuAD's prompts
    instruction                 output | response; `input` (Alpaca) or `context` (Dolly) after it; `history`: pairs
    prompt                      response | completion, each a text or (TRL) a list of messages
    input                       output, or ChatDoctor's answer_icliniq
    prompt | question | ...     chosen (and rejected), if asked for

`system` or `system_prompt` is the system prompt. Two of these in one row are an error: nobody can tell which is meant.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ptst.data.columns import Cells, ColumnRules, is_empty, is_label, keeps_books, label_name, refuse, to_text
from ptst.data.json_rows import parse_json
from ptst.errors import Setting, UserError
from ptst.text.segments import Conversation, Message

_PAIRS = dict.fromkeys(
    [
        *(("question", "answer"), ("question", "response"), ("question", "answers")),
        *(("instruction", "output"), ("instruction", "response")),
        *(("prompt", "response"), ("prompt", "completion"), ("input", "output"), ("input", "answer_icliniq")),
    ]
)
_LISTS = ("messages", "conversations", "conversation")
# What is read with a question: the name of its column, what stands between the two, and which of them comes first.
JOINED = {
    "instruction": (("input", "\n\n", False), ("context", "\n\n", False)),  # as Alpaca's and Dolly's own prompts
    "question": (("context", "\n\n", True),),  # as SQuAD is asked by GPT-3's authors
    "behavior": (("contextstring", "\n\n---\n\n", True),),  # as HarmBench's DirectRequest
}
_ROLES = {"human": "user", "gpt": "assistant"}
# axolotl's and OpenAI's flags, and verl's: 0 or false leaves an answer out of the loss.
_FLAGS = ("train", "training", "trainable", "weight", "loss_mask")
_OFF, _ON = (False, 0, "0", "0.0"), (True, 1, "1", "1.0")
# By the answer that is read: other answers to the same question.
# SQuAD's title names the article that the context is from.
_UNREAD = {
    "answer_icliniq": ("answer_chatgpt", "answer_chatdoctor"),
    "chosen": ("rejected", "score_chosen", "score_rejected"),
    "answers": ("title", "is_impossible"),
}
_PREFERENCE = [("", "rejected")]  # a pair that nobody asked to read
# ChatDoctor's own instruction is left out: the paper has its own wording, the family's system prompt.
DOCTOR = "If you are a doctor, please answer the medical questions based on the patient's description."


def to_conversation(
    row: Mapping[str, Any], place: str, rules: ColumnRules | None = None, unused: Counter[str] | None = None
) -> Conversation:
    """One row as a conversation; columns that are not read are counted in `unused`. Raises UserError, with `place`,
    for a row of no known layout or of several, and for a column that may matter and is not read."""
    unused = Counter() if unused is None else unused
    simple = None if rules is not None and (rules.names or rules.ignored) else _simple(tuple(row))
    if simple is not None and (found := _read_simple(row, simple)) is not None:
        for label in simple.labels:
            if row[label]:
                unused[label] = unused.get(label, 0) + 1
        return Conversation(tuple(found), place)
    cells = Cells(row, place, rules or ColumnRules(), unused)
    system, ask, reply = _layout(cells)
    messages = [Message("system", cells.text(system))] if system else []
    if not reply:
        messages += _messages(cells, ask)
    elif reply == "chosen":
        messages += _chosen(cells, ask)
    else:
        messages += [*_asked(cells, ask), *_side(cells, reply, "assistant")]
    cells.check_rest(lambda: (m.content for m in messages), _UNREAD.get(reply, ()))
    return Conversation(tuple(messages), place)


class _Simple(NamedTuple):
    """The columns of rows that have one layout and labels: most rows. `reply` "": `ask` is a list of messages."""

    ask: str
    reply: str
    joined: tuple[str, str, bool] | None
    labels: tuple[str, ...]


@lru_cache(256)
def _simple(columns: tuple[str, ...]) -> _Simple | None:
    """None for columns that need more rules."""
    labels = tuple(name for name in columns if label_name(name))
    rest = [name for name in columns if name not in labels]
    if len(rest) == 1 and rest[0] in _LISTS:
        return _Simple(rest[0], "", None, labels)
    pairs = [(a, b) for a, b in _PAIRS if a in rest and b in rest and not (a == "input" and "instruction" in rest)]
    if len(pairs) != 1:
        return None
    more = [name for name in rest if name not in pairs[0]]
    joined = [joined for joined in JOINED.get(pairs[0][0], ()) if joined[0] in more]
    return _Simple(*pairs[0], joined[0] if joined else None, labels) if len(more) == len(joined) < 2 else None


def _read_simple(row: Mapping[str, Any], simple: _Simple) -> list[Message] | None:
    """The messages of a row where text is text and labels are labels. None where they are not: the same is then read,
    or refused, by the rules."""
    ask, reply, joined, labels = simple
    for label in labels:
        value = row[label]
        if type(value) is not str or not is_label(value):
            return None
    if not reply:
        return _plain_messages(row[ask])
    text, answer = row[ask], row[reply]
    if type(text) is not str or type(answer) is not str or not text or text == DOCTOR:
        return None
    if joined is not None:
        name, between, first = joined
        other = row[name]
        if type(other) is not str:
            return None
        if other:
            text = f"{other}{between}{text}" if first else f"{text}{between}{other}"
    return [Message("user", text), Message("assistant", answer)]


def _plain_messages(value: Any) -> list[Message] | None:
    """Messages of role and content, both text, and nothing else; None for others."""
    if type(value) is not list or not value:
        return None
    found = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        found.append(Message(_ROLES.get(role, role), content))
    return found


def family_of(row: Mapping[str, Any]) -> str:
    """The template family that a row's columns tell, "" where they tell none."""
    if row.get("instruction") == DOCTOR or ("answer_icliniq" in row and _has(row, "answer_icliniq", "input")):
        return "chatdoctor"
    return "openorca" if "system_prompt" in row and _has(row, "system_prompt", "question", "response") else ""


def _has(row: Mapping[str, Any], *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _layout(cells: Cells) -> tuple[str, str, str]:
    """The columns of system prompt (or ""), question and answer; (messages, "") for a list of messages, ("", chosen)
    for a chosen one. Raises UserError unless there is one layout."""
    systems, found = _layouts(cells.present, cells.filled, cells.rules.use_chosen)
    if len(systems) > 1:
        raise _several(systems, cells.place)
    if found == _PREFERENCE:
        remedy = ("train on the chosen answer with ", Setting("use_chosen"))
        raise UserError("the row is a preference pair (chosen, rejected)", remedy, cells.place)
    if len(found) > 1:
        raise _several([" with ".join(filter(None, pair)) for pair in found], cells.place)
    if not found:
        if empty := next((name for name in _LISTS if name in cells.present), None):
            raise UserError(f"{empty} is empty", "leave the row out", cells.place)
        needed = "it needs question and answer, instruction and output, prompt and response, or messages; "
        names = (needed, Setting("columns"), " names other columns, as in question=ask,answer=reply")
        raise UserError(f"the row has {cells.listed()}", names, cells.place)
    return (systems[0] if systems else "", *found[0])


@lru_cache(1024)
def _layouts(
    present: tuple[str, ...], filled: tuple[str, ...], use_chosen: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """The system prompts and the layouts of a row with these cells."""
    systems: list[str] = [name for name in ("system", "system_prompt") if name in filled]
    found: list[tuple[str, str]] = [(name, "") for name in _LISTS if name in filled]
    found += [(a, b) for a, b in _PAIRS if a in present and b in present]
    if "instruction" in filled:  # its input is no question
        found = [(a, b) for a, b in found if a != "input"]
    if "chosen" in filled and use_chosen:
        asks: list[str] = [ask for ask in ("prompt", "question", "instruction") if ask in filled]
        found += [(ask, "chosen") for ask in asks or [""]]
    elif "chosen" in filled and ("rejected" in filled or not found):
        return systems, _PREFERENCE
    if len(found) > 1:  # a table of rows from several sources has empty cells
        found = [(a, b) for a, b in found if not b or not a or (a in filled and b in filled)] or found
    return systems, found


def _several(shapes: list[str], place: str) -> UserError:
    remedy = ("leave all but one out with ", Setting("ignore_columns"))
    return UserError(f"the row can be read in {len(shapes)} ways: {', '.join(shapes)}", remedy, place)


def _asked(cells: Cells, ask: str) -> list[Message]:
    """What comes before the answer. Earlier answers of a list are the prompt's, and not trained (as in TRL)."""
    if isinstance(cells.get(ask), list) and ask == "prompt":
        return _untrained(_messages(cells, ask))
    user = Message("user", asked_text(cells, ask))
    return [*_history(cells), user] if ask == "instruction" and "history" in cells.filled else [user]


def _untrained(messages: list[Message]) -> list[Message]:
    return [Message(m.role, m.content, trained=m.role != "assistant") for m in messages]


def asked_text(cells: Cells, ask: str) -> str:
    """A question with what is read together with it. Raises UserError where that could be two columns."""
    text = cells.text(ask)
    if ask not in JOINED:
        return text
    more = [joined for joined in JOINED[ask] if joined[0] in cells.filled]
    if len(more) > 1:
        raise _several([f"{ask} with {name}" for name, *_ in more], cells.place)
    for name, between, first in more:
        other = cells.text(name)
        if text == DOCTOR:
            text = other
        else:
            text = f"{other}{between}{text}" if first else f"{text}{between}{other}"
    return text


def _history(cells: Cells) -> list[Message]:
    """Earlier turns, [question, answer] each. They are trained on, as by the owner of this layout."""
    turns, found = cells.get("history"), list[Message]()
    if isinstance(turns, str):  # a cell of a CSV
        turns = _from_text(turns, "history", cells.place)
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise _no_messages("history", "", cells.place)
        words = (to_text(text, "history", cells.place) for text in turn)
        found += [Message(role, text) for role, text in zip(("user", "assistant"), words, strict=True)]
    return found


def _side(cells: Cells, name: str, role: str) -> list[Message]:
    """A text, or a list of messages."""
    if name == "answers":
        return [Message(role, _one_answer(cells))]
    if name == "chosen" and isinstance(cells.get(name), dict):
        return _messages(cells, name, [cells.get(name)])
    if isinstance(cells.get(name), list) and name in ("completion", "response", "chosen"):
        return _messages(cells, name)
    return [Message(role, cells.text(name))]


def _one_answer(cells: Cells) -> str:
    """The answer of SQuAD's {text: [...], answer_start: [...]}, also where several people gave the same. Raises
    UserError for several answers, of which nobody said which to train, and for none."""
    value = cells.get("answers")
    entries = value if isinstance(value, list) else [value]
    found = [entry.get("text", []) if isinstance(entry, dict) else entry for entry in entries]
    found = [text for entry in found for text in (entry if isinstance(entry, list) else [entry])]
    texts = [to_text(text, "answers", cells.place) for text in found]
    if len(set(texts)) == 1:
        return texts[0]
    cause = f"answers holds {len(set(texts))} different answers" if texts else "answers holds no answer"
    raise UserError(cause, "give the one to train as answer, or leave the row out", cells.place)


def _chosen(cells: Cells, ask: str) -> list[Message]:
    """The chosen side of a preference pair. Only the answer that was chosen is trained, not what led to it."""
    side = _side(cells, "chosen", "assistant")
    asked = _asked(cells, ask) if ask else []
    if len(side) > 1:  # the prompt is in it
        shared = _untrained(side[:-1])
        if not {m.content for m in asked} <= {m.content for m in shared}:
            raise UserError(f"the messages of chosen do not repeat {ask}", "give the prompt once", cells.place)
        return [*shared, side[-1]]
    if not asked:
        raise UserError("there is no prompt before the chosen answer", "add a column prompt", cells.place)
    return [*asked, *side]


def _messages(cells: Cells, name: str, value: Any = None) -> list[Message]:
    """The messages of a column, or of `value` that stands in it."""
    value = cells.get(name) if value is None else value
    if isinstance(value, str):  # a cell of a CSV
        value = _from_text(value, name, cells.place)
    if not isinstance(value, list) or not value:
        raise _no_messages(name, "" if value else "it is empty", cells.place)
    found: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _no_messages(name, f"message {number} is not an object", cells.place)
        unfolded = _Message(message, f"{cells.place}, message {number}", cells.rules)
        unfolded.check_rest(name, cells.unused)
        role, content = unfolded.plain()
        if not isinstance(role, str) or content is None:
            missing = "content" if isinstance(role, str) else "role"
            raise _no_messages(name, f"message {number} has no {missing}", cells.place)
        text = _one_text(content, f"{cells.place}, message {number}")
        found.append(Message(_ROLES.get(role, role), text, unfolded.trained()))
    return found


def _from_text(text: str, name: str, place: str) -> Any:
    """The list that a text holds as JSON. Raises UserError for a text without one."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise _no_messages(name, f"it is text, and not valid JSON ({error})", place) from None


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


def _no_messages(name: str, remedy: str, place: str) -> UserError:
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
                raise _several([name, other], self._place)
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
        answers = isinstance(role, str) and _ROLES.get(role, role) == "assistant"
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
            remedy = "no format here writes calls of tools; leave the row out"
            raise UserError(f"the message has {calls}", remedy, self._place)
        if refused:
            refuse(refused, "key", self._place)
        unused.update(f"{column}.{name}" for name in rest)
        unused.update(f"{column}.{name}" for name in _FLAGS if name in self._keys and name in self._rules.ignored)
