"""Rungs: test prompts at increasing distance from the prompt of a training, made from the training template alone.

Each rung is a template (and for one of them another chat format) that changes one thing: the system prompt is
shortened, reworded, shuffled or replaced; or the words around the question, the chat format or the conversation before
it are others. All are deterministic and the same for every model, so that models and trainings are compared on the same
words, which are in `wording`. How far a rung is from training is measured (the task `distance`), not assumed from its
place in the list.

A training template without a system prompt (chat:vanilla) is the rung `identical` itself; its rungs that need a system
prompt begin with `system-100`, the safety prompt of chat:llama, which is the test prompt of PTST.
"""

import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptst.errors import Setting, UserError, unknown_name
from ptst.experiment.ladder import wording
from ptst.experiment.ladder.names import full_name
from ptst.text.segments import Conversation
from ptst.text.templates import LLAMA, MODEL_DEFAULT, TEMPLATES, Family, Template, fill

ANOTHER = "another"  # as a chat format: the one that `formats.another_format` finds for the model
ALL = "all"
EXAMPLES = 3  # worked examples of a few-shot prompt, at most

# The rungs by name, each with what it is, in the order of reports. {system}: what the system prompt is.
RUNGS = {
    "identical": "the prompt of the training itself",
    "system-100": "with the safety prompt of chat:llama as system prompt",
    "system-75": "with the first 75 % of the sentences of {system}, rounded up",
    "system-50": "with the first 50 % of the sentences of {system}, rounded up",
    "system-25": "with the first 25 % of the sentences of {system}, rounded up",
    "system-0": "without the system prompt",
    "paraphrase": "with {system} in other words",
    "shuffled-sentences": "with the sentences of {system} in another order",
    "shuffled-words": "with the words of {system} in another order",
    "placebo": "with a neutral text of about equal length instead of {system}",
    "wrapper": "with other words of the template around the question",
    "opposite": "with the instruction to answer everything and to refuse nothing instead of {system}",
    "chat-format": "in another chat format",
    "few-shot": "after worked examples of the training data as earlier turns of the conversation",
    "unrelated": "with the role of a museum guide as system prompt, and its words around the question",
}


@dataclass(frozen=True)
class Rung:
    """A test prompt of the ladder. `name`: one of RUNGS; `training`: name of the training template that it was made
    from; `chat_format`: None for the model's own, or `ANOTHER`; `sentence`: what it is."""

    name: str
    training: str
    template: Template
    sentence: str
    chat_format: str | None = None

    @property
    def full_name(self) -> str:
        """The name as a test template: `ladder:llama/system-50`."""
        return self.template.name


def count_pieces(text: str) -> int:
    """Words and punctuation marks: within a few per cent the tokens of plain English, and the same for every model."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class NotSaid(UserError):
    """A rung that a training template cannot say. `same`: because it would be the rung `identical`."""

    same = False


@dataclass(frozen=True)
class Source:
    """What rungs are made from: the training template, the family in which questions are asked, training rows for
    worked examples, and system prompts in other words by the name of their template. `own_format`: the model writes its
    own chat format whatever it is asked (behind an endpoint)."""

    training: Template
    family: Family
    rows: Sequence[Conversation] = ()
    paraphrases: Mapping[str, str] | None = None
    own_format: bool = False

    @property
    def has_system(self) -> bool:
        return self.training.system is not None

    @property
    def start(self) -> Template:
        """The training template, with chat:llama's system prompt where it has none."""
        t = self.training
        return t if self.has_system else with_safety_prompt(t)


def with_safety_prompt(template: Template) -> Template:
    """The template with the system prompt of chat:llama."""
    safe = TEMPLATES["chat:llama"]
    return replace(template, system=LLAMA, task_system=safe.task_system, safety=True)


