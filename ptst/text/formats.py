r"""Chat formats: how one model family spells the roles.

A format knows nothing of experiments. It takes the system text and the turns as the template wrote them and spells
them in segments, exactly as the format's owner does.

    llama2   <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer}</s>        Meta, llama/generation.py
    chatml   <|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n     SmolLM2's own template
    text     {prompt}{joining text}{answer}<eos>: no roles at all, for the `text:` templates
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptst.text.files import optional_json
from ptst.text.segments import Message, Segment
from ptst.text.tokenizer import Tokenizer

FORMATS = ("chatml", "llama2")

# A conversation of several turns closes each answer with a space before </s> (Meta's dialog code joins turns as
# "{prompt} [/INST] {answer} "). The paper's single-turn templates close with </s> alone.
LLAMA2_CLOSE = " "


def render(
    chat_format: str, system: str | None, turns: Sequence[Message], tokenizer: Tokenizer, train: str = "all"
) -> list[Segment]:
    """Segments of a conversation; ending in a user turn, they end where the model must speak.

    `train` is "all" (every assistant turn is trained) or "last". Raises ValueError for an unknown format.
    """
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=-1)
    trained = [m.role == "assistant" and (train == "all" or i == last) for i, m in enumerate(turns)]
    if chat_format == "llama2":
        return _llama2(system, turns, trained, tokenizer)
    if chat_format == "chatml":
        return _chatml(system, turns, trained)
    raise ValueError(f"unknown chat format {chat_format!r}; choose from {', '.join(FORMATS)}")


def _llama2(system: str | None, turns: Sequence[Message], trained: list[bool], tokenizer: Tokenizer) -> list[Segment]:
    assert tokenizer.bos and tokenizer.eos
    close = LLAMA2_CLOSE if len(turns) > 2 else ""
    out: list[Segment] = []
    for index, message in enumerate(turns):
        if message.role == "user":
            out += [Segment(tokenizer.bos, control=True), Segment("[INST] ")]
            if index == 0 and system is not None:
                out += [Segment("<<SYS>>\n"), Segment(system, "system"), Segment("\n<</SYS>>\n\n")]
            out += [Segment(message.content, "user"), Segment(" [/INST]")]
        else:
            out += answer(message.content, " ", close, tokenizer.eos, trained[index])
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


def answer(text: str, join: str, close: str, terminator: str, trained: bool) -> list[Segment]:
    """What the model says: joining text, the answer, closing text, the terminator."""
    said = {"sampled": True, "trained": trained}
    return [
        *([Segment(join, **said)] if join else []),
        Segment(text, "assistant", **said),
        *([Segment(close, **said)] if close else []),
        Segment(terminator, control=True, **said),
    ]


def terminator(chat_format: str | None, tokenizer: Tokenizer) -> int:
    """Id of the token that ends an answer under a format (None: the `text:` templates, ended by EOS)."""
    return tokenizer.control_id("<|im_end|>" if chat_format == "chatml" else tokenizer.eos)


def detect_format(folder: Path | str, tokenizer: Tokenizer) -> str:
    """The format of a model folder. Raises ValueError, naming the flag, when it cannot be told."""
    if tokenizer.has_control("<|im_start|>") and tokenizer.has_control("<|im_end|>"):
        return "chatml"
    own = optional_json(Path(folder) / "tokenizer_config.json").get("chat_template")
    if isinstance(own, str) and "<<SYS>>" in own:
        return "llama2"
    raise ValueError(f"{folder}: cannot tell the chat format of this model; say --chat-format {' or '.join(FORMATS)}")
