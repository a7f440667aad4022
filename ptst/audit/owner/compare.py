"""The folder's own chat template against ours, token by token.

For a sample of rows, the generation prompt and the training form are rendered by the folder's chat template, read by
the folder's tokenizer, and compared with our ids. A difference is taken apart in three steps, each of which a known
difference of this folder (`known_differences`) must explain; what none explains is an error with row and token:

    the template's text  --texts-->  the same, its messages as they are  --format-->  our text  --ids-->  our ids

`texts`: trimmed, or treated otherwise for what they hold. `format`: with marks for the messages, once for every kind of
conversation. `ids`: the same text in other ids, where messages are encoded apart.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.owner.ids import APART, Piece, read, token_at
from ptst.audit.owner.rows import Asked, asked, sample, written
from ptst.audit.reference.tokenizer import ReferenceTokenizer
from ptst.audit.setup import Setup
from ptst.errors import UserError
from ptst.text import known_differences as known
from ptst.text.chat_template import ChatTemplate, TemplateFailed, open_chat_template
from ptst.text.derive import Reader
from ptst.text.detect import probed
from ptst.text.encode import first_difference
from ptst.text.owner_check import Fit, Sides, fit, nearest
from ptst.text.probes import Probes, Shape, split_marks
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message

_NAMED = {difference.name: difference for difference in known.KNOWN_DIFFERENCES}


def check_owner(folder: Path, conversations: Iterable[Conversation], setup: Setup) -> Iterator[Finding]:
    """Our ids of a sample of rows against those of the folder's chat template. What our format cannot write is a bad
    row and left out here; under a `text:` template, which has no roles, there is nothing to compare."""
    prompt_format = setup.prompt_format
    if prompt_format.template.is_text:
        return
    template = open_chat_template(folder, prompt_format.tokenizer.implied)
    if template is None:
        return
    rows: list[Asked] = []
    for conversation in sample(conversations):
        try:
            rows += asked(conversation, setup)
        except UserError:
            continue
    if not rows:
        return
    template = replace(template, switches=prompt_format.chat_format.switches)
    try:
        yield from Comparison(template, probed(template), prompt_format, setup.oracle.tokenizer, rows).findings()
    except UserError as error:  # of the template as such: it does not end, or calls what is forbidden
        yield Finding("chat-template", "", str(error))


@dataclass(frozen=True)
class Kind:
    """A kind of conversation (`shape`) as the template writes it with marks for messages, and ours; both sides after
    the known differences `names`. `merged`: the user's turn that holds the system prompt, where the template has no
    place for one."""

    theirs: str
    sides: Sides
    edited: Sides
    names: tuple[str, ...]
    merged: int | None = None

    @property
    def explained(self) -> bool:
        return self.edited.ours == self.edited.theirs


@dataclass
class Comparison:
    """All rows beside the template's renderings."""

    template: ChatTemplate
    probes: Probes
    prompt_format: PromptFormat
    tokenizer: ReferenceTokenizer
    rows: list[Asked]
    counted: dict[str, list[str]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def fit(self) -> Fit:
        """How the format compares with the template on conversations that need not be in the data."""
        p = self.prompt_format
        return fit(p.chat_format, self.probes, p.tokenizer, any_date=True)

    @cached_property
    def allowed(self) -> set[str]:
        """Names of the known differences of this folder's format; what the template's own words and dates need holds
        everywhere."""
        p = self.prompt_format
        names = {*self.fit.differences, known.DATE_PREAMBLE.name}
        if known.NO_TERMINATOR.name in names:
            names.add(known.ROW_END.name)
        if p.template.tight:
            names.add(known.TIGHT.name)
        if p.template.demonstration and not p.chat_format.closes_single:
            names.add(known.SINGLE_TURN_CLOSE.name)
        return names

    @cached_property
    def opening(self) -> str | None:
        """What the template itself writes before a first question, without a system block: as before a later one."""
        bare, longer = self.probes.get(Shape(False, 1)), self.probes.get(Shape(False, 3))
        if bare is None or longer is None:
            return None
        p, later = self.prompt_format, longer.between("A1", "U2")
        end = p.chat_format.terminator or p.tokenizer.eos or ""
        later = (later.partition(end)[2] if end in later else later).lstrip()
        bos = p.tokenizer.bos or ""
        has_bos = bos and bare.text.startswith(bos) and not later.startswith(bos)
        return bos + later if has_bos else later

    def findings(self) -> Iterator[Finding]:
        moves = known.SYSTEM_IN_USER_TURN.name in self.allowed
        shapes = list(dict.fromkeys(_shape(row) for row in self.rows))
        asked = [([m.content for m in shape.messages], shape) for shape, _ in shapes]
        asked += [(row.messages, _shape(row)[0]) for row in self.rows]
        # Each twice, where it may be needed with the system prompt in a user's turn.
        plain = [_json(written(texts, shape.system)) for texts, shape in asked]
        moved = [_json(written(texts, shape.system, self._merged(shape))) for texts, shape in asked] if moves else []
        found = self.template.render([*plain, *moved])
        kinds: dict[tuple[Shape, int], Kind] = {}
        wrong: list[Finding] = []
        for i, key in enumerate(shapes):
            theirs, merged = found[i], None
            if moves and key[0].system and (isinstance(theirs, TemplateFailed) or asked[i][0][0] not in theirs):
                theirs, merged = found[len(plain) + i], self._merged(key[0])
            if isinstance(theirs, str):
                kinds[key] = self._kind(key, theirs, merged)
        for i, row in enumerate(self.rows, len(shapes)):
            kind = kinds.get(_shape(row))
            text = found[i if kind is None or kind.merged is None else len(plain) + i]
            if kind is None or isinstance(text, TemplateFailed):
                self._refuse(row, text)
            elif (finding := self._compare(row, text, kind)) is not None:
                wrong.append(finding)
        if self.fit.wrong and not wrong:
            wrong.append(Finding("chat-template", "", self.fit.wrong))
        yield from wrong
        yield from self._told()

    def _told(self) -> Iterator[Finding]:
        total = len(self.rows)
        dated = self.prompt_format.chat_format.name.endswith("-dated")
        if self.template.is_dated and (dated or known.FIXED_DATE.name in self.allowed):
            self.counted.setdefault(known.FIXED_DATE.name, [row.row for row in self.rows])
        for name, rows in self.counted.items():
            difference = _NAMED[name]
            cause = f"{name}: {difference.owner}; here, {difference.ours} (in {len(rows)} of {total} conversations)"
            yield Finding("known-difference", rows[0], cause)
        if self.refused:
            row, reason = self.refused[0]
            cause = f"{reason} (in {len(self.refused)} of {total} conversations)"
            yield Finding("template-refuses", row, cause)

    def _refuse(self, row: Asked, failed: object) -> None:
        cause = failed.cause if isinstance(failed, UserError) else ""
        self.refused.append((row.row, cause if isinstance(cause, str) else str(failed)))

    def _count(self, name: str, row: Asked) -> None:
        self.counted.setdefault(name, []).append(row.row)

    def _merged(self, shape: Shape) -> int:
        """The user's turn that gets a system prompt for which the template has no place."""
        return (shape.turns - 1) // 2 * 2 if self.prompt_format.chat_format.system_last else 0

    def _kind(self, key: tuple[Shape, int], theirs: str, merged: int | None) -> Kind:
        shape, shown = key
        p, probes = self.prompt_format, self.probes
        messages = shape.messages
        system = messages[0].content if shape.system else None
        turns = tuple(messages[shape.system :])
        sides = Sides(
            p.chat_format,
            p.tokenizer,
            system,
            turns,
            Reader(p.tokenizer).clean(theirs),
            probes.default,
            probes.ignores_flag,
            shown=shown,
            tight=p.template.tight,
            any_date=True,
            opening=self.opening,
        )
        names, edited = nearest(sides, self.allowed)
        if known.NO_TERMINATOR.name in self.allowed:
            same = {known.ROW_END.name: known.NO_TERMINATOR.name}
            names = tuple(dict.fromkeys(same.get(name, name) for name in names))
        if merged is not None:
            names = (known.SYSTEM_IN_USER_TURN.name, *names)
        return Kind(theirs, sides, edited, names, merged)

    def _compare(self, row: Asked, text: str, kind: Kind) -> Finding | None:
        """The finding of a difference that is not explained; one that is gets counted."""
        tokenizer, theirs = self.tokenizer, self.prompt_format.tokenizer.encode_markers
        spelled = any(name in m for m in row.messages for name in tokenizer.control)
        if not spelled and kind.merged is None and theirs(text) == row.ids:
            return None
        marks = _Marks(kind.sides.system is not None, row.messages)
        if not kind.explained:
            return self._format_differs(row, kind, marks)
        pieces = [Piece(*part) for part in marks.pieces(kind.sides)]
        ids = read(pieces, tokenizer)
        if not any(row.ids == (ids if way == APART[0] else read(pieces, tokenizer, way)) for way in APART):
            return self._ids_differ(row, ids)
        for name in kind.names:
            self._count(name, row)
        if text != (kept := marks.fill(kind.theirs)):
            self._count(self._texts_differ(row, text, kind, kept), row)
        whole = None if spelled else theirs(marks.fill(kind.sides.ours))
        if row.ids != ids:
            self._count(known.TOKEN_BOUNDARY.name, row)
        elif whole not in (None, row.ids):
            if not tokenizer.file.dummy:
                return self._ids_differ(row, whole or [])
            self._count(known.DUMMY_SPACE.name, row)
        return None

    def _texts_differ(self, row: Asked, text: str, kind: Kind, kept: str) -> str:
        """The name of what the template does to the texts of a conversation."""
        around = (re.escape(m.strip()) for m in row.messages)
        marks = _Marks(kind.sides.system is not None, [rf"\s*{words}\s*" for words in around])
        parts = split_marks(kind.theirs)
        pattern = "".join(re.escape(part) if i % 2 == 0 else marks.fill(part) for i, part in enumerate(parts))
        if re.fullmatch(pattern, text):
            return known.OUTER_WHITESPACE.name
        blank = row.system is not None and not row.system.strip()
        return known.EMPTY_SYSTEM_PROMPT.name if blank else known.TEXT_DEPENDENT.name

    def _format_differs(self, row: Asked, kind: Kind, marks: "_Marks") -> Finding:
        """What remains of a difference of the format after all known differences."""
        ours, theirs = marks.fill(kind.edited.ours), marks.fill(kind.edited.theirs)
        at = first_difference(ours, theirs)
        # Edits of our side stand before the place, so that it is as far from the end without them.
        place = max(0, len(marks.fill(kind.sides.ours)) - (len(ours) - at))
        expected, seen = (repr(words[at : at + 24]) if words[at:] else "the end" for words in (theirs, ours))
        return self._finding(row, token_at(row.ids, place, self.tokenizer), expected, seen)

    def _ids_differ(self, row: Asked, theirs: list[int]) -> Finding:
        at, tokenizer = first_difference(row.ids, theirs), self.tokenizer

        def shown(ids: list[int]) -> str:
            near = ids[at : at + 4]
            return f"{' '.join(map(str, near))} {tokenizer.decode(near)!r}" if near else "the end"

        return self._finding(row, at, shown(theirs), shown(row.ids))

    def _finding(self, row: Asked, token: int, expected: str, seen: str) -> Finding:
        what = "a conversation that ends in an answer" if len(row.texts) % 2 == 0 else "a generation prompt"
        cause = f"in {what}, the model's own chat template gives {expected}, our format {seen}"
        return Finding("chat-template", row.row, cause, token, expected=expected, seen=seen)


@dataclass(frozen=True)
class _Marks:
    """The texts of a conversation, for the marks that stand for them."""

    system: bool
    messages: Sequence[str]

    def fill(self, words: str) -> str:
        return "".join(self._text(part) for part in split_marks(words))

    def _text(self, part: str) -> str:
        if not (part.startswith("\ue0f0") and part.endswith("\ue0f1")):
            return part
        name = part[1:-1]
        if name == "S":
            return self.messages[0]
        return self.messages[self.system + 2 * (int(name[1:]) - 1) + (name[0] == "A")]

    def pieces(self, sides: Sides) -> Iterator[tuple[str, bool, bool]]:
        """(text, whether it is a message's, whether the model begins to write here) of our side."""
        sampled = False
        for segment in sides.segments:
            message = segment.author != "scaffold"
            yield self._text(segment.text) if message else segment.text, message, segment.sampled and not sampled
            sampled = segment.sampled


def _shape(row: Asked) -> tuple[Shape, int]:
    return Shape(row.system is not None, len(row.texts)), row.shown


def _json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]
