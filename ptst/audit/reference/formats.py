"""Reference formats: an independent implementation of all chat formats, used as an oracle.

The rules compare the tokens that reach the loss with it. It shares nothing with the pipeline (`ptst.text`, `ptst.data`)
but the names of what was chosen and the messages: formats are plain strings here, the loss mask follows from them, the
words are pinned in `reference.words`, and `reference.tokenizer` reads the tokenizer's files by itself. Of a format that
was derived from a chat template the literals are those of the format under test, put together here; that these are the
chat template's own words is compared, by ids, in `owner`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.audit.reference.roles import FORMATS, TERMINATORS, Names, Run, Turn, control, derived, text, words
from ptst.audit.reference.tokenizer import ReferenceTokenizer, Text, open_reference_tokenizer
from ptst.audit.reference.words import Script, task_of, wording_of
from ptst.collector import paused_collector
from ptst.errors import UserError
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class Reference:
    """Ids and loss mask that a row must have; the index of each run's first id; token boundaries; lossy runs with what
    they decode to. `prompt_length`: the ids before the newest answer, which are the prompt at test time. `texts` and
    `authors` have one entry for each id."""

    ids: list[int]
    loss_mask: list[bool]
    runs: list[tuple[int, Run]]
    token_boundaries: list[int]
    lossy: dict[int, str]
    prompt_length: int = 0
    bare: list[bool] = field(default_factory=list, repr=False)
    tokenizer: ReferenceTokenizer | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _written(self) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        boundaries, tokenizer = set(self.token_boundaries), self.tokenizer
        assert tokenizer is not None
        for (start, run), bare in zip(self.runs, self.bare, strict=True):
            if run.control:
                out.append((run.prompt, "control"))
                continue
            if not run.text:
                continue
            spans = tokenizer.spans(run.text, bare)
            boundary = start + len(tokenizer.spans(run.prompt, bare)) if boundaries else 0
            if boundary in boundaries:
                at = len(run.prompt)
                later = tokenizer.spans(run.answer, tokenizer.is_bare(None, True))
                spans = tokenizer.spans(run.prompt, bare) + [(i, a + at, b + at) for i, a, b in later]
            out += _authored(run, spans)
        return out

    @property
    def texts(self) -> list[str]:
        """The text of each token; a character of several tokens is the first one's."""
        return [text for text, _ in self._written]

    @property
    def authors(self) -> list[str]:
        """Who wrote each token: control, scaffold, system, user or assistant; of several, who wrote most of it."""
        return [author for _, author in self._written]


def _authored(run: Run, spans: Iterable[tuple[int, int, int]]) -> Iterable[tuple[str, str]]:
    """(text, author) of each token of a run of text."""
    text, done = run.text, 0
    spelt = [author for author, part in run.parts for _ in part]
    for _, start, end in spans:
        own = spelt[start:end] or spelt[start : start + 1] or spelt[-1:] or ["scaffold"]
        yield text[done:end], max(reversed(own), key=own.count)
        done = max(done, end)


