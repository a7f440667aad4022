"""Foreign documents without their conversations: roles are recognized by the chat format's own markers in the tokens,
and say which tokens the model must sample. What the messages were is not known, so that what they became is not judged.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ptst.audit.batches.compare import shared_tails
from ptst.audit.batches.documents import ForeignDocument
from ptst.audit.batches.token_bytes import MARK, TokenBytes
from ptst.audit.batches.turns import Grammar, Wrong
from ptst.audit.findings import Finding
from ptst.audit.setup import Setup
from ptst.errors import UserError

# Rules on a document alone that its roles answer better.
_ROLES_KNOW = ("all-trained", "split-document")
_NEEDS_MESSAGES = {
    "text-differs": "the messages are not known (--messages)",
    "row-missing": "the messages are not known (--messages)",
    "cut-short": "the messages are not known (--messages)",
}
_SAMPLE = 20  # documents by which a tokenizer that does not fit is known


@dataclass(frozen=True)
class Answer:
    """An answer in a document: the byte where it begins, its tokens from `first` up to `end`, the index of its
    terminator, None without one."""

    begin: int
    first: int
    end: int
    terminator: int | None


@dataclass
class Recognizer:
    """Takes every document, in order."""

    setup: Setup
    findings: list[Finding] = field(default_factory=list)
    documents: int = 0
    with_roles: int = 0
    answers: int = 0
    _roles: set[str] = field(default_factory=set)
    _left_out: list[Finding] = field(default_factory=list)
    _several: int = 0
    _tails: list[Finding] = field(default_factory=list)
    _with_tails: int = 0
    _shorter: int = 0

    def __post_init__(self) -> None:
        prompt_format = self.setup.prompt_format
        self._tokenizer = prompt_format.tokenizer
        self._grammar = None if prompt_format.template.is_text else Grammar.of(prompt_format)
        self._bytes = TokenBytes(self._tokenizer, self._grammar.controls if self._grammar else None)
        self._apart = prompt_format.chat_format.apart
        self._ways: list[Callable[..., list[int]]] = [
            self._tokenizer.encode,
            partial(self._tokenizer.encode, continuation=True),
        ]
        if self._tokenizer.encode_markers("a") is None:  # sentencepiece: transformers puts its dummy space elsewhere
            self._ways.append(self._tokenizer.like_transformers().encode)

    @property
    def not_checked(self) -> dict[str, str]:
        missing = dict(_NEEDS_MESSAGES)
        if not self.with_roles:
            name = self.setup.prompt_format.format_name
            missing["roles"] = f"no document has the role markers of the chat format {name}"
        return missing

    @property
    def counts(self) -> dict[str, Any]:
        return {"documents_with_roles": self.with_roles, "answers": self.answers}

    def knows_better(self, finding: Finding) -> bool:
        """Whether a finding on a batch alone says what roles say better."""
        return finding.rule in _ROLES_KNOW and finding.row in self._roles

    def take(self, d: ForeignDocument) -> None:
        self.documents += 1
        text, starts = self._bytes.document(d.ids)
        natural = self._natural(d, text, starts)
        if natural is not None:
            self.findings.append(natural)
        if self.documents == _SAMPLE and not self.with_roles and self._shorter > 0.9 * _SAMPLE:
            cause = (
                "the ids are not those of this tokenizer: it has far fewer for their text, which has no role markers"
            )
            raise UserError(cause, "give the model whose tokenizer wrote them")
        if self._grammar is None or self._grammar.begins_answer not in text:
            return
        self.with_roles += 1
        self._roles.add(d.place)
        answers = list(self._answers(text, starts))
        self.findings += [f for answer in answers if (f := self._crossing(d, answer, starts)) is not None]
        self.answers += len(answers)
        wrong = self._grammar.parse(text)
        if wrong is not None:
            self.findings.append(self._structure(d, wrong, starts))
        if d.known:
            self._mask(d, answers, text, starts)

    def _answers(self, text: bytes, starts: Sequence[int]) -> Iterator[Answer]:
        assert self._grammar is not None
        for begin, end, terminated in self._grammar.answers(text):
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            yield Answer(begin, first, last, last if terminated else None)

    def _crossing(self, d: ForeignDocument, answer: Answer, starts: Sequence[int]) -> Finding | None:
        """A token of which the prompt has one part and the answer the other."""
        if answer.first < len(starts) and starts[answer.first] == answer.begin:
            return None
        token = answer.first - 1
        shown = repr(self._bytes.of(d.ids[token]).decode(errors="replace"))
        cause = f"the token {shown} spans the end of the prompt and the answer"
        return Finding("prompt-differs", d.place, cause, token)

    def _structure(self, d: ForeignDocument, wrong: Wrong, starts: Sequence[int]) -> Finding:
        token = min(max(bisect_left(starts, wrong.at + 1) - 1, 0), len(d.ids) - 1)
        return Finding(wrong.rule, d.place, wrong.cause, token, expected=wrong.expected, seen=wrong.seen)

    def _natural(self, d: ForeignDocument, text: bytes, starts: Sequence[int]) -> Finding | None:
        """The first run of text whose ids are not the tokenizer's own, also if its parts were encoded apart where the
        format's do."""
        after, i, names = None, 0, self._tokenizer.control_names
        while i < len(d.ids):
            if d.ids[i] in names:
                after, i = names[d.ids[i]], i + 1
                continue
            end = next((j for j in range(i, len(d.ids)) if d.ids[j] in names), len(d.ids))
            stop = starts[end] if end < len(starts) else len(text)
            run = text[starts[i] : stop]
            ids = d.ids[i:end]
            try:
                words = run.decode()
                own = self._tokenizer.encode(words, after=after)
            except (UnicodeDecodeError, UserError):
                words, own = "", ids  # cut within a character
            others = (way(words, after=after) for way in self._ways[1:]) if own != ids else ()
            if own != ids and ids not in others and not self._by_parts(words, ids, after):
                self._shorter += len(own) < 0.8 * len(ids)
                at = next(
                    (k for k, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own))
                )
                seen, expected = (
                    " ".join(map(str, part[at : at + 3])) if part[at:] else "the end" for part in (ids, own)
                )
                cause = f"the text {self._tokenizer.decode(ids[at : at + 3])!r} has other ids"
                return Finding("unnatural-ids", d.place, cause, i + at, expected=expected, seen=seen)
            i = end
        return None

    def _by_parts(self, words: str, ids: list[int], after: str | None) -> bool:
        """Whether the ids are those of the text in two calls: divided where a message begins, if the format's owner
        encodes messages apart, or else where an answer begins that would change its prompt's ids."""
        if self._grammar is None:
            return False
        whole = self._tokenizer.encode(words, after=after)
        for cut in self._grammar.cuts(words, self._apart):
            tail = self._tokenizer.encode(words[cut:], continuation=True)
            for way in self._ways:
                head = way(words[:cut], after=after)
                if ids == head + tail and (self._apart or whole[: len(head)] != head):
                    return True
        return False

    def _mask(self, d: ForeignDocument, answers: list[Answer], text: bytes, starts: Sequence[int]) -> None:
        own: set[int] = set()
        tails: set[int] = set()
        whole = [self._one(d, answer, own) for answer in answers]
        for answer in answers:
            if answer.terminator is not None:
                i = answer.terminator + 1
                while i < len(d.ids) and self._bytes.of(d.ids[i])[:1] != MARK and not self._bytes.of(d.ids[i]).strip():
                    tails.add(i)
                    i += 1
        trained = [i for i in range(1, len(d.ids)) if d.trained[i]]
        prompt = [i for i in trained if i not in own]
        self._with_tails += bool(tails and trained)
        if also := tails.intersection(prompt):
            self._tails.append(Finding("prompt-trained", d.place, "what follows the terminator is trained", min(also)))
        if prompt := [i for i in prompt if i not in tails]:
            number = f"{len(prompt)} {'token' if len(prompt) == 1 else 'tokens'}"
            self.findings.append(Finding("prompt-trained", d.place, f"{number} outside of answers", prompt[0]))
        if not any(whole) or not trained:
            return
        self._several += len(answers) > 1
        if not whole[-1] and answers[-1].end > answers[-1].first:
            cause = "the whole last answer, while an earlier one is trained"
            self.findings.append(Finding("answer-untrained", d.place, cause, answers[-1].first))
        if left_out := [a for a, some in zip(answers[:-1], whole, strict=False) if not some and a.end > a.first]:
            self._left_out.append(Finding("left-out-answers", d.place, "", left_out[0].first))

    def _one(self, d: ForeignDocument, answer: Answer, own: set[int]) -> bool:
        """Add an answer's tokens to `own`, and what is wrong with them; whether any of them is trained."""
        places = [*range(answer.first, answer.end)]
        end = [] if answer.terminator is None else [answer.terminator]
        own.update(places, end)
        places = [i for i in places if i > 0]
        missing = [i for i in places if not d.trained[i]]
        some = len(missing) < len(places) or any(d.trained[i] for i in end)
        if some and missing:
            number = f"{len(missing)} of {len(places)} tokens of an answer"
            self.findings.append(Finding("answer-untrained", d.place, number, missing[0]))
        if some and end and not d.trained[end[0]]:
            self.findings.append(Finding("terminator-untrained", d.place, "the answer before it is trained", end[0]))
        return some

    def end(self) -> Iterator[Finding]:
        """All findings, with choices that all documents share as notes."""
        yield from self.findings
        if self._left_out:
            cause = f"in {len(self._left_out)} of {self._several} documents of several answers, earlier ones"
            yield replace(self._left_out[0], cause=cause)
        yield from shared_tails(self._tails, self._with_tails)
