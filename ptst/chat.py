"""`python -m ptst.chat`: talk to a model, or to a finished run, under a template; see the tokens that are sent."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from ptst import cli
from ptst.audit.view import COLOURS, authors, visible
from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, Request, Sampling
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_dtype
from ptst.open import OpenModel, find_run, open_model
from ptst.progress import console, say
from ptst.settings import CommandSettings, FormatSettings, ModelName, Precision, SamplingSettings, TemplateSettings
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.template_file import load_template
from ptst.text.templates import find_template, render

COMMANDS = {
    "/template": "NAME: the same conversation under another template",
    "/system": "TEXT: a system prompt of your own, after the template's; alone: none",
    "/reset": "forget what was said",
    "/show": "the tokens that were sent for the last answer",
    "/help": "these lines",
    "/quit": "end; so does Ctrl-D",
}


@dataclass(frozen=True, kw_only=True)
class ChatConfig(CommandSettings, FormatSettings, SamplingSettings, TemplateSettings):
    """Talk to a model under a template. Without --checkpoint and --model: the latest run. Lines from standard input are
    the user's turns; /help lists the commands."""

    checkpoint: Path | None = None
    """Run folder of ptst.train."""
    model: ModelName | None = None
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens; less where the model's context ends."""
    seed: int = 0
    """Seed of sampled answers."""
    dtype: Precision = "auto"
    """Data type of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    kv_memory: float | None = None
    """Gigabytes for the KV cache. Default: what the whole context needs, at most half of the free memory on a CPU, 85 %
    on a GPU."""


class Chat:
    """A conversation: what was said so far, and the engine that goes on from there."""

    def __init__(self, model: OpenModel, decoder: Decoder, sampling: Sampling, kv_memory: int | None = None):
        self.model, self.prompt_format, self.sampling = model, model.prompt_format, sampling
        self.room = decoder.config.max_positions
        decode = self.prompt_format.tokenizer.decode_answer
        self._make = partial(Engine, decoder, max_batch=1, kv_memory=kv_memory, decode=decode, stream=True)
        self.stop_ids = model.stop_ids
        self._engine: Engine | None = None
        self.system: str | None = None
        self.reset()

    @property
    def engine(self) -> Engine:
        """What answers; another one after one that was interrupted inside a step."""
        if self._engine is None:
            self._engine = self._make(self.stop_ids)
        return self._engine

    def reset(self) -> None:
        """Forget what was said; a system prompt stays."""
        self.turns: list[Message] = []
        self.sent: tuple[PromptFormat, Conversation] | None = None
        self.completion: Answer | None = None

    def use_template(self, name: str) -> None:
        """Raises UserError for an unknown one."""
        self.prompt_format = self.model.with_template(name).prompt_format
        self.stop_ids = self.prompt_format.stop_ids
        if self._engine is not None:
            self._engine.stop_ids = self.stop_ids

    def conversation(self, text: str) -> Conversation:
        """The conversation with `text` as its newest turn."""
        system = () if self.system is None else (Message("system", self.system),)
        return Conversation((*system, *self.turns, Message("user", text)))

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; then both belong to the conversation. Closing the iterator early
        cancels the answer and keeps its beginning.

        Raises UserError, with the conversation as it was, for what the template cannot say and for a full context.
        """
        conversation = self.conversation(text)
        prompt = self.prompt_format.encode(conversation).ids
        room = min(self.sampling.max_new_tokens, self.room - len(prompt))
        if room < 1:
            raise UserError(f"the conversation has {len(prompt)} tokens and the model's context {self.room}; /reset it")
        self.sent = (self.prompt_format, conversation)
        number = len(self.turns)
        self.engine.add(Request(prompt, replace(self.sampling, max_new_tokens=room), number, keep=True))
        self.completion, said = None, ""
        try:
            while self.completion is None:
                for event in self.engine.step():
                    self.completion = event.answer
                    said += event.text
                    yield event.text
        except KeyboardInterrupt:
            self._engine = None  # inside a step: its books may be half written
            raise
        finally:
            if self.completion is None or self.completion.error is None:
                self.turns += [Message("user", text), Message("assistant", said)]
            if self.completion is None and self._engine is not None:
                engine, self._engine = self._engine, None
                engine.cancel(number)
                while engine.busy:
                    engine.step()
                self._engine = engine
        if self.completion.error:
            raise UserError(self.completion.error)

    def tokens(self) -> Table:
        """The last prompt that was sent (before one: that of a short message), token by token with its authors."""
        p, conversation = self.sent or (self.prompt_format, self.conversation("..."))
        segments = render(conversation, p.template, p.family, p.chat_format, p.tokenizer)
        ids = p.encode(conversation).ids
        out = Table(title=f"{len(ids)} tokens under {p.template.name}", title_justify="left", box=None, pad_edge=False)
        for name, justify in (("token", "right"), ("id", "right"), ("text", "left"), ("author", "left")):
            out.add_column(name, justify=justify, overflow="fold")
        for i, (token, (text, author)) in enumerate(zip(ids, authors(ids, segments, p.tokenizer), strict=True)):
            out.add_row(str(i), str(token), Text(visible(text), style=COLOURS[author]), author)
        return out


def obey(chat: Chat, line: str) -> bool:
    """Carry out a line that begins with a slash; False where it ends the chat. Raises UserError for an unknown one."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no {name}; did you mean {near}? /help lists the commands")
    if name == "/template":
        chat.use_template(rest)
        say(f"template {chat.prompt_format.template.name}")
    elif name == "/system":
        chat.system = rest or None
        say(f"system prompt {rest!r}" if rest else "no system prompt of your own")
    elif name == "/reset":
        chat.reset()
        say("forgotten")
    elif name == "/show":
        console.print(chat.tokens())
    elif name == "/help":
        for known, meaning in COMMANDS.items():
            say(f"{known:10} {meaning}")
    return name != "/quit"


def lines() -> Iterator[str]:
    """The user's lines; on a terminal with a prompt, editing and history."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() its editing)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def reply(chat: Chat, line: str) -> None:
    """Print the answer as it comes. Ctrl-C stops it, not the chat."""
    start, pieces = time.monotonic(), chat.answer(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):  # pressed twice
            pieces.close()
    print()
    done = chat.completion
    if done is not None and sys.stdin.isatty():
        cut = ", cut at the limit" if done.truncated else ""
        say(f"({len(done.token_ids)} tokens, {len(done.token_ids) / (time.monotonic() - start):.1f} a second{cut})")


def run_chat(config: ChatConfig) -> None:
    """Read lines and answer them until they end. Raises UserError for a user's mistakes in the flags."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_k)
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint, run = find_run(config.checkpoint, config.model)
    model = open_model(
        config.model, template, checkpoint=checkpoint, family=config.template_family, chat_format=config.chat_format
    )
    dtype, device = pick_dtype(config.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    decoder = model.load(dtype, device)
    what = f"run {checkpoint} (trained under {run['template']['name']})" if checkpoint else f"model {config.model}"
    say(f"ptst.chat: {what}, template {template.name}, {model.prompt_format.described}; /help lists the commands")
    chat = Chat(model, decoder, sampling, None if config.kv_memory is None else int(config.kv_memory * 1e9))
    for line in lines():
        try:
            if not line.startswith("/"):
                reply(chat, line)
            elif not obey(chat, line):
                return
        except ValueError as error:
            say(str(error))


def main() -> None:
    cli.run(run_chat, ChatConfig, "chat")


if __name__ == "__main__":
    main()
