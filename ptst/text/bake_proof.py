"""The proof that a baked chat template writes our prompts: it is rendered in the sandbox on conversations that mean no
good (`corpus`), the text is read as other programs read it, whole and with control tokens by their names, and the ids
are compared with those of the prompt format.

The text must be ours to the character. The ids must be ours, but for known differences: what a rendered text cannot
say. Each of these is an edit of our side, as in `owner_check`, and only counts where the edited side is theirs.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from ptst.errors import UserError
from ptst.text.bake import refused_texts
from ptst.text.chat_template import ChatTemplate, TemplateFailed
from ptst.text.corpus import Case, corpus
from ptst.text.encode import Example, first_difference
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Segment
from ptst.text.templates import render
from ptst.text.tokenizer import Tokenizer
from ptst.text.whole_text import Reader, readers

SECONDS = 30
OPENED, CLOSED = "\ue0f2", "\ue0f3"  # in place of {% generation %} and its end, to see where they come
# Comments and strings are passed over: a template's own words may spell the tags.
_GENERATION = re.compile(r'\{#.*?#\}|"(?:[^"\\]|\\.)*"|(?P<tag>\{%-? *(?P<end>end)?generation *-?%\})', re.DOTALL)
KNOWN = {
    "control-text": "the message spells a control token, and a rendered text cannot tell it from a real one",
    "token-boundary": "the message begins or ends in whitespace, which other programs join with the text next to it; "
    "ptst encodes it apart, so that an answer never changes the ids of its prompt",
    "dummy-space": "other programs put sentencepiece's space elsewhere than the format's owner does",
    "swallowed-space": "a control token swallows the whitespace at the beginning or end of the message",
}


@dataclass(frozen=True)
class Proof:
    """What a baked template was proven on. `prompts` and `conversations` (that end in an answer) have our ids;
    `refused` are refused by the template, because they hold what would be read as a part of the prompt's format, or by
    ptst, too. `differences`: conversations with other ids, counted by their known difference; in all of them a message
    is out of the ordinary. `reader`: how the text was read. `settings`: what the folder's tokenizer_config.json must
    say for that, where it says otherwise now."""

    prompts: int
    conversations: int
    refused: int
    differences: dict[str, int] = field(default_factory=dict)
    reader: str = ""
    settings: dict[str, bool] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each of the differences is there."""
        return {name: KNOWN[name] for name in self.differences}

    def __str__(self) -> str:
        equal = f"{self.prompts} generation prompts and {self.conversations} conversations have ptst's ids"
        refused = f", {self.refused} with the names of control tokens or role markers are refused" * bool(self.refused)
        known = "".join(f", {count} differ by {name}" for name, count in self.differences.items())
        needs = "".join(f", with {key} = {str(value).lower()}" for key, value in self.settings.items())
        return f"{equal}{refused}{known} (read by {self.reader}{needs})"


def prove_chat_template(jinja: str, prompt_format: PromptFormat) -> Proof:
    """Compare a baked template with the prompt format that it was baked from. Raises UserError, naming conversation,
    position and tokens, for the first difference that is no known one, or that an ordinary conversation has; for one
    that does not end, calls what the sandbox forbids, or cannot be rendered at all."""
    cases = corpus(prompt_format)
    texts, marked = _rendered(jinja, prompt_format, cases)
    ours = prompt_format.encode_all([case.conversation for case in cases], _trained(prompt_format))
    ways = readers(prompt_format)
    for reader in ways:
        prover = _Prover(prompt_format, reader)
        try:
            for case, text, marks, example in zip(cases, texts, marked, ours, strict=True):
                prover.check(case, text, marks, example)
        except _SpaceElsewhere:
            if reader is ways[-1]:
                raise
            continue
        prompts, conversations = prover.equal[False], prover.equal[True]
        return Proof(prompts, conversations, prover.refused, dict(prover.names), reader.name, reader.settings)
    raise AssertionError("there is a reader")


def _rendered(
    jinja: str, prompt_format: PromptFormat, cases: Sequence[Case]
) -> tuple[list[str | TemplateFailed], list[str | None]]:
    """The renderings, and those with marks in place of `{% generation %}` where the template has that."""
    rows = [case.conversation.to_json() for case in cases]
    where = str(prompt_format.folder or "")
    names = (("bos_token", prompt_format.tokenizer.bos or ""), ("eos_token", prompt_format.tokenizer.eos or ""))
    texts = ChatTemplate(where, jinja, names).render(rows, SECONDS)
    marked = _GENERATION.sub(lambda m: f'{{{{- "{CLOSED if m["end"] else OPENED}" -}}}}' if m["tag"] else m[0], jinja)
    if marked == jinja:
        return texts, [None] * len(rows)
    found = ChatTemplate(where, marked, names).render(rows, SECONDS)
    return texts, [None if isinstance(text, TemplateFailed) else text for text in found]


def _trained(prompt_format: PromptFormat) -> str:
    """All answers, or the last one where the chat format can train no others."""
    f = prompt_format.chat_format
    return "all" if prompt_format.template.is_text or (f.history is None and not f.system_last) else "last"


class _SpaceElsewhere(UserError):
    """An ordinary conversation that differs in sentencepiece's spaces alone."""