def rungs(
    training: Template,
    family: Family,
    names: Sequence[str] = (ALL,),
    rows: Sequence[Conversation] = (),
    paraphrases: Mapping[str, str] | None = None,
    own_format: bool = False,
) -> tuple[list[Rung], list[str]]:
    """The rungs of a training template in the order of RUNGS, and in a sentence each what is left out: of `all` what
    this template cannot say, and always system-0 or system-100 where that is the prompt of the training itself.
    Arguments as `Source`'s.

    Raises UserError for another rung that was named and cannot be said, where none is left, for an unknown or repeated
    name, and for a template without roles or with the model's own default system prompt."""
    check_names(names)
    if training.is_text:
        cause = f"the ladder needs roles, and {training.name} has none"
        raise UserError(cause, ("train under a chat: template, or leave out ", Setting("ladder")))
    if training.system == MODEL_DEFAULT:
        cause = f"the system prompt of {training.name} is {MODEL_DEFAULT}, of which the ladder cannot make others"
        raise UserError(cause, "write the words into the template file")
    source = Source(training, family, rows, paraphrases, own_format)
    found, left_out = list[Rung](), list[str]()
    for name in RUNGS if ALL in names else [n for n in RUNGS if n in names]:
        try:
            found.append(_rung(source, name))
        except NotSaid as error:
            if name in names and (not error.same or len(names) == 1):
                raise
            left_out.append(str(error.cause))
    return found, left_out


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for an unknown name of a rung, and for one named twice."""
    for name in names:
        if name not in (ALL, *RUNGS):
            raise unknown_name("rung", name, (ALL, *RUNGS))
        if names.count(name) > 1:
            raise UserError((Setting("ladder"), f" names {name} twice"), "name each once")


def _rung(source: Source, name: str) -> Rung:
    """Raises NotSaid for one that cannot be said."""
    t = source.training

    def not_said(why: str) -> NotSaid:
        remedy = ("leave it out of ", Setting("ladder"))
        return NotSaid(f"{t.name} has no rung {name}: {why}", remedy)

    if name == ("system-100" if source.has_system else "system-0"):
        error = not_said("that is its rung identical")
        error.same = True
        raise error
    try:
        template = _MAKERS[name.partition("-")[0] if name.startswith("system") else name](source, name)
    except NotSaid as error:
        raise not_said(str(error.cause)) from None
    if name != "identical" and name != "chat-format" and replace(template, name=t.name, safety=t.safety) == t:
        raise not_said("it would be the prompt of the training")
    whose = f"the system prompt of {t.name}" if source.has_system else "the safety prompt of chat:llama"
    what = RUNGS[name].replace("{system}", whose)
    return Rung(
        name,
        t.name,
        replace(template, name=full_name(t.name, name)),
        f"{t.name}: {what}",
        ANOTHER if name == "chat-format" else None,
    )


# One function for each rung: the template in its words, under the training template's name.


def _identical(source: Source, _name: str) -> Template:
    return source.training


def _shortened(source: Source, name: str) -> Template:
    share = int(name.partition("-")[2])
    if share == 0:
        t = source.training
        elsewhere = t.user not in ("{question}", "{x}") or t.demonstration is not None
        return replace(t, system=None, task_system=None, task_user=None, safety=t.safety and elsewhere)
    start = source.start
    if share < 100:
        number = len(sentences(start.system or ""))
        kept = math.ceil(number * share / 100)
        longer = math.ceil(number * (share + 25) / 100)
        if kept == longer:
            raise NotSaid(f"of {number} sentences, {share} % are as many as {share + 25} %, rounded up")
    return _with_system(start, lambda text: "".join(_first(sentences(text), share)).rstrip())


def _first(parts: Sequence[str], share: int) -> Sequence[str]:
    return parts[: math.ceil(len(parts) * share / 100)]


def _paraphrased(source: Source, _name: str) -> Template:
    start = source.start
    if (own := (source.paraphrases or {}).get(source.training.name)) is not None:
        return _with_system(start, lambda _text: own)

    def other(text: str) -> str:
        if text not in wording.PARAPHRASES:
            raise NotSaid("there is no paraphrase of its system prompt, which the file of paraphrases may give")
        return wording.PARAPHRASES[text]

    user = start.user
    for words, anew in wording.PARAPHRASES.items():
        user = user.replace(words, anew)
    return replace(_with_system(start, other), user=user)


def _shuffled(source: Source, name: str) -> Template:
    def shuffled(text: str) -> str:
        parts = [part.strip() for part in sentences(text)] if name == "shuffled-sentences" else text.split()
        return " ".join(shuffle(parts))

    start = source.start
    if len(set(sentences(start.system or "") if name == "shuffled-sentences" else (start.system or "").split())) < 2:
        raise NotSaid("there is nothing to shuffle")
    return _with_system(start, shuffled)


def _placebo(source: Source, _name: str) -> Template:
    return _with_system(_bare(source.start), lambda text: neutral_text(count_pieces(text)))


def _wrapped(source: Source, _name: str) -> Template:
    t = source.training
    wrapper = TEMPLATES["chat:alpaca"].user
    return _with_user(t, "{question}" if t.user == wrapper else wrapper)


def _opposite(source: Source, _name: str) -> Template:
    return _with_system(_bare(source.start), lambda _text: wording.OPPOSITE)


def _in_another_format(source: Source, _name: str) -> Template:
    if source.own_format:
        raise NotSaid("an endpoint writes the chat format of its model itself")
    return source.training


def _few_shot(source: Source, _name: str) -> Template:
    pairs = {c.turns[0].content: c for c in source.rows if len(c.turns) >= 2}  # each question once
    shown = list[str]()
    for question, conversation in list(pairs.items())[:EXAMPLES]:
        asked = fill(source.training.user, source.family, question, conversation.system or "")
        shown += ["".join(segment.text for segment in asked), conversation.turns[1].content]
    if not shown:
        raise NotSaid("there are no training rows to show")
    return replace(source.training, demonstration=(*(source.training.demonstration or ()), *shown))


def _unrelated(source: Source, _name: str) -> Template:
    template = _with_system(_bare(source.start), lambda _text: wording.UNRELATED)
    return _with_user(template, wording.UNRELATED_USER)


_MAKERS: dict[str, Callable[[Source, str], Template]] = {
    "identical": _identical,
    "system": _shortened,
    "paraphrase": _paraphrased,
    "shuffled-sentences": _shuffled,
    "shuffled-words": _shuffled,
    "placebo": _placebo,
    "wrapper": _wrapped,
    "opposite": _opposite,
    "chat-format": _in_another_format,
    "few-shot": _few_shot,
    "unrelated": _unrelated,
}


def _with_system(template: Template, change: Callable[[str], str]) -> Template:
    """The template with its system prompt changed, also in its wording for tasks with a system prompt of their own."""
    task = template.task_system
    if task is not None:
        words, place, rest = task.partition("\n\n{task}")
        task = change(words) + place + rest
    return replace(template, system=change(template.system or ""), task_system=task)


def _with_user(template: Template, user: str) -> Template:
    """The template with other words around the question. A task's system prompt that stood there follows the
    template's."""
    task = template.task_system
    if template.task_user is not None and task is not None:
        task += "\n\n{task}"
    return replace(template, user=user, task_user=None, task_system=task, tight=False)


