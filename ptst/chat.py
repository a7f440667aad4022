"""`python -m ptst.chat`: talk to a model, or to a finished run, under a template; see the tokens that are sent."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Fixed, Suppress

from ptst import cli
from ptst.errors import UserError, unknown_name
from ptst.progress import console, printable, say
from ptst.settings import (
    AdapterName,
    CommandSettings,
    FormatSettings,
    OptionalLocalModel,
    Precision,
    RevisionSettings,
    SamplingSettings,
    TemplateSettings,
    ThreadSettings,
    check_at_least,
)

if TYPE_CHECKING:
    from ptst.chat_session import Chat

COMMANDS = {
    "/template": "NAME: continue the conversation under another template",
    "/system": "TEXT: a system prompt of your own, after the template's; without TEXT: none",
    "/reset": "start a new conversation",
    "/show": "the tokens that were sent for the last answer",
    "/save": "FILE: append the conversation and its settings to a JSONL file",
    "/help": "these lines",
    "/quit": "end the chat; so does Ctrl-D",
}


@dataclass(frozen=True, kw_only=True)
class ChatConfig(CommandSettings, RevisionSettings, ThreadSettings, FormatSettings, SamplingSettings, TemplateSettings):
    """Talk to a model under a template. Without --checkpoint and --model: the latest run. Ctrl-C stops an answer,
    Ctrl-D ends the chat, /help lists the commands. From a pipe, each line is a message."""

    json: Annotated[bool, Fixed, Suppress] = False  # a chat has no result
    checkpoint: Path | None = None
    """Run folder of ptst.train."""
    model: OptionalLocalModel = None
    adapter: AdapterName = None
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens; less where the model's context ends."""
    seed: int = 0
    """Seed of sampled answers."""
    dtype: Precision = "auto"
    """Data type of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    kv_memory: float | None = None
    """Gigabytes for the KV cache. Default: what the whole context needs, at most half of the free memory on a CPU, 85 %
    on a GPU."""


def obey(chat: Chat, line: str) -> bool:
    """Carry out a line that begins with a slash; False if it ends the chat. Raises UserError for an unknown one."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    if name == "/template":
        chat.use_template(rest)
        say(f"template {chat.prompt_format.template.name}")
    elif name == "/system":
        chat.system = rest or None
        say(f"system prompt {rest!r}" if rest else "no system prompt of your own")
    elif name == "/reset":
        chat.reset()
        say("new conversation")
    elif name == "/show":
        console.print(chat.tokens())
    elif name == "/save":
        chat.save(rest)
        say(f"saved to {rest}")
    elif name == "/help":
        say("\n".join(f"{known:10} {meaning}" for known, meaning in COMMANDS.items()))
    return name != "/quit"


def messages(terminal: bool) -> Iterator[str]:
    """The user's messages until the input ends. On a terminal with history, editing, pasted lines as one message."""
    read: Callable[[], str] = input
    if terminal:
        from prompt_toolkit import PromptSession

        read = PromptSession("> ").prompt
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("/quit or Ctrl-D ends the chat")
            continue
        if text:
            yield text


def reply(chat: Chat, line: str) -> None:
    """Print the answer as it comes. Ctrl-C stops it after the current step, not the chat."""

    def stop(_number: int, _frame: object) -> None:
        os.write(sys.stderr.fileno(), b"\nstopping ...\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # pressed twice: at once
        chat.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    start, pieces = time.monotonic(), chat.answer(line)
    try:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            pieces.close()
    finally:
        signal.signal(signal.SIGINT, before)
    if chat.newest is not None and sys.stdin.isatty():
        tokens = len(chat.newest.token_ids)
        truncated = ", truncated at max_new_tokens" if chat.newest.truncated else ""
        say(f"({tokens} tokens, {tokens / (time.monotonic() - start):.1f} tokens/s{truncated})")


def run_chat(config: ChatConfig) -> None:
    """Read messages and answer them until the input ends. Raises UserError for a user's mistakes in the settings."""
    check_at_least(config, 1, "threads")
    say(f"ptst.chat: loading {config.checkpoint or config.model or 'the latest run'}")

    from ptst.audit.findings import check_names
    from ptst.chat_session import Chat
    from ptst.generation.request import Sampling
    from ptst.model.weights import pick_device, pick_dtype
    from ptst.open import open_model
    from ptst.text.templates import load_template
    from ptst.threads import choose_threads

    choose_threads(config.threads)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_k)
    template = load_template(config.template_file) if config.template_file else config.template
    check_names(config.allow)
    model = open_model(
        config.model,
        template,
        checkpoint=config.checkpoint,
        adapter=config.adapter,
        family=config.template_family,
        chat_format=config.chat_format,
        allow=("role-markers", *config.allow),
    )
    decoder = model.load(pick_dtype(config.dtype), pick_device())
    chat = Chat(model, decoder, sampling, None if config.kv_memory is None else int(config.kv_memory * 1e9))
    name = model.prompt_format.template.name
    say(f"{model.described}, template {name}, {model.prompt_format.described}; /help lists the commands")
    for line in messages(sys.stdin.isatty()):
        try:
            if not line.startswith("/"):
                reply(chat, line)
            elif not obey(chat, line):
                return
        except UserError as error:
            say(str(error))


def main() -> None:
    cli.run(run_chat, ChatConfig, "chat")


if __name__ == "__main__":
    main()
