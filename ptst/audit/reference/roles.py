"""How each chat format writes roles, as the oracle knows it: plain strings, put together row by row.

A row is a list of runs: a control token, or the text between two of them, which is one tokenizer call.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

Parts = tuple[tuple[str, str], ...]  # (author, text)


class Run(NamedTuple):
    """A control token by name, or the text of one tokenizer call: the prompt's part, then the model's. `parts`: its
    text by author, of which the first `given` are the prompt's. `sampled`: the model produces it, or its end."""

    prompt: str = ""
    answer: str = ""
    control: bool = False
    trained: bool = False
    parts: Parts = ()
    given: int = 0
    sampled: bool = False

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Turn(NamedTuple):
    """A question and its answer. `trained`: the answer is; `close`: what Llama-2 puts behind it."""

    user: Parts
    answer: Parts
    trained: bool
    close: str = ""


@dataclass(frozen=True, slots=True)
class Names:
    """The tokenizer's names of BOS and EOS; `gap`: what a template puts before [/INST] where that is text."""

    bos: str | None
    eos: str | None
    gap: str = " "


@lru_cache(4096)  # every row has the same
def control(name: str | None, trained: bool = False, sampled: bool = False) -> Run:
    return Run(name or "", control=True, trained=trained, sampled=sampled or trained)


@lru_cache(1024)
def words(*parts: str) -> Parts:
    """Words of a format or template."""
    return tuple([("scaffold", part) for part in parts if part])


def text(given: Parts, said: Parts | None = None, trained: bool = False) -> Run:
    """A run of text: what the prompt gives, then what the model says (None: nothing, it is all prompt)."""
    prompt = "".join([part for _, part in given])
    if said is None:
        return Run(prompt, "", False, False, given, len(given))
    return Run(prompt, "".join([part for _, part in said]), False, trained, (*given, *said), len(given), True)