class _Prover:
    """Compares renderings one by one, and counts."""

    def __init__(self, prompt_format: PromptFormat, reader: Reader):
        self.p, self.reader = prompt_format, reader
        self.refused_texts = refused_texts(prompt_format)
        self.equal: Counter[bool] = Counter()  # by whether a conversation ends in an answer
        self.refused = 0
        self.names: Counter[str] = Counter()

    def check(self, case: Case, text: str | TemplateFailed, marked: str | None, example: Example | UserError) -> None:
        """Compare one rendering; raises UserError as `prove_chat_template`."""
        if isinstance(text, TemplateFailed) or isinstance(example, UserError):
            self._check_refused(case, text, example)
            self.refused += 1
            return
        p = self.p
        # With the whitespace that control tokens swallow, as a template writes it.
        segments = render(case.conversation, p.template, p.family, p.chat_format, p.tokenizer, _trained(p))
        wanted = "".join(s.text for s in segments)
        if text != wanted:
            raise self._differs(case, _place(text, wanted))
        if marked is not None and case.conversation.answered:
            self._check_marks(case, marked, segments)
        theirs = self.reader.read(text)
        if theirs == example.ids:
            self.equal[case.conversation.answered] += 1
            return
        name = self._explain(case, segments, theirs)
        if name is None or case.plain:
            kind = _SpaceElsewhere if name == "dummy-space" else UserError
            raise self._differs(case, _tokens(example.ids, theirs, p.tokenizer), kind)
        self.names[name] += 1

    def _check_refused(self, case: Case, text: object, example: object) -> None:
        """Refused by the template only: because of what a message spells. By us only: never."""
        if isinstance(example, UserError) and not isinstance(text, TemplateFailed):
            raise self._differs(case, f"ptst refuses it ({''.join(example.cause)}), and the template does not")
        theirs_alone = isinstance(text, TemplateFailed) and not isinstance(example, UserError)
        if theirs_alone and not any(
            name in m.content for m in case.conversation.messages for name in self.refused_texts
        ):
            raise self._differs(case, f"{text}, and ptst has ids for it")

    def _check_marks(self, case: Case, marked: str, segments: Sequence[Segment]) -> None:
        """Between the marks of `{% generation %}`: what is trained, and nothing else."""
        wanted = ""
        for trained, run in groupby(segments, key=lambda s: s.trained):
            words = "".join(s.text for s in run)
            wanted += f"{OPENED}{words}{CLOSED}" if trained else words
        if marked != wanted:
            raise self._differs(case, f"around what is trained, {_place(marked, wanted)}")

    def _explain(self, case: Case, segments: Sequence[Segment], theirs: list[int]) -> str | None:
        """The name of the known difference after which our ids are theirs."""
        tokenizer = self.p.tokenizer
        if any(name in m.content for m in case.conversation.messages for name in self.reader.names):
            return "control-text"
        swallows = bool(tokenizer.rstrip or tokenizer.lstrip)
        for swallowed in (False, True) if swallows else (False,):
            parts = _swallowed(segments, tokenizer) if swallowed else segments
            for spaces in ("own", "every", "first"):
                if _joined(parts, tokenizer, spaces) == theirs:
                    if spaces != "own":
                        return "dummy-space"
                    return "swallowed-space" if swallowed else "token-boundary"
        return None

    def _differs(self, case: Case, what: str, kind: type[UserError] = UserError) -> UserError:
        p = self.p
        cause = f"the chat template does not give the ids of {p.template.name} in {p.format_name}: of {case}, {what}"
        return kind(cause, "bake it anew, or use ptst itself for this template", p.folder or "")


def _place(theirs: str, ours: str) -> str:
    at = first_difference(theirs, ours)
    start = max(0, at - 12)
    return f"at character {at} it writes {theirs[start : at + 24]!r}, ptst {ours[start : at + 24]!r}"


def _tokens(ours: list[int], theirs: list[int], tokenizer: Tokenizer) -> str:
    at = first_difference(ours, theirs)
    shown = [f"{ids[at : at + 4]} ({tokenizer.decode(ids[at : at + 4])!r})" for ids in (theirs, ours)]
    return f"at token {at} its text is read as {shown[0]}, ptst has {shown[1]}"


def _joined(segments: Sequence[Segment], tokenizer: Tokenizer, spaces: str) -> list[int]:
    """Ids with every run of text encoded at once, whoever wrote it. `spaces`: sentencepiece's space where the tokenizer
    has it, before every run, or before the first one."""
    ids: list[int] = []
    after: str | None = None
    for is_control, run in groupby((s for s in segments if s.text), key=lambda s: s.control):
        if is_control:
            for segment in run:
                ids.append(tokenizer.control_id(segment.text))
                after = segment.text
            continue
        words = "".join(s.text for s in run)
        bare = spaces == "first" and bool(ids)
        ids += tokenizer.encode(words, continuation=bare, after=after if spaces == "own" else None)
    return ids


def _swallowed(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments without the whitespace that control tokens swallow, of messages as well."""
    runs = [list(run) for _, run in groupby((s for s in segments if s.text), key=lambda s: s.control)]
    out: list[Segment] = []
    for before, run in pairwise([[], *runs]):
        out += run if run[0].control else [Segment("".join(s.text for s in run))]
        if before and before[-1].control and before[-1].text in tokenizer.rstrip:
            out[-1] = Segment(out[-1].text.lstrip())
        if run[0].control and run[0].text in tokenizer.lstrip and len(out) > len(run):
            out[-len(run) - 1] = Segment(out[-len(run) - 1].text.rstrip())
    return out
