"""Is a chat format the folder's own? Its spelling of conversations is compared with that of the folder's chat template;
a difference must have a name (`known_differences`), or is one at its first character.

Each known difference is an edit of either side; the fewest edits that make both sides equal explain a difference.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from ptst.text import known_differences as known
from ptst.text.chat_formats import NO_REASONING, ChatFormat
from ptst.text.chat_template import TemplateFailed
from ptst.text.derive import Reader
from ptst.text.encode import first_difference, without_swallowed
from ptst.text.probes import ANSWERED, PROMPTS, Probes, Shape, split_marks
from ptst.text.segments import Message, Segment, Turn
from ptst.text.tokenizer import Tokenizer

_MOST_EDITS = 4
_DATES = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n")
_EMPTY_BLOCK = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
_MONTH = "(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*"
_DATE = "|".join(
    (
        rf"\b\d{{1,2}}(?:st|[nr]d|th)?(?: of)?[ -]{_MONTH},?[ -]\d{{4}}\b",
        rf"\b{_MONTH}(?: \d{{1,2}}(?:st|[nr]d|th)?)?,? \d{{4}}\b",
        r"\b\d{4}[-/.]\d{1,2}(?:[-/.]\d{1,2})?\b",
        r"\b\d{1,2}[-/.]\d{1,2}[-/.]\d{4}\b",
        "\\d{4}\u5e74\\d{1,2}\u6708\\d{1,2}\u65e5",
    )
)
_DATED_LINES = re.compile(rf"(\n*(?:[^\n]*(?:{_DATE})[^\n]*(?:\n+|$))+)")


@dataclass(frozen=True)
class Sides:
    """A conversation as the format is to write it, and the text that the chat template wrote. `default`: the system
    prompt that the template inserts; `ignores_flag`: it has no generation prompt; `spaced`: with a space as text after
    control tokens. `shown` of the first turns are a demonstration; `tight`: no space before [/INST]; `any_date`: a line
    of the chat template's with a date in any spelling is a date preamble, in any chat format. `opening`: what the chat
    template itself writes before a question; without its own system block it must be ours, too."""

    chat_format: ChatFormat
    tokenizer: Tokenizer
    system: str | None
    turns: tuple[Message, ...]
    theirs: str
    default: str | None = None
    ignores_flag: bool = False
    spaced: bool = False
    shown: int = 0
    tight: bool = False
    any_date: bool = False
    opening: str | None = None

    @property
    def ours(self) -> str:
        if not self.spaced:
            return "".join(s.text for s in self.segments)
        pairs = pairwise([*self.segments, Segment("", control=True)])
        return "".join(s.text + " " * (s.control and not after.control) for s, after in pairs)

    @property
    def segments(self) -> list[Segment]:
        block = None if self.system is None else [Segment(self.system, "system")]
        turns = [Turn(m.role, (Segment(m.content, m.role),), i < self.shown) for i, m in enumerate(self.turns)]
        segments = self.chat_format.render(block, turns, self.tokenizer, "last", self.tight)
        return without_swallowed(segments, self.tokenizer)


def _edit_format(condition: Callable[[ChatFormat], bool], **changes: object) -> Callable[[Sides], Sides]:
    return lambda s: replace(s, chat_format=replace(s.chat_format, **changes)) if condition(s.chat_format) else s  # type: ignore[arg-type]


def _default_system_prompt(s: Sides) -> Sides:
    return replace(s, system=s.default) if s.system is None else s


def _lost_system_prompt(s: Sides) -> Sides:
    return s if s.chat_format.start is None else replace(s, system=None)


def _outer_whitespace(s: Sides) -> Sides:
    """Their whitespace around messages as ours, if all else is the same."""
    messages = [*([] if s.system is None else [s.system]), *(m.content for m in s.turns)]
    if all(text == text.strip() for text in messages):
        return s
    parts = (
        (re.escape(x.text.strip()), r"\s*") if x.author != "scaffold" else (re.escape(x.text), "") for x in s.segments
    )
    pattern = "".join(f"{around}{words}{around}" for words, around in parts)
    return replace(s, theirs=s.ours) if re.fullmatch(pattern, s.theirs) else s


def _date_preamble(s: Sides) -> Sides:
    if s.any_date:
        undated = _without_dates(s)
        return s if undated.theirs == s.theirs else undated
    if s.chat_format.name != "llama3":
        return s
    theirs = _DATES.sub("", s.theirs, count=1)
    return replace(s, theirs=theirs.replace(_EMPTY_BLOCK, "", 1) if s.system is None else theirs)


def _without_dates(s: Sides) -> Sides:
    """Their text without its own lines that hold a date, and without as many of the line breaks around these as makes
    both sides equal; a system block that was there for the dates is an empty one."""
    parts: list[str] = []
    for piece in Reader(s.tokenizer).read(s.theirs):
        parts += [piece.text] if piece.control else split_marks(piece.text)
    split = [_DATED_LINES.split(part) for part in parts]
    most = max((dated.count("\n") for cut in split for dated in cut[1::2]), default=0)
    edited = s
    for kept in range(most + 1):
        texts = [
            words if i % 2 == 0 else "\n" * min(kept, words.count("\n")) for cut in split for i, words in enumerate(cut)
        ]
        edited = replace(s, theirs="".join(texts), system=s.system or "")
        if edited.ours == edited.theirs:
            break
    return edited


def _empty_reasoning(s: Sides) -> Sides:
    return replace(s, theirs=s.theirs.replace("".join(x.text for x in NO_REASONING), ""))


def _generation_prompt(s: Sides) -> Sides:
    f = s.chat_format
    if s.turns[-1].role == "user":  # what a template leaves out that has no generation prompt
        whole = "".join(x.text for x in f.user_end)
        written = max(n for n in range(len(whole) + 1) if s.theirs.endswith(whole[:n]))
        return replace(s, theirs=s.theirs + whole[written:]) if s.ignores_flag else s
    return replace(s, chat_format=replace(f, user_end=f.history[0], answer_prefix=())) if f.history else s


def _row_end(s: Sides) -> Sides:
    """Their last answer's end as ours, where theirs goes on behind our terminator, or has none."""
    if s.turns[-1].role == "user" or s.turns[-1].content.strip() not in s.theirs:
        return s
    segments, last = s.segments, s.turns[-1].content
    end = segments[max(i for i, x in enumerate(segments) if x.author == "assistant") + 1 :]
    said = [x.text for x in end if x.sampled]
    begin = len(s.ours) - len("".join(x.text for x in end))
    if not s.theirs.startswith(s.ours[:begin]):
        begin = s.theirs.rindex(last.strip()) + len(last.strip())
    tail = s.theirs[begin:]
    without_end = not tail.removeprefix("".join(said[:-1])).strip()
    if not (tail.startswith("".join(said)) or without_end or known.NO_TERMINATOR.name in s.chat_format.differences):
        return s
    return replace(s, theirs=s.theirs[:begin] + "".join(x.text for x in end))


