r"""Chat formats: how model families write roles. Each format is one object of literals; one function renders all.

    llama2       <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer}</s>     Meta, llama/generation.py
    mistral-v1   <s>[INST] {system}\n\n{user} [/INST] {answer}</s>[INST] ...               mistral-common, v1
    mistral-v3   <s>[INST]{user}[/INST]{answer}</s>[INST]{system}\n\n{user}[/INST]         mistral-common, v2 and v3
    mistral-v7   <s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{user}[/INST]{answer}</s>  mistral-common, v7
    llama3       <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>...    Meta, Llama 3
    chatml       <|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n     SmolLM2

Formats of other folders are derived from their chat templates (`derive`), into the same objects. A format knows nothing
of experiments: it takes the system prompt and the turns as the template wrote them. [INST] and [/INST] are plain text
in llama2 and mistral-v1, control tokens in mistral-v3, where sentencepiece puts the space before each text by itself.
The `text:` templates use no chat format: {prompt}{answer prefix}{answer}<eos>.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptst.errors import Setting, UserError
from ptst.text.segments import Segment, Turn
from ptst.text.tokenizer import Tokenizer

Literals = tuple[Segment, ...]

BOS = Segment("{bos}", control=True)  # the tokenizer's own, by whatever name


def control(*names: str) -> Literals:
    return tuple(Segment(name, control=True) for name in names)


def text(words: str) -> Literals:
    return (Segment(words),) if words else ()


@dataclass(frozen=True)
class ChatFormat:
    """The literals of one chat format.

    `start` precedes the first user's text where there is no system prompt (None: there must be one). `system` precedes
    and follows a system prompt, up to the first user's text; with `system_last` it stands between what precedes the
    last user's text and that text. `later` precedes every other user's text, `user_end` follows the newest one: it ends
    in the generation prompt. The model then samples `answer_prefix`, the answer, `closing` (in a conversation of one
    turn only with `closes_single`) and the `terminator` (None: the tokenizer's EOS); `after_answer` is never sampled.
    `history` precedes and follows earlier answers, where the owner writes them otherwise than the newest one; they
    cannot be trained on then. `role_markers`: markers that are plain text, so that a message could forge them.
    `apart`: system prompt, user text and answer each have a tokenizer call of their own. A folder without a chat
    template has this format if its tokenizer has `control_tokens`. `switches`: what the owner's chat template is told
    to write so. `differences`: names of what a derived format does otherwise than its owner.
    """

    name: str
    start: Literals | None
    system: tuple[Literals, Literals]
    later: Literals
    user_end: Literals
    terminator: str | None = None
    answer_prefix: Literals = ()
    closing: Literals = ()
    after_answer: Literals = ()
    history: tuple[Literals, Literals] | None = None
    system_last: bool = False
    closes_single: bool = True
    role_markers: tuple[str, ...] = ()
    apart: bool = False
    control_tokens: tuple[str, ...] = ()
    switches: tuple[tuple[str, bool], ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def is_derived(self) -> bool:
        return self.name.startswith("derived")

    def suits(self, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer has the control tokens of this format, and its text markers as text."""
        bos = tokenizer.bos is not None or BOS not in (self.start or ())
        return (
            bos
            and all(map(tokenizer.has_control, self.control_tokens))
            and not any(map(tokenizer.has_control, self.role_markers))
        )

    def has_bos(self, tokenizer: Tokenizer) -> bool:
        """Whether the owner begins a conversation with BOS."""
        first = (self.start or self.system[0])[:1]
        return BOS in first or (self.is_derived and first != () and first[0].text == tokenizer.bos)

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
        self._check(system, turns, trained)
        last_user = max(i for i, turn in enumerate(turns) if turn.role == "user")
        user_end = self.user_end
        if tight and user_end[:1] and user_end[0].text.startswith(" [/INST]"):
            user_end = (replace(user_end[0], text=user_end[0].text.removeprefix(" ")), *user_end[1:])
        several = sum(not turn.demonstration for turn in turns) > 2
        end = control(self.terminator or _named(tokenizer.eos))
        out: list[Segment] = []
        for i, turn in enumerate(turns):
            earlier = self.history is not None and i < len(turns) - 2 + (turn.role == "assistant")
            content = self._content(turn.segments)
            if turn.role == "user":
                out += [*self._before(i, i == last_user, system), *content]
                out += self.history[0] if self.history and earlier else user_end
            elif self.history and earlier:
                out += [*content, *self.history[1]]
            else:
                closes = self.closes_single or (several and not turn.demonstration)
                said = (*self.answer_prefix, *content, *(self.closing if closes else ()), *end)
                out += [*sampled(said, i in trained), *self.after_answer]
        return [Segment(_named(tokenizer.bos), control=True) if s is BOS else s for s in out]

    def _check(self, system: Sequence[Segment] | None, turns: Sequence[Turn], trained: Sequence[int]) -> None:
        """Raise UserError for a conversation that the format cannot express or train on."""
        if self is NO_CHAT_FORMAT:
            raise UserError("this model has no known chat format", ("choose one with ", Setting("chat_format")))
        if system is None and self.start is None:
            raise UserError(f"{self.name} needs a system prompt", "choose a template that has one")
        if turns[-1].role != "assistant" or trained[:1] in ([], [len(turns) - 1]):
            return
        remedy = ("train on the last answer only (", Setting("train_on"), " last)")
        if self.system_last and system is not None:
            moved = f"{self.name} moves the system prompt to the last user turn, so this conversation's earlier answers"
            raise UserError(f"{moved} would be trained on prompts that never occur", remedy)
        if self.history is not None:
            cause = f"{self.name} writes earlier answers otherwise than the newest one, so they would be trained on"
            raise UserError(f"{cause} prompts that never occur", remedy)

    def _before(self, turn: int, is_last: bool, system: Sequence[Segment] | None) -> list[Segment]:
        """What precedes a user's text, the system prompt included."""
        block: list[Segment] = []
        if system is not None and (is_last if self.system_last else turn == 0):
            own = system if self.system_last else self._content(system)
            block = [*self.system[0], *own, *self.system[1]]
        if turn > 0:
            return [*self.later, *block]
        return [*(self.start or ()), *block] if self.system_last or system is None else block

    def _content(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        return (replace(segments[0], apart=True), *segments[1:]) if self.apart and segments else segments


def sampled(segments: Sequence[Segment], trained: bool) -> list[Segment]:
    """Segments as what the model itself produces."""
    return [Segment(s.text, s.author, s.control, sampled=True, trained=trained, apart=s.apart) for s in segments]


def _named(token: str | None) -> str:
    if token is None:
        raise UserError("this tokenizer names no BOS or EOS token", "the chat format needs one; choose another format")
    return token


# Of a base model, which a text: template needs no other for.
NO_CHAT_FORMAT = ChatFormat("none", start=(), system=((), ()), later=(), user_end=())
_EOT, _IM_END, _NEWLINE = control("<|eot_id|>"), control("<|im_end|>"), text("\n")
# What Llama 3.1 and later put into the system block, with the date that their own templates fall back to.
_DATES = text("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n")
_THINK = control("<think>", "</think>")
# Qwen3's, with reasoning switched off.
NO_REASONING = (_THINK[0], *text("\n\n"), _THINK[1], *text("\n\n"))


def _header(role: str) -> Literals:
    return (*control("<|start_header_id|>"), *text(role), *control("<|end_header_id|>"), *text("\n\n"))


def _im_start(role: str) -> Literals:
    return (*control("<|im_start|>"), *text(f"{role}\n"))


_CHATML = ChatFormat(
    "chatml",
    start=_im_start("user"),
    system=(_im_start("system"), (*_IM_END, *_NEWLINE, *_im_start("user"))),
    later=_im_start("user"),
    user_end=(*_IM_END, *_NEWLINE, *_im_start("assistant")),
    terminator="<|im_end|>",
    after_answer=_NEWLINE,  # the owner's, but the model has stopped by then
    control_tokens=("<|im_start|>", "<|im_end|>"),
)
_LLAMA3 = ChatFormat(
    "llama3",
    start=(BOS, *_header("user")),
    system=((BOS, *_header("system")), (*_EOT, *_header("user"))),
    later=_header("user"),
    user_end=(*_EOT, *_header("assistant")),
    terminator="<|eot_id|>",
    apart=True,
    control_tokens=("<|start_header_id|>", "<|eot_id|>"),
)
_V7 = control("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
# In the order in which a model folder is compared with them.
CHAT_FORMATS = {
    f.name: f
    for f in (
        _CHATML,
        _LLAMA3,
        ChatFormat(
            "mistral-v7",
            start=(BOS, *control("[INST]")),
            system=((BOS, _V7[0]), (_V7[1], *control("[INST]"))),
            later=control("[INST]"),
            user_end=control("[/INST]"),
            control_tokens=("[SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        ),
        ChatFormat(
            "mistral-v3",
            start=(BOS, *control("[INST]")),
            system=((), text("\n\n")),
            later=control("[INST]"),
            user_end=control("[/INST]"),
            system_last=True,
            control_tokens=("[INST]", "[/INST]"),
        ),
        ChatFormat(
            "llama2",
            start=(BOS, *text("[INST] ")),
            system=((BOS, *text("[INST] <<SYS>>\n")), text("\n<</SYS>>\n\n")),
            later=(BOS, *text("[INST] ")),
            user_end=text(" [/INST]"),
            answer_prefix=text(" "),
            # Meta's dialog code joins turns as "{prompt} [/INST] {answer} "; the paper's single-turn templates close
            # with </s> alone.
            closing=text(" "),
            closes_single=False,
            role_markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        ),
        ChatFormat(
            "mistral-v1",
            start=(BOS, *text("[INST] ")),
            system=((BOS, *text("[INST] ")), text("\n\n")),
            later=text("[INST] "),
            user_end=text(" [/INST]"),
            answer_prefix=text(" "),
            role_markers=("[INST]", "[/INST]"),
        ),
        # Options, never chosen for a folder that one of the above fits.
        replace(
            _LLAMA3,
            name="llama3-dated",
            start=(BOS, *_header("system"), *_DATES, *_EOT, *_header("user")),
            system=((BOS, *_header("system"), *_DATES), _LLAMA3.system[1]),
        ),
        replace(
            _CHATML,
            name="chatml-no-think",
            user_end=(*_CHATML.user_end, *NO_REASONING),
            history=(_CHATML.user_end, (*_IM_END, *_NEWLINE)),
            switches=(("enable_thinking", False),),
            control_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        ),
    )
}