def _llama2(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    out: list[Run] = []
    head = () if system is None else (*words("<<SYS>>\n"), *system, *words("\n<</SYS>>\n\n"))
    for turn in turns:
        given = (*words("[INST] "), *head, *turn.user, *words(f"{t.gap}[/INST]"))
        said = (*words(" "), *turn.answer, *words(turn.close))
        out += [control(t.bos), text(given, said, turn.trained), control(t.eos, turn.trained, True)]
        head = ()
    return out


def _mistral_v1(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    out = [control(t.bos)]
    head = () if system is None else (*system, *words("\n\n"))
    for turn in turns:
        given = (*words("[INST] "), *head, *turn.user, *words(f"{t.gap}[/INST]"))
        out += [text(given, (*words(" "), *turn.answer), turn.trained), control(t.eos, turn.trained, True)]
        head = ()
    return out


def _mistral_v3(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    out = [control(t.bos)]
    for number, turn in enumerate(turns, 1):
        head = (*system, *words("\n\n")) if number == len(turns) and system is not None else ()
        out += [control("[INST]"), text((*head, *turn.user)), control("[/INST]")]
        out += [text((), turn.answer, turn.trained), control(t.eos, turn.trained, True)]
    return out


def _mistral_v7(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    block = [] if system is None else [control("[SYSTEM_PROMPT]"), text(system), control("[/SYSTEM_PROMPT]")]
    return [control(t.bos), *block, *_mistral_v3(None, turns, t)[1:]]


_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_START, _END, _EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


def _llama3(system: Parts | None, turns: list[Turn], t: Names, dates: str = "") -> list[Run]:
    def header(role: str, more: str = "") -> list[Run]:
        return [control(_START), text(words(role)), control(_END), text(words("\n\n" + more))]

    out = [control(t.bos)]
    if system is not None or dates:
        out += [*header("system", dates), *([] if system is None else [text(system)]), control(_EOT)]
    for turn in turns:
        out += [*header("user"), text(turn.user), control(_EOT)]
        out += [*header("assistant"), text((), turn.answer, turn.trained), control(_EOT, turn.trained, True)]
    return out


def _llama3_dated(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    return _llama3(system, turns, t, _DATES)


_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


def _chatml(system: Parts | None, turns: list[Turn], _t: Names, think: bool = True) -> list[Run]:
    start, end, line = control(_IM_START), control(_IM_END), text(words("\n"))
    out = [] if system is None else [start, text((*words("system\n"), *system)), end, line]
    for number, turn in enumerate(turns, 1):
        out += [start, text((*words("user\n"), *turn.user)), end, line, start]
        if think or number < len(turns):  # earlier answers have no block
            out.append(text(words("assistant\n"), turn.answer, turn.trained))
        else:
            block = [control("<think>"), text(words("\n\n")), control("</think>")]
            out += [text(words("assistant\n")), *block, text(words("\n\n"), turn.answer, turn.trained)]
        out += [control(_IM_END, turn.trained, True), line]
    return out


def _chatml_no_think(system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    return _chatml(system, turns, t, think=False)


FORMATS: dict[str, Callable[[Parts | None, list[Turn], Names], list[Run]]] = {
    "mistral-v7": _mistral_v7,
    "llama3-dated": _llama3_dated,
    "chatml-no-think": _chatml_no_think,
    "llama2": _llama2,
    "mistral-v1": _mistral_v1,
    "mistral-v3": _mistral_v3,
    "llama3": _llama3,
    "chatml": _chatml,
}
# What ends an answer, where that is not EOS; and the formats whose conversations begin with BOS.
TERMINATORS = {"llama3": _EOT, "llama3-dated": _EOT, "chatml": _IM_END, "chatml-no-think": _IM_END}

# The text of a stretch, its author, whether it is a control token, the model's, trained.
_Stretch = tuple[str, str, bool, bool, bool]


def derived(f: Any, system: Parts | None, turns: list[Turn], t: Names) -> list[Run]:
    """A format that was derived from a chat template: first every stretch of its literals and of messages in order,
    then the runs between control tokens."""
    out: list[_Stretch] = []

    def literal(segments: Iterable[Any], own: bool = False, trained: bool = False) -> None:
        out.extend((s.text, "scaffold", s.control, own, trained) for s in segments)

    def message(parts: Parts, own: bool = False, trained: bool = False) -> None:
        out.extend((part, author, False, own, trained) for author, part in parts)

    for i, turn in enumerate(turns):
        newest = i + 1 == len(turns)
        holds = system is not None and (newest if f.system_last else i == 0)
        literal(f.later if i else () if holds and not f.system_last else f.start or ())
        if holds:
            literal(f.system[0])
            message(system or ())
            literal(f.system[1])
        message(turn.user)
        if f.history and not newest:
            literal(f.history[0])
            message(turn.answer)
            literal(f.history[1])
            continue
        at = len(out)
        literal(f.user_end)
        if not t.gap and out[at:] and out[at][0].startswith(" [/INST]"):
            out[at] = (out[at][0][1:], *out[at][1:])
        literal(f.answer_prefix, True, turn.trained)
        message(turn.answer, True, turn.trained)
        literal(f.closing, True, turn.trained)
        out.append((f.terminator or t.eos or "", "scaffold", True, True, turn.trained))
        literal(f.after_answer)
    return _runs_of(out)


def _runs_of(stretches: list[_Stretch]) -> list[Run]:
    out: list[Run] = []
    for is_control, group in groupby(stretches, key=lambda stretch: stretch[2]):
        if is_control:
            out += [control(name, trained, own) for name, _, _, own, trained in group]
            continue
        parts = [*group]
        given = tuple([(author, part) for part, author, _, own, _ in parts if not own])
        said = tuple([(author, part) for part, author, _, own, _ in parts if own])
        out.append(text(given, said or None, any(part[4] for part in parts)))
    return out
