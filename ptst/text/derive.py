"""Chat formats that nobody wrote by hand: read off the spellings of the folder's own chat template.

Literals become segments by the tokenizer's control tokens, as transformers reads them: the longest name first, with the
whitespace that a token takes with it. What follows the newest question is the generation prompt; what follows it up to
the end of the answer's terminator is sampled. The result is put to the laws (`laws`) before anybody gets it.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from ptst.errors import Setting, UserError, Words
from ptst.text.chat_formats import ChatFormat, Literals
from ptst.text.known_differences import (
    DEFAULT_SYSTEM_PROMPT,
    FIXED_DATE,
    GENERATION_PROMPT,
    NO_TERMINATOR,
    OUTER_WHITESPACE,
    ROW_END,
    SYSTEM_IN_USER_TURN,
    TEXT_DEPENDENT,
)
from ptst.text.probes import Probes, Shape
from ptst.text.segments import Segment
from ptst.text.tokenizer import Tokenizer

_MOST_WORDS = 3  # of what the model itself writes after an answer; more is a classifier's prompt
_MARKER = re.compile(r"<\|[^<>|]+\|>|<</?[^<>\s]+>>|</?[^<>\s]+>|\[\|?/?[^\[\]\s]+\]")


class NotDerived(UserError):
    """A chat template whose format cannot be derived."""


def refused(cause: Words, folder: str) -> NotDerived:
    remedy = ("choose a ", Setting("chat_format"), " and allow it with ", Setting("allow"), " chat-template, or use a ")
    return NotDerived(cause, (*remedy, "text: template"), folder)


class Reader:
    """Splits a chat template's text into control tokens and text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        names = sorted(filter(str.strip, tokenizer.control_names.values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)))

    def read(self, words: str) -> Literals:
        """The segments of a text of the template."""
        out: list[Segment] = []
        at = 0
        for match in [*self._names.finditer(words), None]:
            piece = words[at : match.start() if match else len(words)]
            if out and out[-1].control and out[-1].text in self.tokenizer.rstrip:
                piece = piece.lstrip()
            if match and match[0] in self.tokenizer.lstrip:
                piece = piece.rstrip()
            if piece:
                out.append(Segment(piece))
            if match:
                out.append(Segment(match[0], control=True))
                at = match.end()
        return tuple(out)

    def clean(self, words: str) -> str:
        """A rendered text without the whitespace that control tokens take with them."""
        swallows = self.tokenizer.rstrip or self.tokenizer.lstrip
        return "".join(s.text for s in self.read(words)) if swallows else words


