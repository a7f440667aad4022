"""A judge that asks a model: what is asked and how a reply is read is the grader's, who is asked is `Ask`'s."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ptst.errors import UserError
from ptst.evaluation.graders.prompt import GraderPrompt, Question, broken_marks
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdicts import AnswerClass, Answered, Verdict
from ptst.generation.request import Answer

# Prompts and the number of the attempt in; for each prompt a reply, or the error that prevented it. Attempt 0 is
# greedy, a later one is sampled with its number as the seed. An `Ask` may also have `record()` (what it asks, for the
# judge's record), `keep_in(folder)` (where replies are recorded) and `close()` (gives back memory until it is needed).
Ask = Callable[[Sequence[GraderPrompt], int], list[str | Exception]]
ATTEMPTS = 3

_CLASSES = RuleBasedJudge()  # for graders that tell none; needs no encoder


@dataclass(frozen=True)
class Grader:
    """A prompt and the reading of its replies, both as their owner has them.

    `meaning`: what it is, in a few words. `source`: where the prompt was published. `success`: which replies count as a
    successful attack, in words. `text`: all of the prompt's own words; its sha256 is recorded. `prompt(request,
    answer)`; `parse(reply)`: the verdict, without a label where the reply tells no class; it raises UserError for a
    reply that it cannot read. `nothing`: the score of an empty answer. `classes`: the classes that it tells itself."""

    name: str
    version: int
    meaning: str
    source: str
    success: str
    text: str
    prompt: Callable[[str, str], GraderPrompt]
    parse: Callable[[str], Verdict]
    max_new_tokens: int = 160
    nothing: float | None = None
    classes: tuple[AnswerClass, ...] = ()
    needs_reference: bool = False

    @property
    def kind(self) -> Literal["text", "chat", "guard"]:
        """Who is asked: a classifier with the whole `text` of a prompt, any `chat` model with messages that end in the
        user's, or a `guard` with an exchange that ends in an answer."""
        prompt = self.prompt(Question("", ""), "")
        if isinstance(prompt, str):
            return "text"
        return "guard" if prompt[-1].role == "assistant" else "chat"


@dataclass(frozen=True)
class ModelJudge:
    """Judges answers by a grader's replies. A reply that cannot be read is asked for twice more, then the answer is
    unjudged. `model`: the name of who is asked, a folder's or `api:MODEL`.

    Where the grader tells no class, that comes from the embedded judge, and the record says so."""

    grader: Grader
    ask: Ask
    model: str

    @property
    def name(self) -> str:
        return f"{self.grader.name}:{self.model}"

    @property
    def nothing(self) -> float | None:
        """The score of an answer that says nothing."""
        return self.grader.nothing

    def record(self) -> dict[str, Any]:
        """Name, version, what counts as success, who tells the classes, sha256 and source of the prompt (of a guard's:
        as the model's folder has it), and the model."""
        grader, model = self.grader, dict(self._call("record") or {"name": self.model})
        own = hashlib.sha256(grader.text.encode()).hexdigest() if grader.text else None
        prompt = {"prompt_sha256": model.pop("prompt_sha256", own)}
        prompt["prompt_source"] = model.pop("prompt_source", grader.source)
        classes = ", ".join(grader.classes) or f"by {_CLASSES.name}"
        found = {"name": self.name, "version": grader.version, "success": grader.success, "classes": classes}
        return {**found, **prompt, "model": model}

    def keep_in(self, folder: Path) -> None:
        """Record replies in this folder, where they cost money."""
        self._call("keep_in", folder)

    def close(self) -> None:
        """Give back the model's memory; it is loaded again when it is needed."""
        self._call("close")

    def _call(self, method: str, *arguments: object) -> Any:
        found = getattr(self.ask, method, None)
        return found(*arguments) if found else None

    def judge(self, request: str, answer: Answer) -> Verdict:
        return self.judge_many([(request, answer)])[0]

    def judge_many(self, answered: Sequence[Answered]) -> list[Verdict]:
        """An answer without a letter or digit serves nothing: it needs no question to the model."""
        found: dict[int, Verdict] = {}
        prompts: dict[int, GraderPrompt] = {}
        for i, (request, answer) in enumerate(answered):
            if not any(c.isalnum() for c in answer.text):
                nothing = "empty or too short to say anything"
                found[i] = Verdict(AnswerClass.INCOHERENT, nothing, False, self.grader.nothing)
            elif self.grader.needs_reference and not isinstance(request, Question):
                found[i] = Verdict(
                    None, f"{self.grader.name} compares with a reference, and the request has none", failed=True
                )
            else:
                prompts[i] = self.grader.prompt(request, answer.text)
        for attempt in range(ATTEMPTS):
            if not prompts:
                break
            replies = self.ask(list(prompts.values()), attempt)
            for i, reply in zip(list(prompts), replies, strict=True):
                try:
                    found[i] = _with_note(self._read(reply), prompts[i])
                except UserError as error:
                    found[i] = Verdict(
                        None, f"the reply to {attempt + 1} attempts cannot be read: {error}", failed=True
                    )
                else:
                    del prompts[i]
        self._add_classes(answered, found)
        return [found[i] for i in range(len(answered))]

    def _read(self, reply: str | Exception) -> Verdict:
        """The verdict of a reply. Raises UserError for one that cannot be read."""
        if isinstance(reply, Exception):
            return Verdict(None, f"{type(reply).__name__}: {reply}", failed=True)
        return self.grader.parse(reply)

    def _add_classes(self, answered: Sequence[Answered], found: dict[int, Verdict]) -> None:
        """A label by the embedded judge for each verdict that has none, unless the answer is unjudged."""
        lacking = [i for i, v in found.items() if v.label is None and (v.success, v.score) != (None, None)]
        if not lacking:
            return
        for i, embedded in zip(lacking, _CLASSES.judge_many([answered[i] for i in lacking]), strict=True):
            reason = "; ".join(filter(None, (found[i].reason, f"{_CLASSES.name}: {embedded.reason}")))
            found[i] = replace(found[i], label=embedded.label, reason=reason)


def _with_note(verdict: Verdict, prompt: GraderPrompt) -> Verdict:
    """The verdict; it says so where the judged text was not put in as it is."""
    marks = ", ".join(broken_marks(prompt))
    return replace(verdict, reason=f"{verdict.reason}; broken in the judged text: {marks}") if marks else verdict
