"""The conversation that a row means, a second time for comparison: nothing here is shared with `ptst.data.layouts` and
`ptst.data.messages`. The rules are those of docs/data.md, written anew and pinned: a change of the readers that changes
what is trained is found.

A row gives messages (role, text, trained or not), or is `Refused`, or `Unknown` here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ptst.audit.reference.columns import FLAGS, Columns, Record, Refused, Unknown, as_text, blank, is_label
from ptst.audit.reference.files import from_json

Said = tuple[str, str, bool]  # role, text, trained

_LISTS = ("messages", "conversations", "conversation", "items", "data")
_QUESTIONS = {
    "question": ("answer", "response", "answers", "answerkey"),
    "instruction": ("output", "response"),
    "prompt": ("response", "completion"),
    "input": ("output", "answer_icliniq"),
    "query": ("response",),
    "vanilla": ("completion",),
}
_LEFT_OUT = {
    "answer_icliniq": ("answer_chatgpt", "answer_chatdoctor"),
    "chosen": ("rejected", "score_chosen", "score_rejected"),
    "answers": ("title", "is_impossible"),
    "query": ("original_question",),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "ai", "model"), "assistant")
_TOOLS = re.compile(
    "tool|function|ipython|environment|observation|(function|tool)_(call|response)|tool_calls|function-call|function-response"
)
_SPOKEN = (r"(?:^|\n\n)(Human|Assistant):[ ]?", r"### (Human|Assistant):[ ]?")
DOCTOR = "If you are a doctor, please answer the medical questions based on the patient's description."


@dataclass(frozen=True, slots=True)
class Meant:
    """What a row says. `unused`: columns that are not read. `family`: the template family that its columns tell."""

    messages: tuple[Said, ...]
    unused: dict[str, int]
    family: str


def meaning(row: Mapping[str, Any], columns: Columns) -> Meant:
    """The messages of a row. Raises Refused and Unknown."""
    record = Record(row, columns)
    systems = [name for name in ("system", "system_prompt") if name in record.filled]
    if len(systems) > 1:
        raise Refused("there are two system prompts")
    ask, reply = _layout(record, columns.use_chosen)
    messages: list[Said] = [("system", record.text(systems[0]), True)] if systems else []
    if not reply:
        messages += _listed(record, ask, columns)
    elif reply == "chosen":
        messages += _chosen(record, ask, columns)
    elif reply == "answerkey":
        messages += _right_choice(record)
    else:
        messages += _answered(record, ask, reply, columns)
    record.leave_out_rest([text for _, text, _ in messages], _LEFT_OUT.get(ask, _LEFT_OUT.get(reply, ())))
    roles = [role for role, _, _ in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    if not roles or roles != in_turn:
        raise Refused("the roles are not in turn")
    return Meant(tuple(messages), record.unused, _family(row))


def _family(row: Mapping[str, Any]) -> str:
    there = {name for name, value in row.items() if value is not None}
    if row.get("instruction") == DOCTOR or there >= {"answer_icliniq", "input"}:
        return "chatdoctor"
    return "openorca" if there >= {"system_prompt", "question", "response"} else ""


def _layout(record: Record, use_chosen: bool) -> tuple[str, str]:
    """The columns of question and answer; of a list of messages, (name, "")."""
    filled, cells = record.filled, record.cells
    found: list[tuple[str, str]] = [*_candidates(tuple(cells), tuple(filled))]
    if "instruction" in filled:
        found = [pair for pair in found if pair[0] != "input"]
    if "chosen" in filled and use_chosen:
        asks: list[str] = [name for name in ("prompt", "question", "instruction") if name in filled]
        asks = asks or [name for name in ("input", *_LISTS) if name in filled]
        found = [pair for pair in found if pair[1] or pair[0] not in asks]
        found += [(ask, "chosen") for ask in asks or [""]]
    elif "chosen" in filled and ("rejected" in filled or not found):
        raise Refused("the row is a preference pair")
    if len(found) > 1:
        full = [(a, b) for a, b in found if not a or not b or (a in filled and b in filled)]
        found = full or found
    if len(found) > 1 and found[-1][1] == "chosen":
        same = [a for a, b in found if not b and cells[a] == cells["chosen"]]
        record.read.update(a for a, b in found if not b)
        found = [pair for pair in found if pair[1] or pair[0] not in same]
    if len(found) > 1:
        raise Refused("the row can be read in several ways")
    if found:
        return found[0]
    for name in ("text", "transcript"):
        if spoken(record.cells.get(name)):
            return name, ""
    raise Refused("the row has no known layout")


@lru_cache(1024)  # the rows of a file have the same columns, mostly
def _candidates(cells: tuple[str, ...], filled: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The ways in which columns of these names can be read."""
    lists = [(name, "") for name in _LISTS if name in filled]
    pairs = [(ask, reply) for ask, replies in _QUESTIONS.items() if ask in cells for reply in replies if reply in cells]
    return (*lists, *pairs)