@dataclass(frozen=True, eq=False)
class Oracle:
    """What rows must be under a prompt format. `template_file`: the TOML file of a user's own template."""

    prompt_format: Any
    template_file: Path | None = None

    @cached_property
    def tokenizer(self) -> ReferenceTokenizer:
        """The audit's own tokenizer. Under a derived format, text after control tokens is as `transformers` has it."""
        p = self.prompt_format
        return open_reference_tokenizer(p.tokenizer.origin, p.chat_format.is_derived)

    @cached_property
    def script(self) -> Script:
        p = self.prompt_format
        return Script(wording_of(p.template, self.template_file, p.folder), task_of(p.family))

    @property
    def is_text(self) -> bool:
        return self.prompt_format.template.name.startswith("text:")

    @cached_property
    def terminator(self) -> str:
        """The control token that ends an answer."""
        p, eos = self.prompt_format, self.tokenizer.eos or ""
        if self.is_text:
            return eos
        return (p.chat_format.terminator if p.chat_format.is_derived else TERMINATORS.get(p.chat_format.name)) or eos

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the terminator, EOS, and those that the folder's files name."""
        return self.tokenizer.ends | {self.tokenizer.id_of(self.terminator)}

    def references(self, conversations: Sequence[Conversation], train_on: str = "all") -> list[Reference | UserError]:
        """What each row must be; of a row that cannot be said or encoded, the reason. All texts go through the
        tokenizer in one call, each distinct one once."""
        with paused_collector():
            return self._all(conversations, train_on)

    def _all(self, conversations: Sequence[Conversation], train_on: str) -> list[Reference | UserError]:
        rows = [_tried(self._calls, c, train_on) for c in conversations]
        wanted = [text for row in rows if not isinstance(row, UserError) for call in row for text in call[1:3] if text]
        known = self.tokenizer.encode(wanted)
        runs = {call[2] for row in rows if not isinstance(row, UserError) for call in row if call[2]}
        encoded = [(text, ids) for text in runs if isinstance(ids := known[text], list)]
        lossy = {text for text, ids in encoded if not self.tokenizer.restores(text, ids)}
        return [row if isinstance(row, UserError) else _tried(self._put, row, known, lossy) for row in rows]

    def reference(self, conversation: Conversation, train_on: str = "all") -> Reference:
        """What one row must be. Raises UserError for one that cannot be said or encoded."""
        (found,) = self.references([conversation], train_on)
        if isinstance(found, UserError):
            raise UserError(found.cause, found.remedy, found.where or conversation.source)
        return found

    def _calls(self, conversation: Conversation, train_on: str) -> "list[Call]":
        """Each run with the texts to encode for it: the prompt's part, all of it."""
        tokenizer, after, calls = self.tokenizer, None, list[Call]()
        runs = [*self._runs(conversation, train_on)]
        if tokenizer.rstrip or tokenizer.lstrip:
            runs = self._without_swallowed(runs)
        for run in runs:
            if run.control:
                after = run.prompt
                calls.append((run, None, None))
                continue
            bare = tokenizer.is_bare(after)
            whole = (run.text, bare)
            calls.append((run, (run.prompt, bare) if run.sampled else whole, whole))
        return calls

    def _put(self, calls: "Sequence[Call]", known: dict[Text, list[int] | UserError], lossy: set[Text]) -> Reference:
        """The row of encoded runs. `lossy`: texts that their ids do not give back."""
        tokenizer = self.tokenizer
        row, mask = list[int](), list[bool]()
        runs, boundaries, lost = list[tuple[int, Run]](), list[int](), dict[int, str]()
        speaks, length = False, 0
        for run, before, whole in calls:
            start = len(row)
            runs.append((start, run))
            if before is None or whole is None:
                ids, num_prompt = [tokenizer.id_of(run.prompt)], 0 if run.sampled else 1
            else:
                ids, is_lossy = _ids(known[whole]), whole in lossy
                num_prompt = len(ids)
                if run.sampled:
                    prompt = _ids(known[before])
                    num_prompt = len(prompt)
                    if ids[:num_prompt] != prompt:
                        boundaries.append(start + num_prompt)
                        again = (run.answer, tokenizer.is_bare(None, True))
                        ids = prompt + _ids(tokenizer.encode([again])[again])
                        is_lossy = not tokenizer.restores(whole, ids)
                if is_lossy:
                    lost[start] = tokenizer.decode_run(ids, whole[1])
            if run.sampled and not (speaks and num_prompt == 0):
                length = start + num_prompt
            speaks = run.sampled
            row += ids
            mask += [False] * num_prompt
            if num_prompt < len(ids):
                mask += [run.trained] * (len(ids) - num_prompt)
        bare = [whole is not None and whole[1] for _, _, whole in calls]
        return Reference(row, mask, runs, boundaries, lost, length, bare, tokenizer)

    def _without_swallowed(self, runs: list[Run]) -> list[Run]:
        """The runs without whitespace of the scaffold that a control token beside it swallows."""
        out = []
        for before, run, behind in zip([None, *runs], runs, [*runs[1:], None], strict=False):
            parts = list(run.parts)
            if before and before.prompt in self.tokenizer.rstrip and before.control and parts[:1]:
                parts[0] = _stripped(parts[0], str.lstrip)
            if behind and behind.prompt in self.tokenizer.lstrip and behind.control and parts[:1]:
                parts[-1] = _stripped(parts[-1], str.rstrip)
            if tuple(parts) != run.parts:
                said = tuple(parts[run.given :]) if run.sampled else None
                run = text(tuple(parts[: run.given]), said, run.trained)
            out.append(run)
        return out

    def _runs(self, conversation: Conversation, train_on: str) -> Iterable[Run]:
        """The runs of a training row, which ends in an answer."""
        p, t, script = self.prompt_format, self.tokenizer, self.script
        if self.is_text:
            script.check_text(conversation, p.template.name)
        if not conversation.turns or len(conversation.turns) % 2:
            raise UserError("the conversation does not end in an answer", "give it one")
        system, turns = script.say(conversation)
        asked, answers = turns[::2], turns[1::2]
        wanted = [m.trained for m in conversation.turns if m.role == "assistant"]
        trained = [wanted[i] and (train_on == "all" or i + 1 == len(answers)) for i in range(len(answers))]
        if self.is_text:
            said = (*words(script.join), *answers[0])
            return [*map(control, t.file.opening), text(asked[0], said, trained[0]), control(t.eos, trained[0], True)]
        close = " " if len(answers) > 1 else ""
        rows = [Turn(*row, close) for row in zip(asked, answers, trained, strict=True)]
        if script.wording.demonstration:
            shown, answer = map(words, script.wording.demonstration)
            rows.insert(0, Turn(shown, answer, False))
        names = Names(t.bos, t.eos, "" if script.wording.tight else " ")
        if p.chat_format.is_derived:
            return derived(p.chat_format, system, rows, names)
        if p.chat_format.name not in FORMATS:
            raise UserError(f"there is no reference format {p.chat_format.name}", "choose another chat format")
        return FORMATS[p.chat_format.name](system, rows, names)


# A run, its prompt's text and its whole text; a control token has none.
Call = tuple[Run, Text | None, Text | None]


def _tried(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` returns, or the UserError that it raises."""
    try:
        return work(*given)
    except UserError as error:
        return error


def _ids(found: list[int] | UserError) -> list[int]:
    if isinstance(found, UserError):
        raise found
    return found


def _stripped(part: tuple[str, str], strip: Callable[[str], str]) -> tuple[str, str]:
    author, words_ = part
    return (author, strip(words_)) if author == "scaffold" else part


def reference(conversation: Conversation, prompt_format: Any, train_on: str) -> Reference:
    """What one training row must be (`Oracle.reference`)."""
    return Oracle(prompt_format).reference(conversation, train_on)


def template_words(conversation: Conversation, prompt_format: Any) -> tuple[str | None, list[str]]:
    """The system prompt and the text of every turn, in the template's words."""
    system, turns = Oracle(prompt_format).script.say(conversation)
    system_text = None if system is None else "".join(part for _, part in system)
    return system_text, ["".join(part for _, part in turn) for turn in turns]
