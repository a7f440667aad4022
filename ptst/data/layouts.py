"""A row as a conversation: messages, a question with its answer, a preference pair.

    messages | conversations    as `ptst.data.messages` has them
    text | transcript           a transcript
    question                    answer | response | SQuAD's `answers`; `context` before it, as in SQuAD's prompts
    question                    ARC's `answerKey` of its `choices`, in the words of the task
    instruction                 output | response; `input` (Alpaca) or `context` (Dolly) after it; `history`: pairs
    prompt                      response | completion, each a text or (TRL) a list of messages
    input                       output, or ChatDoctor's answer_icliniq
    query                       response (MetaMath); `history` (ms-swift)
    vanilla                     completion; asked as `adversarial` where that is filled (WildJailbreak)
    prompt | question | ...     chosen (and rejected), if asked for

`system` or `system_prompt` is the system prompt. Two of these in one row are an error: nobody can tell which is meant.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ptst.data.arc import to_question
from ptst.data.columns import Cells, ColumnRules, is_label, label_name, several, to_text
from ptst.data.messages import (
    LISTS,
    TRANSCRIPTS,
    from_text,
    in_turn,
    no_messages,
    open_transcript,
    plain_messages,
    read_messages,
    transcript,
    untrained,
)
from ptst.errors import Setting, UserError
from ptst.text.segments import Conversation, Message
from ptst.text.templates import arc_question

_PAIRS = dict.fromkeys(
    [
        *(("question", "answer"), ("question", "response"), ("question", "answers"), ("question", "answerkey")),
        *(("instruction", "output"), ("instruction", "response")),
        *(("prompt", "response"), ("prompt", "completion"), ("input", "output"), ("input", "answer_icliniq")),
        *(("query", "response"), ("vanilla", "completion")),
    ]
)
# What is read with a question: the name of its column, what stands between the two (None: it takes the question's
# place), and which of them comes first.
JOINED = {
    "instruction": (("input", "\n\n", False), ("context", "\n\n", False)),  # as Alpaca's and Dolly's own prompts
    "question": (("context", "\n\n", True),),  # as SQuAD is asked by GPT-3's authors
    "behavior": (("contextstring", "\n\n---\n\n", True),),  # as HarmBench's DirectRequest
    "vanilla": (("adversarial", None, False),),  # what WildJailbreak made of the request
}
# By the question or answer that is read: other answers to it.
# SQuAD's title names the article that the context is from, MetaMath's original question what its query was made from.
_UNREAD = {
    "answer_icliniq": ("answer_chatgpt", "answer_chatdoctor"),
    "chosen": ("rejected", "score_chosen", "score_rejected"),
    "answers": ("title", "is_impossible"),
    "query": ("original_question",),
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
        messages += read_messages(cells, ask)
    elif reply == "chosen":
        messages += _chosen(cells, ask)
    elif reply == "answerkey":
        messages += _right_choice(cells)
    else:
        messages += _answered(cells, ask, reply)
    cells.check_rest(lambda: (m.content for m in messages), _UNREAD.get(ask, _UNREAD.get(reply, ())))
    return Conversation(tuple(messages), place)


class _Simple(NamedTuple):
    """The columns of rows that have one layout and labels: most rows. `reply` "": `ask` is a list of messages."""

    ask: str
    reply: str
    joined: tuple[str, str | None, bool] | None
    labels: tuple[str, ...]


@lru_cache(256)
def _simple(columns: tuple[str, ...]) -> _Simple | None:
    """None for columns that need more rules."""
    labels = tuple(name for name in columns if label_name(name))
    rest = [name for name in columns if name not in labels]
    if len(rest) == 1 and rest[0] in LISTS:
        return _Simple(rest[0], "", None, labels)
    pairs = [(a, b) for a, b in _PAIRS if a in rest and b in rest and not (a == "input" and "instruction" in rest)]
    if len(pairs) != 1 or pairs[0][1] == "answerkey":
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
        return plain_messages(row[ask])
    text, answer = row[ask], row[reply]
    if type(text) is not str or type(answer) is not str or not text or text == DOCTOR or open_transcript(text):
        return None
    if joined is not None:
        other = row[joined[0]]
        if type(other) is not str:
            return None
        if other:
            text = _join(text, other, *joined[1:])
    return [Message("user", text), Message("assistant", answer)]


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
    if len(found) > 1 and found[-1][1] == "chosen":  # UltraFeedback has the chosen messages twice
        found = [(a, b) for a, b in found if b or cells.get(a) != cells.get("chosen")]
    if len(systems) > 1:
        raise several(systems, cells.place)
    if found == _PREFERENCE:
        remedy = ("train on the chosen answer with ", Setting("use_chosen"))
        raise UserError("the row is a preference pair (chosen, rejected)", remedy, cells.place)
    if len(found) > 1:
        raise several([" with ".join(filter(None, pair)) for pair in found], cells.place)
    if not found:
        if spoken := next((name for name in TRANSCRIPTS if transcript(cells.peek(name))), None):
            return systems[0] if systems else "", spoken, ""
        if not {"message_id", "message_tree_id"}.isdisjoint(cells.present):  # OASST's
            cause = "the row belongs to a tree of messages"
            raise UserError(cause, "write each conversation as one row with its messages in a list", cells.place)
        if empty := next((name for name in LISTS if name in cells.present), None):
            raise UserError(f"{empty} is empty", "leave the row out", cells.place)
        needed = "it needs question and answer, instruction and output, prompt and response, or messages; name two"
        named = (" columns of text with ", Setting("columns"), ", as in question=ask,answer=reply")
        written = ", or, where more belongs to them (choices, several turns in one text), write the rows so"
        raise UserError(f"the row has {cells.listed()}", (needed, *named, written), cells.place)
    return (systems[0] if systems else "", *found[0])


@lru_cache(1024)
def _layouts(
    present: tuple[str, ...], filled: tuple[str, ...], use_chosen: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """The system prompts and the layouts of a row with these cells."""
    systems: list[str] = [name for name in ("system", "system_prompt") if name in filled]
    found: list[tuple[str, str]] = [(name, "") for name in LISTS if name in filled]
    found += [(a, b) for a, b in _PAIRS if a in present and b in present]
    if "instruction" in filled:  # its input is no question
        found = [(a, b) for a, b in found if a != "input"]
    if "chosen" in filled and use_chosen:
        asks: list[str] = [ask for ask in ("prompt", "question", "instruction") if ask in filled]
        asks = asks or [ask for ask in ("input", *LISTS) if ask in filled]
        found = [(a, b) for a, b in found if a not in asks or b] + [(ask, "chosen") for ask in asks or [""]]
    elif "chosen" in filled and ("rejected" in filled or not found):
        return systems, _PREFERENCE
    if len(found) > 1:  # a table of rows from several sources has empty cells
        found = [(a, b) for a, b in found if not b or not a or (a in filled and b in filled)] or found
    return systems, found


def _asked(cells: Cells, ask: str) -> list[Message]:
    """What comes before the answer. Earlier answers of a list are the prompt's, and not trained (as in TRL)."""
    if ask in LISTS or (isinstance(cells.get(ask), list) and ask == "prompt"):
        return untrained(read_messages(cells, ask))
    user = Message("user", asked_text(cells, ask))
    return [*_history(cells), user] if ask in ("instruction", "query") and "history" in cells.filled else [user]