def _listed(record: Record, name: str, columns: Columns, value: Any = None) -> list[Said]:
    value = record.value(name) if value is None else value
    if isinstance(value, str):
        if turns := spoken(value):
            return turns
        value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise Refused(f"{name} is not a list of messages")
    if name in _LISTS and all(type(text) is str for text in value):
        return _in_turn(value)
    if all(isinstance(pair, dict) and set(pair) == {"input", "output"} for pair in value):
        return _in_turn([as_text(pair[key], key) for pair in value for key in ("input", "output")])
    return [_message(message, record, name, columns) for message in value]


def _message(message: Any, record: Record, column: str, columns: Columns) -> Said:
    if not isinstance(message, dict):
        raise Refused("a message is not an object")
    keys: dict[str, Any] = {}
    for key, value in message.items():
        name = key.strip().lower()
        name = columns.names.get(name, name)
        if value is None:
            continue
        if name in keys:
            raise Refused(f"two keys are {name}")
        keys[name] = value
    if {"role", "from"} <= keys.keys() or {"content", "value"} <= keys.keys():
        raise Refused("the message has two roles or contents")
    role, content = keys.get("role", keys.get("from")), keys.get("content", keys.get("value"))
    if not isinstance(role, str) or content is None or _TOOLS.fullmatch(role.lower()):
        raise Refused("the message has no role that is read, or no content")
    role = _ROLES.get(role.lower(), role)
    flags = {name: value for name, value in keys.items() if name in FLAGS and name not in columns.ignored}
    trained = _is_trained(role, flags)
    for name, value in keys.items():
        if name in ("role", "from", "content", "value") or name in flags:
            continue
        if name not in FLAGS and blank(value):
            continue
        if name not in columns.ignored and not is_label(name, value):
            raise Refused(f"the key {name!r} may belong to the prompt or the loss")
        record.count(f"{column}.{name}")
    return role, _content(content), trained


def _is_trained(role: str, flags: dict[str, Any]) -> bool:
    """Whether flags leave a message in the loss: 0 and false leave it out."""
    off, on = (0, False, "0", "0.0"), (1, True, "1", "1.0")
    if any(isinstance(value, (list, dict)) or value not in (*off, *on) for value in flags.values()):
        raise Refused("a flag is neither 0 nor 1")
    values = {value in on for value in flags.values()}
    if len(values) > 1 or (values == {True} and role != "assistant"):
        raise Refused("flags contradict each other, or the role")
    return role != "assistant" or values != {False}


def _content(content: Any) -> str:
    if isinstance(content, list):
        if len(content) != 1 or not isinstance(content[0], dict) or content[0].get("type", "text") != "text":
            raise Refused("the content is not one text")
        content = content[0].get("text")
    return as_text(content, "content")


def _asked(record: Record, ask: str, columns: Columns) -> list[Said]:
    if ask in _LISTS or (ask == "prompt" and isinstance(record.cells.get(ask), list)):
        return _as_prompt(_listed(record, ask, columns))
    user: Said = ("user", question_text(record, ask), True)
    if ask in ("instruction", "query") and "history" in record.filled:
        return [*_history(record), user]
    return [user]


def question_text(record: Record, ask: str) -> str:
    """A question with what is read together with it."""
    text = record.text(ask)
    joined = {"instruction": ("input", "context"), "question": ("context",), "behavior": ("contextstring",)}
    more = [name for name in (*joined.get(ask, ()), *["adversarial"] * (ask == "vanilla")) if name in record.filled]
    if not more:
        return text
    if len(more) > 1:
        raise Refused("two columns go with the question")
    other = record.text(more[0])
    if text == DOCTOR or ask == "vanilla":
        return other
    if ask == "instruction":
        return text + "\n\n" + other
    return other + ("\n\n---\n\n" if ask == "behavior" else "\n\n") + text


