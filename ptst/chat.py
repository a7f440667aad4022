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
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

from ptst import cli
from ptst.audit.view import COLOURS, authors, visible
from ptst.cli import console, say
from ptst.generation.engine import Engine
from ptst.generation.request import Completion, Request
from ptst.generation.sampling import Sampling
from ptst.model.decoder import Decoder
from ptst.model.weights import pick_dtype
from ptst.subject import Subject, find_run, open_subject, stop_ids
from ptst.text.chat_template import with_default_system_prompt
from ptst.text.encode import PromptFormat
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


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model under a template. Without --checkpoint and --model: the latest run. Lines from standard input are
    the user's turns; /help lists the commands."""

    template: str = "chat:llama"
    """Words round each turn: chat:plain, chat:vanilla, chat:alpaca, chat:llama, chat:llama-short, chat:mpt,
    chat:self-reminder, chat:in-context-defense, or text:vanilla, text:alpaca for one turn. A bare name means chat:."""
    template_file: Path | None = None
    """A template of your own, in TOML, instead of --template (docs/templates.md)."""
    checkpoint: Path | None = None
    """Run folder of ptst.train."""
    model: str | None = None
    """An untouched model: the embedded smollm2-135m-instruct, a Hugging Face folder, or a hub id."""
    max_new_tokens: int = 512
    """Longest answer in tokens; less where the model's context ends."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens of this probability."""
    seed: int = 0
    """Of sampled answers."""
    template_family: str | None = None
    """How a turn is wrapped: gsm8k, chatdoctor, openorca or plain. Left out: the run's, or plain."""
    chat_format: str | None = None
    """How roles are spelled: chatml, llama2, llama3, mistral-v1 or mistral-v3. Left out: the run's, or the folder's
    own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    kv_memory: float | None = None
    """Gigabytes that the conversation's keys and values may take. Left out: what the whole context needs, at most half
    of what is free on a CPU, 85 % on a GPU."""


class Chat:
    """A conversation: what was said so far, and the engine that goes on from there."""

    def __init__(self, subject: Subject, decoder: Decoder, sampling: Sampling, kv_memory: int | None = None):
        self.subject, self.prompt_format, self.sampling = subject, subject.prompt_format, sampling
        self.room = decoder.config.max_positions
        decode = self.prompt_format.tokenizer.decode_answer
        self._make = partial(Engine, decoder, max_batch=1, kv_memory=kv_memory, decode=decode, stream=True)
        self.stop_ids = subject.stop_ids
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
        self.completion: Completion | None = None

    def use_template(self, name: str) -> None:
        """Raises ValueError for an unknown one."""
        template = with_default_system_prompt(find_template(name), self.subject.base)
        self.prompt_format = replace(self.prompt_format, template=template)
        self.stop_ids = stop_ids(self.subject.base, self.prompt_format)
        if self._engine is not None:
            self._engine.stop_ids = self.stop_ids

    def conversation(self, text: str) -> Conversation:
        """The conversation with `text` as its newest turn."""
        system = () if self.system is None else (Message("system", self.system),)
        return Conversation((*system, *self.turns, Message("user", text)))

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; then both belong to the conversation. Closing the iterator early
        cancels the answer and keeps its beginning.

        Raises ValueError, with the conversation as it was, for what the template cannot say and for a full context.
        """
        conversation = self.conversation(text)
        prompt = self.prompt_format.encode(conversation).ids
        room = min(self.sampling.max_new_tokens, self.room - len(prompt))
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and the model's context {self.room}; /reset it"
            )
        self.sent = (self.prompt_format, conversation)
        number = len(self.turns)
        self.engine.add(Request(prompt, replace(self.sampling, max_new_tokens=room), number, keep=True))
        self.completion, said = None, ""
        try:
            while self.completion is None:
                for event in self.engine.step():
                    self.completion = event.completion
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
            raise ValueError(self.completion.error)

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
    """Carry out a line that begins with a slash; False where it ends the chat. Raises ValueError for an unknown one."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no {name}; did you mean {near}? /help lists the commands")
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
        cut = ", cut at the limit" if done.cut else ""
        say(f"({len(done.ids)} tokens, {len(done.ids) / (time.monotonic() - start):.1f} a second{cut})")


def run_chat(config: ChatConfig) -> None:
    """Read lines and answer them until they end. Raises ValueError for a user's mistakes in the flags."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_k)
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    checkpoint, run = find_run(config.checkpoint, config.model)
    family = config.template_family or run.get("family", {}).get("name") or "plain"
    subject = open_subject(checkpoint, run, config.model, template, family, config.chat_format)
    dtype, device = pick_dtype(config.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    decoder = subject.tuned(dtype, device) if checkpoint else subject.untouched(dtype, device)
    what = f"run {checkpoint} (trained under {run['template']['name']})" if checkpoint else f"model {config.model}"
    say(f"ptst.chat: {what}, template {template.name}, {subject.described}; /help lists the commands")
    chat = Chat(subject, decoder, sampling, None if config.kv_memory is None else int(config.kv_memory * 1e9))
    for line in lines():
        try:
            if not line.startswith("/"):
                reply(chat, line)
            elif not obey(chat, line):
                return
        except ValueError as error:
            say(str(error))


if __name__ == "__main__":
    cli.run(run_chat, ChatConfig, "ptst.chat")