def _control_space(s: Sides) -> Sides:
    return replace(s, spaced=True) if s.chat_format.name.startswith("mistral") else s


_EDITS: dict[str, Callable[[Sides], Sides]] = {
    known.DEFAULT_SYSTEM_PROMPT.name: _default_system_prompt,
    known.LOST_SYSTEM_PROMPT.name: _lost_system_prompt,
    known.TIGHT.name: lambda s: replace(s, tight=False),
    known.SINGLE_TURN_CLOSE.name: _edit_format(lambda f: not f.closes_single, closes_single=True),
    known.ANSWER_SPACE.name: _edit_format(
        lambda f: f.name == "mistral-v1" and f.answer_prefix == (Segment(" "),), answer_prefix=()
    ),
    known.CONTROL_SPACE.name: _control_space,
    known.DATE_PREAMBLE.name: _date_preamble,
    known.EMPTY_REASONING.name: _empty_reasoning,
    known.GENERATION_PROMPT.name: _generation_prompt,
    known.ROW_END.name: _row_end,
    known.OUTER_WHITESPACE.name: _outer_whitespace,
}
# Edits of what others leave.
_LAST = (known.GENERATION_PROMPT.name, known.ROW_END.name, known.OUTER_WHITESPACE.name)


# Edits that give our side a system block, so that its own beginning is not compared.
_INSERTED = {known.DEFAULT_SYSTEM_PROMPT.name, known.DATE_PREAMBLE.name}


def _with_opening(sides: Sides, edited: Sides) -> Sides:
    """The edited sides if our beginning without a system prompt is right; else ours beside what it must be."""
    own = sides.ours.partition(sides.turns[0].content)[0]
    if sides.system is not None or sides.opening in (None, own):
        return edited
    return replace(sides, theirs=(sides.opening or "") + sides.ours[len(own) :])


