"""inspect_ai's model provider `ptst`: `inspect eval task.py --model ptst/RUN@chat:llama`.

Samples that run at once are answered in one batch: each request goes to the engine in its thread (the server's), which
takes it into the next step. The model is opened when it is named, so that a mistake is told before anything runs, and
its weights are loaded with the first request.
"""

import asyncio
import secrets
import time
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelCall, ModelOutput
from inspect_ai.tool import ToolChoice, ToolInfo
from rich.markup import escape

from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, EngineOptions, Request, Sampling
from ptst.interop.arguments import named
from ptst.interop.inspect_requests import to_conversation, to_output, to_sampling
from ptst.model.decoder import Decoder
from ptst.open import OpenModel
from ptst.serving.worker import EngineThread, Events, Ticket


class EngineAPI(ModelAPI):
    """A model of this project under a template. `model_args` as in `ModelArguments`; `lazy`: the model is opened with
    the first request, as for scoring a log of a model that is gone. Raises PrerequisiteError, which inspect_ai prints
    as one sentence, for a model that cannot be opened."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect_ai's own signature)
        **model_args: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        self._model: OpenModel | None = None
        self._decoder: Decoder | None = None
        self._loading: asyncio.Lock | None = None
        self._engine: EngineThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            if base_url is not None:
                remedy = "for a running ptst serve, use openai-api/ptst/NAME with that address"
                raise UserError("a model of ptst has no base URL: it runs in this process", remedy)
            lazy = bool(model_args.pop("lazy", False))
            self.arguments = named(model_name, model_args, "-M")
            if not lazy:
                self._model = self.arguments.open()
                _ = self.arguments.torch_device  # refused now, if at all
        except UserError as error:
            raise PrerequisiteError(escape(f"ptst/{model_name}: {error}")) from None

    @property
    def model(self) -> OpenModel:
        """The model under its template. Raises UserError where it cannot be opened."""
        if self._model is None:
            self._model = self.arguments.open()
        return self._model

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        """The answers to a conversation. Raises UserError for what the model or its template cannot do."""
        start = time.monotonic()
        p = self.model.prompt_format
        prompt = p.encode(to_conversation(input, tools)).ids
        room = self.model.config.max_positions - len(prompt)
        if room < 1:
            raise UserError(f"the prompt has {len(prompt)} tokens and the model's context {len(prompt) + room}")
        sampling = to_sampling(config, room)
        answers = await self._answer(prompt, sampling, config.num_choices or 1)
        output = to_output(self.model_name, len(prompt), answers, sampling, config.max_tokens, p.tokenizer)
        output.time = time.monotonic() - start
        request = {"prompt": p.tokenizer.decode(prompt), "prompt_token_ids": prompt, "sampling": vars(sampling)}
        response = [{"text": a.text, "token_ids": a.token_ids, "finish_reason": a.finish_reason} for a in answers]
        return output, ModelCall.create(request, {"answers": response}, time=output.time)

    async def _answer(self, prompt: list[int], sampling: Sampling, count: int) -> list[Answer]:
        """An answer for each choice. What a choice draws depends on the seed and its number alone."""
        engine = await self._running_engine()
        events: Events = asyncio.Queue()
        name = secrets.token_hex(8)
        requests = [Request(prompt, sampling, f"{name}-{n}", draw=n, stream=False) for n in range(count)]
        for request in requests:
            engine.check(request)
        tickets = [Ticket(request, n, events) for n, request in enumerate(requests)]
        try:
            for ticket in tickets:
                engine.submit(ticket)
            answers: dict[int, Answer] = {}
            while len(answers) < count:
                ticket, event = await events.get()
                if event.answer is not None:
                    if event.answer.error is not None:
                        raise RuntimeError(event.answer.error)
                    answers[ticket.index] = event.answer
        finally:  # a sample that was cancelled frees what it holds
            for ticket in tickets:
                engine.cancel(ticket)
        return [answers[n] for n in range(count)]

    async def _running_engine(self) -> EngineThread:
        """The engine's thread; a new one in another event loop, as of another `eval()` in one process."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            cause = "models of ptst run under asyncio alone"
            raise UserError(cause, "leave INSPECT_ASYNC_BACKEND unset, or set it to asyncio") from None
        if loop is not self._loop:
            self._stop()
            self._loop, self._loading = loop, asyncio.Lock()
        assert self._loading is not None
        async with self._loading:
            if self._decoder is None:
                self._decoder = await asyncio.to_thread(self.arguments.load, self.model)
            if self._engine is None or not self._engine.alive:
                self._engine = EngineThread(await asyncio.to_thread(self._make_engine), self._make_engine, _ignore)
            return self._engine

    def _make_engine(self) -> Engine:
        assert self._decoder is not None
        p = self.model.prompt_format
        options = EngineOptions(self.arguments.batch_size, kv_memory=self.arguments.kv_bytes)
        return Engine(self._decoder, p.stop_ids, options, decode=p.tokenizer.decode_answer)

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def close(self) -> None:
        """Give back the engine's and the model's memory."""
        self._stop()
        self._decoder = None

    def max_connections(self) -> int:
        """As many samples at once as the engine answers in one batch."""
        return self.arguments.batch_size

    def connection_key(self) -> str:
        return self.model_name

    async def count_text_tokens(self, text: str) -> int:
        return len(await self.tokenize(text))

    async def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without the template's words."""
        return self.model.prompt_format.tokenizer.encode(text)


def _ignore() -> None:
    """The engine's thread ended for a failure: all that waited has been answered with it."""