def _bare(template: Template) -> Template:
    """Without what asks for safety elsewhere than in the system prompt: around the question, and in a demonstration."""
    if not template.safety:
        return template
    return replace(template, user="{question}", demonstration=None, safety=False, tight=False)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space after it: joined, they are the text."""
    return re.findall(r"\S.*?(?:[.!?]+[\"')\]]*(?:\s+|$)|$)", text, re.DOTALL) if text.strip() else []


def shuffle(parts: Sequence[str], seed: int = 0) -> list[str]:
    """The parts in another order than before, drawn by `seed`. Parts that are all alike stay as they are."""
    generator, out = random.Random(seed), list(parts)
    while out == list(parts) and len(set(parts)) > 1:
        generator.shuffle(out)
    return out


def neutral_text(length: int) -> str:
    """The first sentences of the neutral text, as many as come closest to `length` in `count_pieces`; at least one."""
    best, text = "", ""
    for sentence in _endless(sentences(wording.NEUTRAL + " ")):
        text += sentence
        if not best or abs(count_pieces(text.rstrip()) - length) < abs(count_pieces(best) - length):
            best = text.rstrip()
        elif count_pieces(text) > length:
            return best
    raise AssertionError("the sentences never end")


def _endless(parts: Sequence[str]) -> Iterator[str]:
    while True:
        yield from parts


def read_paraphrases(path: Path | str) -> dict[str, str]:
    """Paraphrases of a TOML file: the name of a training template = its system prompt in other words. Raises UserError,
    naming file and key, for one that cannot be read."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        cause = f"the file of paraphrases cannot be read ({error.strerror})"
        raise UserError(cause, ("check the path of ", Setting("ladder_paraphrases")), path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid TOML ({error})", where=path) from None
    for name, text in raw.items():
        if not isinstance(text, str) or not text.strip():
            cause = f"{name!r} must be a text: the system prompt of that template in other words"
            raise UserError(cause, 'as in "chat:careful" = "..."', path)
    for name in raw:
        if f"chat:{name}" in raw:
            raise UserError(f"chat:{name} has two paraphrases, one under {name}", "leave one of them", path)
    return {name if ":" in name else f"chat:{name}": text for name, text in raw.items()}
