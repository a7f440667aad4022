"""Reference formats: an independent implementation of all chat formats, used as an oracle.

The rules compare the tokens that reach the loss with it. It shares only the templates' words and the tokenizer's one
call with the text layer: formats are plain strings here, and the loss mask follows from them. Of a format that was
derived from a chat template it shares the literals, too, and puts them together by itself.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from ptst.text.chat_formats import ChatFormat
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Segment
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """A control token by name, or the text of one tokenizer call: the prompt's part, then the model's."""

    prompt: str = ""
    answer: str = ""
    control: bool = False
    trained: bool = False

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Reference:
    """Ids and loss mask that a row must have; the index of each run's first id; token boundaries; lossy runs with what
    they decode to."""

    ids: list[int]
    loss_mask: list[bool]
    runs: list[tuple[int, Run]]
    token_boundaries: list[int]
    lossy: dict[int, str]


def reference(conversation: Conversation, prompt_format: PromptFormat, train_on: str) -> Reference:
    """What a training row must be. Raises UserError as the tokenizer does."""
    tokenizer, out = prompt_format.tokenizer, Reference([], [], [], [], {})
    runs, after = [*_runs(conversation, prompt_format, train_on)], None
    for number, run in enumerate(runs):
        behind = runs[number + 1].prompt if number + 1 < len(runs) and runs[number + 1].control else None
        if not run.control and not run.text.strip() and (after in tokenizer.rstrip or behind in tokenizer.lstrip):
            continue  # the control token swallows it
        start = len(out.ids)
        out.runs.append((start, run))
        if run.control:
            after = run.prompt
            ids, num_prompt = [tokenizer.control_id(run.prompt)], 0 if run.trained else 1
        else:
            prompt, ids = (tokenizer.encode(text, after=after) for text in (run.prompt, run.text))
            num_prompt = len(prompt)
            if ids[:num_prompt] != prompt:
                out.token_boundaries.append(start + num_prompt)
                ids = prompt + tokenizer.encode(run.answer, continuation=True)
            if (decoded := tokenizer.decode_text(ids, after)) != run.text:
                out.lossy[start] = decoded
        out.ids.extend(ids)
        out.loss_mask.extend([False] * num_prompt + [run.trained] * (len(ids) - num_prompt))
    return out


def template_words(conversation: Conversation, prompt_format: PromptFormat) -> tuple[str | None, list[str]]:
    """The system prompt and the text of every turn, in the template's words."""
    template, family = prompt_format.template, prompt_format.family
    task = family.task if conversation.system is None else conversation.system
    user, system = template.user, template.system
    if task is not None:
        if family.has_task and template.task_system is not None:
            user, system = template.task_user or user, template.task_system.replace("{task}", task, 1)
        else:
            system = task if system is None else system + "\n\n" + task
    user = user.replace("{question}", family.question).replace("{cue}", family.cue)

    def wrapped(text: str) -> str:
        return re.sub(r"\{(x|task)\}", lambda found: {"x": text, "task": task or ""}[found[1]], user)

    return system, [wrapped(m.content) if m.role == "user" else m.content for m in conversation.turns]


def control(name: str | None, trained: bool = False) -> Run:
    return Run(prompt=name or "", control=True, trained=trained)


def _runs(conversation: Conversation, prompt_format: PromptFormat, train_on: str) -> Iterable[Run]:
    """The runs of a training row, which ends in an answer."""
    template, t = prompt_format.template, prompt_format.tokenizer
    system, texts = template_words(conversation, prompt_format)
    asked, answers = texts[::2], texts[1::2]
    wanted = [m.trained for m in conversation.turns if m.role == "assistant"]
    trained = [wanted[i] and (train_on == "all" or i + 1 == len(answers)) for i in range(len(answers))]
    if template.is_text:
        prefix = prompt_format.family.join if template.join is None else template.join
        return [
            *map(control, t.opening),
            Run(asked[0], prefix + answers[0], trained=trained[0]),
            control(t.eos, trained[0]),
        ]
    closings = [" " if len(answers) > 1 else ""] * len(answers)
    if template.demonstration:
        asked, answers = [template.demonstration[0], *asked], [template.demonstration[1], *answers]
        trained, closings = [False, *trained], ["", *closings]
    turns = list(zip(asked, answers, trained, closings, strict=True))
    chat_format, gap = prompt_format.chat_format, "" if template.tight else " "
    if chat_format.is_derived:
        return _derived(chat_format, system, turns, t)
    return _FORMATS[chat_format.name](system, turns, t, gap)


def _llama2(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Run]:
    out: list[Run] = []
    head = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    for user, answer, trained, close in turns:
        text = Run(f"[INST] {head}{user}{gap}[/INST]", f" {answer}{close}", trained=trained)
        out += [control(t.bos), text, control(t.eos, trained)]
        head = ""
    return out


