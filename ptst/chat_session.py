"""A conversation with a model under a template: turns, streamed answers, the tokens that were sent."""

from collections.abc import Generator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.table import Table

from ptst.audit.setup import Setup
from ptst.audit.view import table, view
from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, EngineOptions, Request, Sampling
from ptst.model.decoder import Decoder
from ptst.open import OpenModel
from ptst.storage import append_jsonl
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message


class Chat:
    """The conversation so far, and the engine that continues it. `kv_memory`: bytes for the KV cache."""

    def __init__(self, model: OpenModel, decoder: Decoder, sampling: Sampling, kv_memory: int | None = None):
        self.model, self.prompt_format, self.sampling = model, model.prompt_format, sampling
        self.max_positions = decoder.config.max_positions
        decode = self.prompt_format.tokenizer.decode_answer
        options = EngineOptions(batch_size=1, kv_memory=kv_memory)
        self._make_engine = partial(Engine, decoder, options=options, decode=decode, stream=True)
        self._engine: Engine | None = None
        self.system: str | None = None
        self.reset()

    @property
    def engine(self) -> Engine:
        """The engine; a new one after an answer that was interrupted inside a step."""
        if self._engine is None:
            self._engine = self._make_engine(self.prompt_format.stop_ids)
        return self._engine

    def reset(self) -> None:
        """Forget the turns; a system prompt stays."""
        self.turns: list[Message] = []
        self.sent: tuple[PromptFormat, Conversation] | None = None
        self.newest: Answer | None = None
        self.stopped = False

    def use_template(self, name: str) -> None:
        """Continue under another template. Raises UserError for an unknown one."""
        self.prompt_format = self.model.with_template(name).prompt_format
        if self._engine is not None:
            self._engine.stop_ids = self.prompt_format.stop_ids

    def conversation(self, text: str) -> Conversation:
        """The conversation with `text` as its newest turn."""
        return Conversation((*self._messages(), Message("user", text)))

    def _messages(self) -> list[Message]:
        return [*([] if self.system is None else [Message("system", self.system)]), *self.turns]

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text` piece by piece; afterwards both are turns of the conversation. Setting `stopped`
        or closing the iterator cancels the answer and keeps what was yielded; if that is nothing, no turn is added.

        Raises UserError, and adds no turn, if the template cannot render the conversation or the context is full.
        """
        conversation = self.conversation(text)
        prompt = self.prompt_format.encode(conversation).ids
        max_new_tokens = min(self.sampling.max_new_tokens, self.max_positions - len(prompt))
        if max_new_tokens < 1:
            context = f"the conversation has {len(prompt)} tokens and the model's context {self.max_positions}"
            raise UserError(context, "/reset it")
        self.sent = (self.prompt_format, conversation)
        number = len(self.turns)
        sampling = replace(self.sampling, max_new_tokens=max_new_tokens)
        self.engine.add(Request(prompt, sampling, number, keep_cached=True))
        self.newest, self.stopped, answer = None, False, ""
        try:
            while self.newest is None and not self.stopped:
                for event in self.engine.step():
                    self.newest = event.answer
                    answer += event.text
                    yield event.text
        except KeyboardInterrupt:
            self._engine = None  # inside a step: its state may be half updated
            raise
        finally:
            if answer if self.newest is None else not self.newest.error:
                self.turns += [Message("user", text), Message("assistant", answer)]
            if self.newest is None and self._engine is not None:
                engine, self._engine = self._engine, None  # a second Ctrl-C in here drops the engine
                engine.cancel(number)
                while engine.busy:
                    engine.step()
                self._engine = engine
        if self.newest is not None and self.newest.error:
            raise UserError(self.newest.error)

    def tokens(self) -> Table:
        """The last prompt that was sent (before the first, that of a short message): tokens with their authors."""
        p, conversation = self.sent or (self.prompt_format, self.conversation("..."))
        tokens = view(p.encode(conversation), conversation, Setup(p))
        return table(tokens, f"{len(tokens)} tokens under {p.template.name}", {}, columns=4)

    def save(self, path: str) -> None:
        """Append the conversation, with the settings of its last answer, to a JSONL file that serves as training data.

        Raises UserError before the first answer, and if the file cannot be written."""
        if not self.turns or self.sent is None:
            raise UserError("there is no answer yet to save")
        p, model = self.sent[0], self.model
        settings = {"model": model.name, "checkpoint": str(model.checkpoint) if model.checkpoint else None}
        settings |= {"adapter": model.adapter_name} if model.adapter else {}
        settings |= {"template": p.template.name, "family": p.family.name, "chat_format": p.chat_format.name}
        row = {
            "messages": Conversation(tuple(self._messages())).to_json(),
            "settings": settings | asdict(self.sampling),
        }
        try:
            append_jsonl(Path(path).resolve(), row)  # the user's own link may be followed
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", "/save FILE names another", path) from None