def explain(sides: Sides, allowed: Collection[str] | None = None) -> tuple[str, ...] | None:
    """Names of the fewest known differences (of those `allowed`) that explain all of a difference; None where nothing
    does."""
    names, edited = nearest(sides, allowed)
    return names if edited.ours == edited.theirs else None


def nearest(sides: Sides, allowed: Collection[str] | None = None) -> tuple[tuple[str, ...], Sides]:
    """The fewest known differences that explain a difference, with both sides edited; where nothing does, those after
    which both agree up to the latest character."""
    best: tuple[tuple[str, ...], Sides] = ((), sides)
    if sides.ours == sides.theirs:
        return best
    ours, theirs = sides.ours, sides.theirs
    agreed = first_difference(ours, theirs)
    edits = {
        name: edit
        for name, edit in _EDITS.items()
        if (allowed is None or name in allowed) and (name in _LAST or edit(sides) != sides)
    }
    for count in range(1, _MOST_EDITS + 1):
        for names in combinations(edits, count):
            edited = sides
            for name in names:
                edited = edits[name](edited)
            ours, theirs = edited.ours, edited.theirs
            if ours == theirs:
                return names, edited if not _INSERTED.intersection(names) else _with_opening(sides, edited)
            if (further := first_difference(ours, theirs)) > agreed:
                best, agreed = (names, edited), further
    return best


@dataclass(frozen=True)
class Fit:
    """How a chat format and a folder's chat template compare: `differences` by name; `wrong`: the first one that has no
    name, in words."""

    differences: tuple[str, ...]
    wrong: str = ""


def fit(
    chat_format: ChatFormat,
    probes: Probes,
    tokenizer: Tokenizer,
    shapes: Sequence[Shape] = (*PROMPTS, *ANSWERED),
    any_date: bool = False,
) -> Fit:
    """Compare a chat format with the folder's chat template on conversations of several shapes. `any_date` as in
    `Sides`."""
    found: list[str] = []
    reader = Reader(tokenizer)
    if probes.get(Shape(False, 1)) is None and probes.get(Shape(True, 1)) is None:
        return Fit((), probes.error(Shape(False, 1)))
    if probes.rewrites:
        return Fit((), "the chat template rewrites the texts of messages")
    for shape in shapes:
        spelled, (system, turns) = probes.found[shape], _split(shape.messages)
        if isinstance(spelled, TemplateFailed):
            if shape.system and probes.get(replace(shape, system=False)) is not None:
                found.append(known.SYSTEM_IN_USER_TURN.name)
            continue  # the template cannot say it, so there is nothing to compare
        moved = shape.system and known.SYSTEM_IN_USER_TURN.name in chat_format.differences
        if moved or (system is None and chat_format.start is None):
            continue
        theirs = reader.clean(spelled.text)
        sides = Sides(chat_format, tokenizer, system, turns, theirs, probes.default, probes.ignores_flag)
        sides = replace(sides, any_date=any_date)
        names = explain(sides)
        if names is None:
            return Fit(tuple(found), first_wrong(sides.ours, theirs, shape))
        found += names
    if known.NO_TERMINATOR.name in chat_format.differences:
        found = [name for name in found if name != known.ROW_END.name]  # the same difference
    if probes.strips:
        found.append(known.OUTER_WHITESPACE.name)
    if probes.depends_on_text:
        found.append(known.TEXT_DEPENDENT.name)
    return Fit(tuple(dict.fromkeys((*chat_format.differences, *found))))


def first_wrong(ours: str, theirs: str, shape: Shape | None = None) -> str:
    """The first character at which two spellings differ, in words."""
    at = first_difference(ours, theirs)
    show = [_shown(text[max(0, at - 8) : at + 24]) for text in (ours, theirs)]
    where = f" of {shape}" if shape else ""
    return f"at character {at}{where} the format has {show[0]}, the folder's chat template {show[1]}"


def _shown(text: str) -> str:
    for mark, word in (("S", "{system}"), ("U\\d+", "{user}"), ("A\\d+", "{answer}")):
        text = re.sub(f"\ue0f0{mark}\ue0f1", word, text)
    return repr(text)


def _split(messages: Sequence[Message]) -> tuple[str | None, tuple[Message, ...]]:
    if messages[0].role == "system":
        return messages[0].content, tuple(messages[1:])
    return None, tuple(messages)