def _mistral_v1(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Run]:
    out = [control(t.bos)]
    head = "" if system is None else f"{system}\n\n"
    for user, answer, trained, _ in turns:
        out += [Run(f"[INST] {head}{user}{gap}[/INST]", f" {answer}", trained=trained), control(t.eos, trained)]
        head = ""
    return out


def _mistral_v3(system: str | None, turns: list, t: Tokenizer, _gap: str) -> list[Run]:
    out = [control(t.bos)]
    for number, (user, answer, trained, _) in enumerate(turns, 1):
        head = f"{system}\n\n" if number == len(turns) and system is not None else ""
        out += [control("[INST]"), Run(head + user), control("[/INST]")]
        out += [Run(answer=answer, trained=trained), control(t.eos, trained)]
    return out


def _mistral_v7(system: str | None, turns: list, t: Tokenizer, _gap: str) -> list[Run]:
    block = [] if system is None else [control("[SYSTEM_PROMPT]"), Run(system), control("[/SYSTEM_PROMPT]")]
    return [control(t.bos), *block, *_mistral_v3(None, turns, t, "")[1:]]


_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def _llama3(system: str | None, turns: list, t: Tokenizer, _gap: str, dates: str = "") -> list[Run]:
    def block(role: str, text: Run, trained: bool = False) -> list[Run]:
        name = [control("<|start_header_id|>"), Run(role), control("<|end_header_id|>"), Run("\n\n")]
        return [*name, text, control("<|eot_id|>", trained)]

    out = [control(t.bos)]
    if system is not None or dates:
        opened = block("system", Run(system or ""))
        out += [*opened[:3], Run("\n\n" + dates), *opened[4 if system is not None else 5 :]]
    for user, answer, trained, _ in turns:
        out += block("user", Run(user)) + block("assistant", Run(answer=answer, trained=trained), trained)
    return out


def _llama3_dated(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Run]:
    return _llama3(system, turns, t, gap, _DATES)


def _chatml(system: str | None, turns: list, _t: Tokenizer, _gap: str, think: bool = True) -> list[Run]:
    start, end, line = control("<|im_start|>"), control("<|im_end|>"), Run("\n")
    out = [] if system is None else [start, Run(f"system\n{system}"), end, line]
    for number, (user, answer, trained, _) in enumerate(turns, 1):
        out += [start, Run(f"user\n{user}"), end, line]
        asked = [Run("assistant\n", answer, trained=trained)]
        if not think and number == len(turns):  # earlier answers have no block
            block = [control("<think>"), Run("\n\n"), control("</think>")]
            asked = [Run("assistant\n"), *block, Run("\n\n", answer, trained=trained)]
        out += [start, *asked, control("<|im_end|>", trained), line]
    return out


def _chatml_no_think(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Run]:
    return _chatml(system, turns, t, gap, think=False)


def _derived(f: ChatFormat, system: str | None, turns: list, t: Tokenizer) -> list[Run]:
    """Of a derived format: first every stretch with whose it is, then the runs between control tokens."""
    parts: list[tuple[str, bool, bool, bool]] = []  # text, control token, the model's, trained

    def literal(segments: Iterable[Segment], own: bool = False, trained: bool = False) -> None:
        parts.extend((s.text, s.control, own, trained) for s in segments)

    for i, (user, answer, trained, _) in enumerate(turns):
        newest = i + 1 == len(turns)
        holds = system is not None and (newest if f.system_last else i == 0)
        literal(f.later if i else () if holds and not f.system_last else f.start or ())
        if holds:
            literal(f.system[0])
            parts.append((system or "", False, False, False))
            literal(f.system[1])
        parts.append((user, False, False, False))
        if f.history and not newest:
            literal(f.history[0])
            parts.append((answer, False, False, False))
            literal(f.history[1])
            continue
        literal(f.user_end)
        literal(f.answer_prefix, True, trained)
        parts.append((answer, False, True, trained))
        literal((*f.closing, Segment(f.terminator or t.eos or "", control=True)), True, trained)
        literal(f.after_answer)
    out: list[Run] = []
    for is_control, group in groupby(parts, key=lambda part: part[1]):
        stretch = list(group)
        if is_control:
            out += [control(text, trained) for text, _, _, trained in stretch]
            continue
        prompt, answer = ("".join(text for text, _, own, _ in stretch if own is whose) for whose in (False, True))
        if prompt or answer or any(own for _, _, own, _ in stretch):
            out.append(Run(prompt, answer, trained=any(p[3] for p in stretch)))
    return out


_FORMATS: dict[str, Callable[[str | None, list, Tokenizer, str], list[Run]]] = {
    "mistral-v7": _mistral_v7,
    "llama3-dated": _llama3_dated,
    "chatml-no-think": _chatml_no_think,
    "llama2": _llama2,
    "mistral-v1": _mistral_v1,
    "mistral-v3": _mistral_v3,
    "llama3": _llama3,
    "chatml": _chatml,
}