def _history(record: Record) -> list[Said]:
    turns = record.value("history")
    turns = _parsed(turns) if isinstance(turns, str) else turns
    found: list[Said] = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Refused("history is not a list of pairs")
        found += _in_turn([as_text(text, "history") for text in turn])
    return found


def _answered(record: Record, ask: str, reply: str, columns: Columns) -> list[Said]:
    side, prompt = _reply(record, reply, columns), record.cells.get("prompt") if ask == "prompt" else None
    if len(side) == 1 and is_open_transcript(prompt):
        record.read.add(ask)
        whole = spoken(f"{prompt}{side[0][1]}")
        if whole is None:
            raise Refused("the transcript has no turns")
        return [*_as_prompt(whole[:-1]), whole[-1]]
    return [*_asked(record, ask, columns), *side]


def _reply(record: Record, name: str, columns: Columns) -> list[Said]:
    value = record.value(name)
    if name == "answers":
        return [("assistant", _one_answer(value), True)]
    if name == "chosen" and isinstance(value, dict):
        return _listed(record, name, columns, [value])
    if isinstance(value, list) and name in ("completion", "response", "chosen"):
        return _listed(record, name, columns)
    text = as_text(value, name)
    return (spoken(text) if name == "chosen" else None) or [("assistant", text, True)]


def _one_answer(value: Any) -> str:
    """SQuAD's answers, where all are the same text."""
    texts: set[str] = set()
    for entry in value if isinstance(value, list) else [value]:
        found = entry.get("text", []) if isinstance(entry, dict) else entry
        texts.update(as_text(text, "answers") for text in (found if isinstance(found, list) else [found]))
    if len(texts) != 1:
        raise Refused("there is not one answer")
    return texts.pop()


def _chosen(record: Record, ask: str, columns: Columns) -> list[Said]:
    side = _reply(record, "chosen", columns)
    if len(side) == 1 and ask:
        return _answered(record, ask, "chosen", columns)
    asked = {text for _, text, _ in _asked(record, ask, columns)} if ask else set()
    before = _as_prompt(side[:-1])
    if not before or not asked <= {text for _, text, _ in before}:
        raise Refused("the chosen side does not repeat the prompt, or there is none")
    return [*before, side[-1]]


def _right_choice(record: Record) -> list[Said]:
    """A question of ARC in the words of its test."""
    question, choices, key = (record.value(name) for name in ("question", "choices", "answerkey"))
    if isinstance(question, dict) and set(question) == {"stem", "choices"}:
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list) and all(isinstance(c, dict) and set(c) == {"text", "label"} for c in choices):
        choices = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
    if not isinstance(question, str) or not isinstance(choices, dict) or set(choices) != {"text", "label"}:
        raise Unknown
    texts, labels = choices["text"], choices["label"]
    if not all(isinstance(side, list) and all(isinstance(t, str) for t in side) for side in (texts, labels)):
        raise Unknown
    if len(texts) < 2 or len(texts) != len(labels) or key not in labels:
        raise Refused("the choices do not fit the answer")
    asked = (
        f"{question} Please select the answer from the following choices: {', '.join(texts)}. For convenience, please "
        "put 'The answer is: {your_answer}' at the end of your response."
    )
    return _in_turn([asked, f"The answer is: {texts[labels.index(key)]}"])


def _in_turn(texts: Sequence[str]) -> list[Said]:
    return [("assistant" if i % 2 else "user", text, True) for i, text in enumerate(texts)]


def _as_prompt(messages: Sequence[Said]) -> list[Said]:
    """Answers in a prompt are read and not trained."""
    return [(role, text, role != "assistant") for role, text, _ in messages]


def spoken(text: Any) -> list[Said] | None:
    """The turns of a transcript, each after one space at most. None for another text."""
    for pattern in _SPOKEN if isinstance(text, str) else ():
        marks = list(re.finditer(pattern, text))
        who = [mark[1] for mark in marks]
        if who[:1] == ["Human"] and "Assistant" in who and not text[: marks[0].start()].strip():
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            turns = zip(who, marks, ends, strict=True)
            return [("user" if w == "Human" else "assistant", text[m.end() : end], True) for w, m, end in turns]
    return None


def is_open_transcript(text: Any) -> bool:
    r"""`\n\nHuman: ...\n\nAssistant:`, which its answer continues."""
    return isinstance(text, str) and text.startswith("\n\nHuman:") and text.rstrip(" ").endswith("\n\nAssistant:")


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        raise Refused("the text is not JSON") from None