class _Derivation:
    """Where things stand in the spellings, in the order in which they are found."""

    def __init__(self, probes: Probes, tokenizer: Tokenizer, ends: Sequence[str]):
        self.probes, self.tokenizer, self.ends = probes, tokenizer, ends
        self.reader, self.folder = Reader(tokenizer), probes.template.folder
        self.differences: list[str] = []
        # With a system prompt only where there must be one.
        self.system = probes.get(Shape(False, 1)) is None
        prompt = probes.get(Shape(self.system, 1))
        if prompt is None:
            raise self.refuse(probes.error(Shape(False, 1)).removeprefix("the chat template "), "it ")
        self.prompt, self.answered = prompt, probes.get(Shape(self.system, 2))
        longer = probes.get(Shape(self.system, 3))
        if longer is None:
            raise self.refuse(probes.error(Shape(self.system, 3)).removeprefix("the chat template "), "it ")
        self.longer = longer
        for shape, marks in ((1, ["U1"]), (2, ["U1", "A1"]), (3, ["U1", "A1", "U2"])):
            found = probes.get(Shape(self.system, shape))
            if found is not None and [slot for slot in found.slots if slot != "S"] != marks:
                raise self.refuse(
                    f"writes a conversation of {shape} turns without some message, twice, or out of order"
                )

    def refuse(self, what: str, subject: str = "the chat template ") -> NotDerived:
        return refused(f"no chat format can be derived: {subject}{what}", self.folder)

    def differ(self, name: str) -> None:
        if name not in self.differences:
            self.differences.append(name)

    def question_end(self) -> tuple[str, str, str]:
        """What follows the newest question; the rest of what precedes a new answer; what precedes an earlier answer."""
        prompt, earlier = self.prompt.literals[-1], self.longer.between("U1", "A1")
        newest = self.answered.between("U1", "A1") if self.answered else earlier
        if not (newest.strip() or prompt.strip()):
            raise self.refuse("puts nothing between a question and its answer")
        if newest.startswith(prompt) and (not newest[len(prompt) :].strip() or not self.probes.ignores_flag):
            return prompt, newest[len(prompt) :], earlier
        self.differ(GENERATION_PROMPT.name)
        if newest.startswith(prompt):  # the template has no generation prompt
            end = newest.rstrip(" ")
            return end, newest[len(end) :], earlier
        return prompt, "", earlier

    def answer_end(self) -> tuple[str, str, str | None, str]:
        """What follows an answer: closing text, terminator ("": none), what precedes the next question where that
        follows an earlier answer otherwise (else None), and what follows the terminator before the next question."""
        between = self.longer.between("A1", "U2")
        end = self.answered.literals[-1] if self.answered else ""
        closing, terminator = self._first_control(end)
        if terminator and between.startswith(closing + terminator):
            return closing, terminator, None, between[len(closing + terminator) :]
        if terminator and (terminator in self.ends or terminator not in self.longer.between("U1", "A1")):
            return closing, terminator, between, ""
        then, other = self._first_control(between)
        if other in self.ends and not end.strip().removeprefix(then.strip()):
            self.differ(ROW_END.name)
            return then, other, None, between[len(then + other) :]
        self.differ(NO_TERMINATOR.name)
        own = end.rstrip()
        if own and not between.startswith(own):
            own = "" if self.prompt.literals[-1].rstrip().endswith(own.lstrip()) else own
        return own, "", between, ""

    def _first_control(self, words: str) -> tuple[str, str]:
        before = ""
        for segment in self.reader.read(words):
            if segment.control:
                at = words.index(segment.text)
                return words[:at], segment.text
            before += segment.text
        return words, ""

    def system_block(self) -> tuple[str, str, bool]:
        """What precedes and follows the system prompt, and whether it is in the last user turn."""
        one, two = self.probes.get(Shape(True, 1)), self.probes.get(Shape(True, 3))
        start = self.prompt.literals[0]
        if one is None or two is None or "S" not in one.slots or "S" not in two.slots:
            self.differ(SYSTEM_IN_USER_TURN.name)
            return start, "\n\n", False
        if one.slots == ("S", "U1") and two.slots == ("S", "U1", "A1", "U2"):
            return one.literals[0], one.literals[1], False
        if one.slots == ("S", "U1") and two.slots == ("U1", "A1", "S", "U2") and one.literals[0].startswith(start):
            return one.literals[0][len(start) :], one.literals[1], True
        raise self.refuse("puts the system prompt behind the question, or twice")

    def start(self, system: tuple[str, str, bool], later: str) -> str | None:
        """What precedes the first question of a conversation without a system prompt; where the template inserts one of
        its own there, what is left without that."""
        if self.system:
            return None
        own = self.prompt.literals[0]
        if self.probes.default is None or system[2]:
            return own
        before, after, _ = system
        bos = self.tokenizer.bos or ""
        question = _common_end(later, after).lstrip()
        if not question and (inside := later.lstrip()) and inside in before:
            question = inside  # the system prompt is inside the first user turn
        if not question:
            return own
        self.differ(DEFAULT_SYSTEM_PROMPT.name)
        has_bos = bos and before.startswith(bos) and not question.startswith(bos)
        return bos + question if has_bos else question

    def format(self) -> ChatFormat:
        user_end, prefix, earlier = self.question_end()
        closing, terminator, between, later = self.answer_end()
        if len(closing.split()) > _MOST_WORDS:
            cause = "the chat template is a classifier's, as those of guard models are: it asks about a conversation "
            cause += "instead of continuing it"
            remedy = ("write its prompt as a text: template of your own (", Setting("template_file"), ")")
            raise NotDerived(f"no chat format can be derived: {cause}", remedy, self.folder)
        read, end = self.reader.read, closing + terminator
        after = self._after_answer(end, later)
        history = None
        if earlier != user_end + prefix or between is not None:
            history = read(earlier), read(end + later if between is None else between)
        block = self.system_block()
        start = self.start(block, later or between or "")
        if not terminator and self.tokenizer.eos is None:
            raise self.refuse("ends no answer, and the tokenizer names no end-of-sequence token")
        probes = self.probes
        found = ((probes.strips, OUTER_WHITESPACE), (probes.depends_on_text, TEXT_DEPENDENT))
        for yes, difference in (*found, (probes.template.is_dated, FIXED_DATE)):
            if yes:
                self.differ(difference.name)
        made = ChatFormat(
            f"derived:{probes.template.fingerprint}",
            start=None if start is None else read(start),
            system=(read(block[0]), read(block[1])),
            later=() if history else read(later[len(after) :]),
            user_end=read(user_end),
            terminator=terminator or None,
            answer_prefix=read(prefix),
            closing=read(closing),
            after_answer=read(after),
            history=history,
            system_last=block[2],
            differences=tuple(self.differences),
        )
        return replace(made, role_markers=self._markers(made))

    def _after_answer(self, end: str, later: str) -> str:
        """What follows the terminator after any answer, the last one included."""
        own = self.answered.literals[-1] if self.answered else end
        if not own.startswith(end):
            return ""
        if later.startswith(own[len(end) :]):
            return own[len(end) :]
        self.differ(ROW_END.name)
        return ""

    def _markers(self, made: ChatFormat) -> tuple[str, ...]:
        """Words of the template that a message could forge: text that no control token of its own announces."""
        names = (self.tokenizer.bos, self.tokenizer.eos, *self.ends)
        found: list[str] = []
        for part in (made.start or (), *made.system, made.later, made.user_end, *(made.history or ())):
            for i, segment in enumerate(part):
                announced = i > 0 and part[i - 1].control and part[i - 1].text not in names
                if segment.control or announced:
                    continue
                for line in segment.text.split("\n"):
                    found += _MARKER.findall(line) or [line.strip()]
        default = self.probes.default or ""
        return tuple(dict.fromkeys(m for m in found if 2 < len(m) < 40 and m not in default))


def _common_end(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return a[len(a) - count :]


def derive(probes: Probes, tokenizer: Tokenizer, ends: Sequence[str] = ()) -> ChatFormat:
    """The chat format of a folder's chat template. `ends`: control tokens that end an answer, besides the tokenizer's
    EOS. Raises NotDerived, with the reason, where there is none."""
    if probes.rewrites:
        raise refused(
            "no chat format can be derived: the chat template rewrites the texts of messages", probes.template.folder
        )
    return _Derivation(probes, tokenizer, (*([tokenizer.eos] if tokenizer.eos else []), *ends)).format()
