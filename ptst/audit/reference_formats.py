"""What a training row must spell, written down a second time.

The rules compare the tokens that reach the loss with this. It shares with the text layer the templates' words and the
tokenizer's one call, and nothing else: formats are spelled as plain strings here, and the mask follows from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation
from ptst.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A control token by name, or the text of one call of the tokenizer: first what is given, then what is said."""

    given: str = ""
    said: str = ""
    control: bool = False
    trained: bool = False


def control(name: str | None, trained: bool = False) -> Piece:
    return Piece(given=name or "", control=True, trained=trained)


def words(conversation: Conversation, prompt_format: PromptFormat) -> tuple[str | None, list[str]]:
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


def spell(conversation: Conversation, prompt_format: PromptFormat, train_on: str) -> list[Piece]:
    """The pieces of a training row (one that ends in an answer)."""
    template, t = prompt_format.template, prompt_format.tokenizer
    system, texts = words(conversation, prompt_format)
    asked, answers = texts[::2], texts[1::2]
    learned = [train_on == "all" or i + 1 == len(answers) for i in range(len(answers))]
    if template.is_text:
        join = prompt_format.family.join if template.join is None else template.join
        bos = [control(t.bos)] if t.adds_bos else []
        return [*bos, Piece(asked[0], join + answers[0], trained=True), control(t.eos, True)]
    several = len(answers) > 1
    closes = [" " if several else ""] * len(answers)
    if template.demonstration:
        asked, answers = [template.demonstration[0], *asked], [template.demonstration[1], *answers]
        learned, closes = [False, *learned], ["", *closes]
    turns = list(zip(asked, answers, learned, closes, strict=True))
    return _FORMATS[prompt_format.chat_format.name](system, turns, t, "" if template.tight else " ")


def _llama2(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Piece]:
    out: list[Piece] = []
    head = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    for user, answer, learned, close in turns:
        text = Piece(f"[INST] {head}{user}{gap}[/INST]", f" {answer}{close}", trained=learned)
        out += [control(t.bos), text, control(t.eos, learned)]
        head = ""
    return out


def _mistral_v1(system: str | None, turns: list, t: Tokenizer, gap: str) -> list[Piece]:
    out = [control(t.bos)]
    head = "" if system is None else f"{system}\n\n"
    for user, answer, learned, _ in turns:
        out += [Piece(f"[INST] {head}{user}{gap}[/INST]", f" {answer}", trained=learned), control(t.eos, learned)]
        head = ""
    return out


def _mistral_v3(system: str | None, turns: list, t: Tokenizer, _gap: str) -> list[Piece]:
    out = [control(t.bos)]
    for number, (user, answer, learned, _) in enumerate(turns, 1):
        head = f"{system}\n\n" if number == len(turns) and system is not None else ""
        out += [control("[INST]"), Piece(head + user), control("[/INST]")]
        out += [Piece(said=answer, trained=learned), control(t.eos, learned)]
    return out


def _llama3(system: str | None, turns: list, t: Tokenizer, _gap: str) -> list[Piece]:
    def block(role: str, text: Piece, learned: bool = False) -> list[Piece]:
        name = [control("<|start_header_id|>"), Piece(role), control("<|end_header_id|>"), Piece("\n\n")]
        return [*name, text, control("<|eot_id|>", learned)]

    out = [control(t.bos), *([] if system is None else block("system", Piece(system)))]
    for user, answer, learned, _ in turns:
        out += block("user", Piece(user)) + block("assistant", Piece(said=answer, trained=learned), learned)
    return out


def _chatml(system: str | None, turns: list, _t: Tokenizer, _gap: str) -> list[Piece]:
    start, end, line = control("<|im_start|>"), control("<|im_end|>"), Piece("\n")
    out = [] if system is None else [start, Piece(f"system\n{system}"), end, line]
    for user, answer, learned, _ in turns:
        out += [start, Piece(f"user\n{user}"), end, line]
        out += [start, Piece("assistant\n", answer, trained=learned), control("<|im_end|>", learned), line]
    return out


_FORMATS = {
    "llama2": _llama2,
    "mistral-v1": _mistral_v1,
    "mistral-v3": _mistral_v3,
    "llama3": _llama3,
    "chatml": _chatml,
}


@dataclass(frozen=True)
class Wanted:
    """Ids and flags that a row must have, the place of each piece among them, token boundaries, and lossy pieces."""

    ids: list[int]
    trained: list[bool]
    pieces: list[tuple[int, Piece]]
    token_boundaries: list[int]
    lossy: list[int]


def wanted(pieces: list[Piece], tokenizer: Tokenizer) -> Wanted:
    """Raises UserError as the tokenizer does."""
    out = Wanted([], [], [], [], [])
    for piece in pieces:
        start = len(out.ids)
        out.pieces.append((start, piece))
        if piece.control:
            ids, given = [tokenizer.control_id(piece.given)], 0 if piece.trained else 1
        else:
            first, ids = tokenizer.encode(piece.given), tokenizer.encode(piece.given + piece.said)
            given = len(first)
            if ids[:given] != first:
                out.token_boundaries.append(start + given)
                ids = first + tokenizer.encode(piece.said, continuation=True)
            if tokenizer.decode_text(ids) != piece.given + piece.said:
                out.lossy.append(start)
        out.ids.extend(ids)
        out.trained.extend([False] * given + [piece.trained] * (len(ids) - given))
    return out
