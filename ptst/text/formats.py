r"""Chat formats: how one model family spells the roles.

A format knows nothing of experiments. It takes the system prompt and the turns as the template wrote them and spells
them in segments, exactly as the format's owner does.

    llama2       <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer}</s>     Meta, llama/generation.py
    mistral-v1   <s>[INST] {system}\n\n{user} [/INST] {answer}</s>[INST] ...               mistral-common, v1
    mistral-v3   <s>[INST]{user}[/INST]{answer}</s>[INST]{system}\n\n{user}[/INST]         mistral-common, v2 and v3
    llama3       <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>...    Meta, Llama 3
    chatml       <|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n     SmolLM2's own
    text         {prompt}{answer prefix}{answer}<eos>: no roles at all, for the `text:` templates

[INST] and [/INST] are plain text in llama2 and mistral-v1, control tokens in mistral-v3, where sentencepiece puts the
space before each text by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptst.errors import UserError
from ptst.text.files import optional_json, read_chat_template
from ptst.text.segments import Message, Segment
from ptst.text.tokenizer import Tokenizer

FORMATS = ("chatml", "llama2", "llama3", "mistral-v1", "mistral-v3")

# A conversation of several turns closes each answer with a space before </s> (Meta's dialog code joins turns as
# "{prompt} [/INST] {answer} "). The paper's single-turn templates close with </s> alone.
LLAMA2_CLOSE = " "
# Between system and user text where a format has no role for the system.
MISTRAL_SYSTEM_JOIN = "\n\n"


def render(
    chat_format: str,
    system: str | None,
    turns: Sequence[Message],
    tokenizer: Tokenizer,
    train: str = "all",
    demo: Sequence[Message] = (),
    tight: bool = False,
) -> list[Segment]:
    """Segments of a conversation; ending in a user turn, they end where the model must speak.

    `train` is "all" (every assistant turn is trained) or "last". `demo` is a demonstration put before the turns, never
    trained, closed by the terminator alone. `tight`: no space before [/INST], where that is text.
    Raises UserError for an unknown format and for what a format cannot say.
    """
    turns = [*demo, *turns]
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=-1)
    trained = [m.role == "assistant" and i >= len(demo) and (train == "all" or i == last) for i, m in enumerate(turns)]
    if chat_format == "llama2":
        return _llama2(system, turns, trained, tokenizer, len(demo), tight)
    if chat_format == "mistral-v1":
        return _mistral_v1(system, turns, trained, tokenizer, tight)
    if chat_format == "mistral-v3":
        return _mistral_v3(system, turns, trained, tokenizer)
    if chat_format == "llama3":
        return _llama3(system, turns, trained, tokenizer)
    if chat_format == "chatml":
        return _chatml(system, turns, trained)
    raise UserError(f"unknown chat format {chat_format!r}; choose from {', '.join(FORMATS)}")


def _llama2(
    system: str | None, turns: Sequence[Message], trained: list[bool], tokenizer: Tokenizer, demo: int, tight: bool
) -> list[Segment]:
    close = LLAMA2_CLOSE if len(turns) - demo > 2 else ""
    out: list[Segment] = []
    for index, message in enumerate(turns):
        if message.role == "user":
            out += [_named(tokenizer.bos), Segment("[INST] ")]
            if index == 0 and system is not None:
                out += [Segment("<<SYS>>\n"), Segment(system, "system"), Segment("\n<</SYS>>\n\n")]
            out += [Segment(message.content, "user"), Segment("[/INST]" if tight else " [/INST]")]
        else:
            ending = close if index >= demo else ""
            out += answer(message.content, " ", ending, _named(tokenizer.eos).text, trained[index])
    return out


def _mistral_v1(
    system: str | None, turns: Sequence[Message], trained: list[bool], tokenizer: Tokenizer, tight: bool
) -> list[Segment]:
    out = [_named(tokenizer.bos)]
    for index, message in enumerate(turns):
        if message.role == "user":
            out.append(Segment("[INST] "))
            if index == 0 and system is not None:
                out += [Segment(system, "system"), Segment(MISTRAL_SYSTEM_JOIN)]
            out += [Segment(message.content, "user"), Segment("[/INST]" if tight else " [/INST]")]
        else:
            out += answer(message.content, " ", "", _named(tokenizer.eos).text, trained[index])
    return out


def _mistral_v3(
    system: str | None, turns: Sequence[Message], trained: list[bool], tokenizer: Tokenizer
) -> list[Segment]:
    users = [i for i, m in enumerate(turns) if m.role == "user"]
    if system is not None and sum(trained) > 1 and turns[-1].role == "assistant":
        raise UserError(
            "mistral-v3 moves the system prompt to the last user turn, so earlier answers of this conversation would "
            "be trained on prompts that never occur; train the last answer only (--train-on last)"
        )
    out = [_named(tokenizer.bos)]
    for index, message in enumerate(turns):
        if message.role == "user":
            out.append(Segment("[INST]", control=True))
            if index == users[-1] and system is not None:
                out += [Segment(system, "system"), Segment(MISTRAL_SYSTEM_JOIN)]
            out += [Segment(message.content, "user"), Segment("[/INST]", control=True)]
        else:
            out += answer(message.content, "", "", _named(tokenizer.eos).text, trained[index])
    return out


def _llama3(system: str | None, turns: Sequence[Message], trained: list[bool], tokenizer: Tokenizer) -> list[Segment]:
    def header(role: str) -> list[Segment]:
        start, end = (Segment(f"<|{name}_header_id|>", control=True) for name in ("start", "end"))
        return [start, Segment(role), end, Segment("\n\n")]

    end = Segment("<|eot_id|>", control=True)
    out = [_named(tokenizer.bos)]
    if system is not None:
        out += [*header("system"), Segment(system, "system", apart=True), end]
    for index, message in enumerate(turns):
        if message.role == "user":
            out += [*header("user"), Segment(message.content, "user", apart=True), end, *header("assistant")]
        else:
            out += answer(message.content, "", "", end.text, trained[index], apart=True)
    return out


def _chatml(system: str | None, turns: Sequence[Message], trained: list[bool]) -> list[Segment]:
    start, end = Segment("<|im_start|>", control=True), Segment("<|im_end|>", control=True)
    out: list[Segment] = []
    if system is not None:
        out += [start, Segment("system\n"), Segment(system, "system"), end, Segment("\n")]
    for index, message in enumerate(turns):
        if message.role == "user":
            out += [start, Segment("user\n"), Segment(message.content, "user"), end, Segment("\n")]
            out += [start, Segment("assistant\n")]
        else:
            # The newline after <|im_end|> is the owner's, but the model has stopped by then: it is never sampled.
            out += [*answer(message.content, "", "", end.text, trained[index]), Segment("\n")]
    return out


def _named(token: str | None) -> Segment:
    if token is None:
        raise UserError("this tokenizer names no BOS or EOS token, which the chat format needs")
    return Segment(token, control=True)


def answer(text: str, join: str, close: str, terminator: str, trained: bool, apart: bool = False) -> list[Segment]:
    """What the model says: answer prefix, the answer, closing text, the terminator."""
    said = {"sampled": True, "trained": trained}
    return [
        *([Segment(join, **said)] if join else []),
        Segment(text, "assistant", **said, apart=apart),
        *([Segment(close, **said)] if close else []),
        Segment(terminator, control=True, **said),
    ]


_TERMINATORS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


def terminator(chat_format: str | None, tokenizer: Tokenizer) -> int:
    """Id of the token that ends an answer under a format (None: the `text:` templates, ended by EOS)."""
    return tokenizer.control_id(_TERMINATORS.get(chat_format or "", tokenizer.eos))


def eos_ids(folder: Path) -> frozenset[int]:
    """The end-of-sequence ids of a folder's generation_config.json."""
    own = optional_json(folder / "generation_config.json").get("eos_token_id", [])
    return frozenset(own if isinstance(own, list) else [own])


def answer_prefix(chat_format: str) -> str:
    """What stands between prompt and answer under a format, and is sampled first."""
    return " " if chat_format in ("llama2", "mistral-v1") else ""


def marks(chat_format: str) -> tuple[str, ...]:
    """A format's marks that are plain text, so that a message could forge them; empty where they are control tokens."""
    return {"llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), "mistral-v1": ("[INST]", "[/INST]")}.get(
        chat_format, ()
    )


def detect_format(folder: Path | str, tokenizer: Tokenizer) -> str:
    """The format of a model folder. Raises UserError, naming the flag, when it cannot be told."""
    if tokenizer.has_control("<|im_start|>") and tokenizer.has_control("<|im_end|>"):
        return "chatml"
    if tokenizer.has_control("<|start_header_id|>") and tokenizer.has_control("<|eot_id|>"):
        return "llama3"
    if tokenizer.has_control("[INST]") and tokenizer.has_control("[/INST]"):
        return "mistral-v3"
    own = read_chat_template(folder)
    if own is not None and "[INST]" in own:
        return "llama2" if "<<SYS>>" in own else "mistral-v1"
    raise UserError(f"{folder}: cannot tell the chat format of this model; say --chat-format {' or '.join(FORMATS)}")
