r"""Chat formats: how model families write roles. Each format is one object of literals; one function renders all.

    llama2       <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer}</s>     Meta, llama/generation.py
    mistral-v1   <s>[INST] {system}\n\n{user} [/INST] {answer}</s>[INST] ...               mistral-common, v1
    mistral-v3   <s>[INST]{user}[/INST]{answer}</s>[INST]{system}\n\n{user}[/INST]         mistral-common, v2 and v3
    llama3       <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>...    Meta, Llama 3
    chatml       <|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n     SmolLM2

A format knows nothing of experiments: it takes the system prompt and the turns as the template wrote them. [INST] and
[/INST] are plain text in llama2 and mistral-v1, control tokens in mistral-v3, where sentencepiece puts the space before
each text by itself. The `text:` templates use no chat format: {prompt}{answer prefix}{answer}<eos>.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ptst.errors import Setting, UserError
from ptst.text.chat_template import read_chat_template
from ptst.text.segments import Segment, Turn
from ptst.text.tokenizer import Tokenizer

Literals = tuple[Segment, ...]

BOS = Segment("{bos}", control=True)  # the tokenizer's own, by whatever name


def _control(*names: str) -> Literals:
    return tuple(Segment(name, control=True) for name in names)


def _text(text: str) -> Literals:
    return (Segment(text),)


@dataclass(frozen=True)
class ChatFormat:
    """The literals of one chat format; pairs are what precedes and what follows a text.

    `system_turn`: the user turn that holds the system prompt (None: a block of its own precedes the turns).
    `terminator`: the control token that ends an answer (None: the tokenizer's EOS). `closing`: text before it in
    conversations of several turns. `after_answer` follows the terminator and is never sampled. `role_markers`: markers
    that are plain text, so that a message could forge them. `apart`: system prompt, user text and answer each have a
    tokenizer call of their own. A model folder has this format if its tokenizer has `control_tokens` and its chat
    template holds `template_markers`."""

    name: str
    user: tuple[Literals, Literals]
    system: tuple[Literals, Literals]
    system_turn: Literal["first", "last"] | None = None
    opening: Literals = ()
    answer_prefix: str = ""
    closing: str = ""
    terminator: str | None = None
    after_answer: Literals = ()
    role_markers: tuple[str, ...] = ()
    apart: bool = False
    control_tokens: tuple[str, ...] = ()
    template_markers: tuple[str, ...] = ()

    def render(
        self,
        system: Sequence[Segment] | None,
        turns: Sequence[Turn],
        tokenizer: Tokenizer,
        train_on: str = "all",
        tight: bool = False,
    ) -> list[Segment]:
        """Segments of a conversation; one that ends in a user turn ends where the model must answer.

        `system`: the system prompt, None for no system block. `train_on`: "all" answers or the "last".
        `tight`: no space before [/INST] where that is text. Raises UserError for what the format cannot express."""
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.demonstration]
        trained = answers if train_on == "all" else answers[-1:]
        if self.system_turn == "last" and system is not None and len(trained) > 1 and turns[-1].role == "assistant":
            moved = f"{self.name} moves the system prompt to the last user turn, so this conversation's earlier answers"
            remedy = ("train on the last answer only (", Setting("train_on"), " last)")
            raise UserError(f"{moved} would be trained on prompts that never occur", remedy)
        users = [i for i, turn in enumerate(turns) if turn.role == "user"]
        holds_system = {"first": users[0], "last": users[-1]}.get(self.system_turn or "")
        closing = self.closing if sum(not turn.demonstration for turn in turns) > 2 else ""
        user_end = self.user[1]
        if tight and not user_end[0].control:
            user_end = (Segment(user_end[0].text.removeprefix(" ")), *user_end[1:])
        out = list(self.opening)
        if system is not None and self.system_turn is None:
            out += [*self.system[0], *self._content(system), *self.system[1]]
        for i, turn in enumerate(turns):
            if turn.role == "user":
                out += self.user[0]
                if i == holds_system and system is not None:
                    out += [*self.system[0], *system, *self.system[1]]
                out += [*self._content(turn.segments), *user_end]
            else:
                end = self.terminator or _named(tokenizer.eos)
                closes = "" if turn.demonstration else closing
                out += answer(self._content(turn.segments), self.answer_prefix, closes, end, i in trained)
                out += self.after_answer
        return [Segment(_named(tokenizer.bos), control=True) if s is BOS else s for s in out]

    def _content(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        return (replace(segments[0], apart=True), *segments[1:]) if self.apart and segments else segments


def answer(content: Sequence[Segment], prefix: str, closing: str, terminator: str, trained: bool) -> list[Segment]:
    """What the model samples: answer prefix, answer, closing text, terminator."""
    before, after = (_text(text) if text else () for text in (prefix, closing))
    segments = (*before, *content, *after, *_control(terminator))
    return [Segment(s.text, s.author, s.control, sampled=True, trained=trained, apart=s.apart) for s in segments]


def _named(token: str | None) -> str:
    if token is None:
        raise UserError("this tokenizer names no BOS or EOS token", "the chat format needs one; choose another format")
    return token


_EOT, _IM_END = _control("<|eot_id|>"), _control("<|im_end|>")


def _header(role: str) -> Literals:
    return (*_control("<|start_header_id|>"), *_text(role), *_control("<|end_header_id|>"), *_text("\n\n"))


def _im_start(role: str) -> Literals:
    return (*_control("<|im_start|>"), *_text(f"{role}\n"))


# In the order in which a model folder is compared with them.
CHAT_FORMATS = {
    f.name: f
    for f in (
        ChatFormat(
            "chatml",
            user=(_im_start("user"), (*_IM_END, *_text("\n"), *_im_start("assistant"))),
            system=(_im_start("system"), (*_IM_END, *_text("\n"))),
            terminator="<|im_end|>",
            after_answer=_text("\n"),  # the owner's, but the model has stopped by then
            control_tokens=("<|im_start|>", "<|im_end|>"),
        ),
        ChatFormat(
            "llama3",
            user=(_header("user"), (*_EOT, *_header("assistant"))),
            system=(_header("system"), _EOT),
            opening=(BOS,),
            terminator="<|eot_id|>",
            apart=True,
            control_tokens=("<|start_header_id|>", "<|eot_id|>"),
        ),
        ChatFormat(
            "mistral-v3",
            user=(_control("[INST]"), _control("[/INST]")),
            system=((), _text("\n\n")),
            system_turn="last",
            opening=(BOS,),
            control_tokens=("[INST]", "[/INST]"),
        ),
        ChatFormat(
            "llama2",
            user=((BOS, *_text("[INST] ")), _text(" [/INST]")),
            system=(_text("<<SYS>>\n"), _text("\n<</SYS>>\n\n")),
            system_turn="first",
            answer_prefix=" ",
            # Meta's dialog code joins turns as "{prompt} [/INST] {answer} "; the paper's single-turn templates close
            # with </s> alone.
            closing=" ",
            role_markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
            template_markers=("[INST]", "<<SYS>>"),
        ),
        ChatFormat(
            "mistral-v1",
            user=(_text("[INST] "), _text(" [/INST]")),
            system=((), _text("\n\n")),
            system_turn="first",
            opening=(BOS,),
            answer_prefix=" ",
            role_markers=("[INST]", "[/INST]"),
            template_markers=("[INST]",),
        ),
    )
}


def detect_format(folder: Path | str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model folder. Raises UserError when no known one fits."""
    template = read_chat_template(folder) or ""
    for f in CHAT_FORMATS.values():
        if all(map(tokenizer.has_control, f.control_tokens)) and all(m in template for m in f.template_markers):
            return f
    remedy = ("choose ", Setting("chat_format"), f" {' or '.join(CHAT_FORMATS)}")
    raise UserError("cannot tell the chat format of this model", remedy, folder)
