"""A chat format as a grammar over a document's bytes, control tokens by name between marks: where answers are, and the
first place that is not as the format has it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptst.audit.batches.token_bytes import MARK, marked
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Segment


@dataclass(frozen=True)
class Wrong:
    """The first place that breaks the format: byte, rule, and words."""

    at: int
    rule: str
    cause: str
    expected: str = ""
    seen: str = ""


@dataclass(frozen=True)
class Grammar:
    """The literals of a chat format as bytes. `begins_answer`: what only precedes an answer."""

    start: bytes | None
    system: tuple[bytes, bytes]
    later: bytes
    user_end: bytes
    history: tuple[bytes, bytes] | None
    prefix: bytes
    terminator: bytes
    stops: tuple[bytes, ...]
    after: bytes
    bos: bytes
    markers: tuple[bytes, ...]
    system_last: bool
    begins_answer: bytes

    @classmethod
    def of(cls, prompt_format: PromptFormat) -> "Grammar":
        f, tokenizer = prompt_format.chat_format, prompt_format.tokenizer

        def put(segments: Sequence[Segment] | None) -> bytes:
            return b"".join(
                marked(tokenizer.bos or "" if s.text == "{bos}" else s.text) if s.control else s.text.encode()
                for s in segments or ()
            )

        terminator = marked(f.terminator or tokenizer.eos or "")
        user_end, after = put(f.user_end), put(f.after_answer)
        begins = user_end
        while begins.startswith(terminator):
            begins = begins.removeprefix(terminator)
        begins = begins.lstrip()
        stops = tuple(marked(tokenizer.control_names[i]) for i in sorted(prompt_format.stop_ids))
        return cls(
            start=None if f.start is None else put(f.start),
            system=(put(f.system[0]), put(f.system[1])),
            later=put(f.later),
            user_end=user_end,
            history=None if f.history is None else (put(f.history[0]), put(f.history[1])),
            prefix=put(f.answer_prefix),
            terminator=terminator,
            stops=stops,
            after=after,
            bos=marked(tokenizer.bos) if tokenizer.bos else b"",
            markers=tuple(marker.encode() for marker in f.role_markers),
            system_last=f.system_last,
            begins_answer=begins,
        )

    @property
    def controls(self) -> frozenset[str]:
        """The names of all control tokens in it."""
        history = self.history or ()
        literals = (self.start or b"", *self.system, self.later, self.user_end, *history, self.after, self.bos)
        parts = (part for literal in (*literals, *self.stops) for part in literal.split(MARK)[1::2])
        return frozenset(part.decode() for part in parts)

    def regions(self, text: bytes) -> Iterator[tuple[int, int, str]]:
        """(begin, end, author) of the messages in a document, as the literals between them say."""
        history = self.history or ()
        literals = {self.start, *self.system, self.later, self.user_end, self.begins_answer, *history} - {None, b""}
        found = re.compile(b"|".join(re.escape(x) for x in sorted(literals, key=len, reverse=True) if x)).finditer(text)
        at, before = 0, b""
        for literal in found:
            yield at, literal.start(), self._author(before)
            at, before = literal.end(), literal[0]
        yield at, len(text), self._author(before)

    def _author(self, before: bytes) -> str:
        if before and before.endswith(self.begins_answer):
            return "assistant"
        return "system" if before == self.system[0] != self.start else "user"

    def answers(self, text: bytes) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, whether its terminator is there) of every answer. One ends at a control token, or, where role
        markers are text, at one of those."""
        at = text.find(self.begins_answer)
        while at >= 0:
            begin = at + len(self.begins_answer)
            ends = [text.find(mark, begin) for mark in (MARK, *self.markers)]
            end = min((e for e in ends if e >= 0), default=len(text))
            if any(text.startswith(stop, end) for stop in self.stops):
                yield begin, end, True
            elif end > begin or end < len(text):
                yield begin, end, False
            at = text.find(self.begins_answer, max(end, begin))

    def cuts(self, words: str, apart: bool) -> list[int]:
        """Where in a run of text an answer begins; with `apart`, where any message begins or ends."""
        out = []
        literals = (self.user_end, self.start or b"", *self.system, self.later) if apart else (self.user_end,)
        for literal in literals:
            tail = literal.rpartition(MARK)[2].decode()
            if tail and (at := words.rfind(tail)) >= 0:
                out += [at, at + len(tail)] if apart else [at + len(tail)]
        return [cut for cut in dict.fromkeys(out) if 0 < cut < len(words)]

    def parse(self, text: bytes) -> Wrong | None:
        """The first place that is not as the format has it."""
        at = self._opening(text)
        if isinstance(at, Wrong):
            return at
        while True:
            step = self._answer(text, at)
            if isinstance(step, Wrong) or step < 0:
                return step if isinstance(step, Wrong) else None
            at = step
            rest = text[at:]
            if not rest or rest == self.after:
                return None
            joined = self.after + self.later
            if not rest.startswith(joined):
                if self.bos and self.bos in joined and rest.startswith(joined.replace(self.bos, b"")):
                    return self._wrong(text, at, joined, "missing-bos", "the turn does not begin with BOS")
                if rest.startswith(self.stops):
                    return self._wrong(text, at, joined, "terminator-extra", "two terminators in a row")
                if not rest.strip():
                    return None  # whitespace at the end
                if self.begins_answer.startswith(rest.removeprefix(self.after)) or rest.removeprefix(
                    self.after
                ).startswith(self.begins_answer):
                    place = at + len(rest) - len(rest.removeprefix(self.after))
                    return self._wrong(
                        text, place, self.later, "control-tokens", "a generation prompt follows the answer"
                    )
                return self._differs(text, at, joined)
            at += len(joined)

    def _opening(self, text: bytes) -> int | Wrong:
        """Behind what precedes the first user's text."""
        system, behind = self.system
        start = self.start
        if (
            not self.system_last
            and system
            and system != start  # then nothing tells a system prompt from the user's text
            and text.startswith(system)
            and not (start and len(start) > len(system) and text.startswith(start))
        ):
            at = text.find(behind, len(system))
            own = text.find(MARK, len(system))
            if at >= 0 and (not behind.startswith(MARK) or at == own):
                return at + len(behind)
            if start is None or not text.startswith(start):
                return self._differs(text, own if own >= 0 else len(system), behind)
        if start is None:
            return self._differs(text, 0, system)
        if text.startswith(start):
            return len(start)
        for bare in filter(None, (start, system)):
            if self.bos and bare.startswith(self.bos) and text.startswith(bare.removeprefix(self.bos)):
                return self._wrong(text, 0, bare, "missing-bos", "the document does not begin with BOS")
        return self._differs(text, 0, start)

    def _answer(self, text: bytes, at: int) -> int | Wrong:
        """Behind the terminator of the answer to the user's text that begins here; -1 if the document ends before."""
        ends = [self.user_end, *([self.history[0]] if self.history else [])]
        places = {end: text.find(end, at) for end in ends if text.find(end, at) >= 0}
        control = text.find(MARK, at)
        said = text[at : control if control >= 0 else len(text)]
        if not self.user_end.startswith(MARK) and self.user_end not in said and (near := self.user_end.strip()) in said:
            place = at + said.index(near)
            return self._wrong(text, place, self.user_end, "text-differs", "whitespace differs from the format's")
        if not places:
            if control < 0:
                return -1  # cut within the user's text
            return self._differs(text, control, self.user_end)
        end = min(places, key=lambda end: (places[end], -len(end)))
        if 0 <= control < places[end]:
            return self._differs(text, control, self.user_end)
        begin = places[end] + len(end)
        if begin == len(text):
            return self._wrong(text, places[end], b"", "control-tokens", "a generation prompt ends the document")
        if self.prefix and not text.startswith(self.prefix, begin) and not text.startswith(MARK, begin):
            return self._wrong(
                text, begin, self.prefix, "text-differs", "the answer does not begin as the format has it"
            )
        close = text.find(MARK, begin)
        marker = min((p for m in self.markers if (p := text.find(m, begin)) >= 0), default=-1)
        if marker >= 0 and (close < 0 or marker < close):
            return self._wrong(text, marker, self.terminator, "terminator-missing", "the next turn follows the answer")
        if close < 0:
            return -1  # cut within the answer
        if close == begin and text.startswith(self.bos or MARK + MARK, close):
            return self._wrong(text, close, self.prefix, "extra-bos", "BOS before the answer")
        stop = next((s for s in self.stops if text.startswith(s, close)), None)
        if stop is None:
            if self.history and text.startswith(self.history[1], close):
                return close + len(self.history[1]) - len(self.after)
            if not self._opens_turn(text, close):
                cause = "a text that spells it became a control token"
                return self._wrong(text, close, self.terminator, "forged-control", cause)
            return self._wrong(text, close, self.terminator, "terminator-missing", "something else follows the answer")
        if close == begin and self.prefix and stop == self.terminator:
            return self._wrong(text, close, self.prefix, "terminator-extra", "a terminator stands before the answer")
        behind = close + len(stop)
        rest = text[behind:]
        control = text.find(MARK, behind)
        between = (rest[: control - behind] if control >= 0 else rest).strip()
        next_turn = (self.after + self.later).replace(self.bos, b"").strip() if self.bos else self.later.strip()
        if between and not rest.strip().startswith(next_turn) and not next_turn.startswith(between):
            cause = "a text that spells it became the terminator" if control >= 0 else "text follows the terminator"
            return self._wrong(text, close, b"", "forged-control", cause)
        return behind

    def _opens_turn(self, text: bytes, at: int) -> bool:
        """Whether a control token is the first of a turn, or of an answer."""
        literals = (self.start, self.system[0], self.later, self.begins_answer)
        return any(text.startswith(x, at) for x in literals if x) or text.endswith(MARK, 0, at)

    def _differs(self, text: bytes, at: int, expected: bytes) -> Wrong:
        """What is here instead of a literal, by its cause."""
        if self.bos and text.startswith(self.bos, at) and not expected.startswith(self.bos):
            return self._wrong(text, at, expected, "extra-bos", "BOS is where the format has none")
        if self.bos and text.startswith(self.bos + self.bos, at):
            return self._wrong(text, at + len(self.bos), expected, "double-bos", "two BOS in a row")
        if text.startswith(self.stops, at) and not expected.startswith(self.stops):
            return self._wrong(text, at, expected, "terminator-extra", "a terminator is where the format has none")
        if self.bos and expected.startswith(self.bos) and not text.startswith(self.bos, at):
            return self._wrong(text, at, expected, "missing-bos", "BOS is missing")
        same = 0
        while same < len(expected) and text[at + same : at + same + 1] == expected[same : same + 1]:
            same += 1
        rest, wanted = text[at + same : at + same + 16].lstrip(), expected[same:].lstrip()
        if rest and wanted and rest[:4] == wanted[:4]:
            return self._wrong(text, at + same, expected, "text-differs", "whitespace differs from the format's")
        if text.startswith(self.stops, at):
            return self._wrong(text, at, expected, "forged-control", "a text that spells it became the terminator")
        if text.startswith(MARK, at):
            return self._wrong(text, at, expected, "control-tokens", "control tokens are not those of the format")
        return self._wrong(text, at + same, expected, "text-differs", "the text is not the format's")

    def _wrong(self, text: bytes, at: int, expected: bytes, rule: str, cause: str) -> Wrong:
        return Wrong(at, rule, cause, _show(expected[:48]), _show(text[at : at + 32]) or "the end")


def _show(part: bytes) -> str:
    return repr(part.replace(MARK, b"").decode(errors="replace")) if part else ""