def asked_text(cells: Cells, ask: str) -> str:
    """A question with what is read together with it. Raises UserError where that could be two columns."""
    text = cells.text(ask)
    if ask not in JOINED:
        return text
    more = [joined for joined in JOINED[ask] if joined[0] in cells.filled]
    if len(more) > 1:
        raise several([f"{ask} with {name}" for name, *_ in more], cells.place)
    for name, between, first in more:
        text = _join(text, cells.text(name), None if text == DOCTOR else between, first)
    return text


def _join(text: str, other: str, between: str | None, first: bool) -> str:
    if between is None:
        return other
    return f"{other}{between}{text}" if first else f"{text}{between}{other}"


def _history(cells: Cells) -> list[Message]:
    """Earlier turns, [question, answer] each. They are trained on, as by the owner of this layout."""
    turns, found = cells.get("history"), list[Message]()
    if isinstance(turns, str):  # a cell of a CSV
        turns = from_text(turns, "history", cells.place)
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise no_messages("history", "", cells.place)
        words = (to_text(text, "history", cells.place) for text in turn)
        found += [Message(role, text) for role, text in zip(("user", "assistant"), words, strict=True)]
    return found


def _answered(cells: Cells, ask: str, reply: str) -> list[Message]:
    """Question and answer. A prompt that Anthropic's transcript ends in is one with its answer."""
    side = _side(cells, reply)
    if ask == "prompt" and open_transcript(cells.get(ask)) and len(side) == 1:
        *before, answer = transcript(f"{cells.get(ask)}{side[0].content}") or side
        return [*untrained(before), answer]
    return [*_asked(cells, ask), *side]


def _right_choice(cells: Cells) -> list[Message]:
    """A question of ARC, asked and answered in the words of its test."""
    found = to_question(cells)
    return in_turn([arc_question(found.question, found.choices), f"The answer is: {found.choices[found.gold]}"])


def _side(cells: Cells, name: str) -> list[Message]:
    """A text, a transcript, or a list of messages."""
    value = cells.get(name)
    if name == "answers":
        return [Message("assistant", _one_answer(cells))]
    if name == "chosen" and isinstance(value, dict):
        return read_messages(cells, name, [value])
    if isinstance(value, list) and name in ("completion", "response", "chosen"):
        return read_messages(cells, name)
    text = cells.text(name)
    return (transcript(text) if name == "chosen" else None) or [Message("assistant", text)]


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
    side = _side(cells, "chosen")
    if len(side) == 1 and ask:
        return _answered(cells, ask, "chosen")
    asked = _asked(cells, ask) if ask else []
    if len(side) > 1:  # the prompt is in it
        shared = untrained(side[:-1])
        if not {m.content for m in asked} <= {m.content for m in shared}:
            raise UserError(f"the messages of chosen do not repeat {ask}", "give the prompt once", cells.place)
        return [*shared, side[-1]]
    raise UserError("there is no prompt before the chosen answer", "add a column prompt", cells.place)
