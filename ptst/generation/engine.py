"""The engine: continuous batching over one KV cache; and `generate`, many prompts in, their answers out.

A step is one forward pass over a packed row of tokens: the newest token of every decoding sequence, and a chunk of the
prompts, so that a long prompt never delays the other answers (chunked prefill). The scheduler plans it (scheduler.py),
the model runner computes it and samples (model_runner.py), the engine takes the tokens and ends answers.

On a GPU the host never waits for a token before it launches the next step: sampled tokens stay on the device and the
host reads them one step late. A sequence that turns out to have ended has then computed one token too many, which is
dropped. On a CPU the host reads tokens at once, and a sequence that decodes alone gets draft tokens (speculative.py).
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ptst.errors import Setting, UserError, Words
from ptst.generation.forward import Forward
from ptst.generation.kv_cache import KVCache, blocks_for, gigabytes, plan_blocks
from ptst.generation.model_runner import ModelRunner, Sampled
from ptst.generation.multi_lora import Adapter
from ptst.generation.request import (
    NOT_A_NUMBER,
    Answer,
    EngineOptions,
    Event,
    Request,
    Sampling,
    Statistics,
    invalid_tokens,
)
from ptst.generation.scheduler import PrefixSequence, RequestSequence, Scheduler
from ptst.generation.speculative import MAX_DRAFT_TOKENS, NUM_EARLIER, draft_tokens
from ptst.generation.stop_strings import Decode, TextStream
from ptst.model.decoder import Decoder

BATCH_SIZE = {"cuda": 256, "cpu": 64}  # where none is asked for


class Engine:
    """Answers requests with a decoder.

    `stop_ids` end an answer. `decode(prompt ids, answer ids)` gives an answer's text; stop strings need it, and with
    `stream` the text of events. A request may bring its own of these three. `adapters` are those that requests may
    name. A step may be interrupted (Ctrl-C) between any two operations; after that the engine cannot be used, the
    decoder can. Raises UserError for settings that do not fit together or the memory."""

    def __init__(
        self,
        decoder: Decoder,
        stop_ids: Iterable[int],
        options: EngineOptions | None = None,
        *,
        decode: Decode | None = None,
        stream: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        options = options or EngineOptions()
        if stream and decode is None:
            raise UserError("streaming text needs `decode`, which turns ids into text")
        on_gpu = decoder.device.type == "cuda"
        self.batch_size = options.batch_size or BATCH_SIZE[decoder.device.type]
        self.max_prefill_tokens = options.max_prefill_tokens
        self.config, self.stop_ids = decoder.config, frozenset(stop_ids)
        self.decode, self.stream = decode, stream
        self.adapters = frozenset(adapters or ())
        self.max_length = min(options.max_length or self.config.max_positions, self.config.max_positions)
        self.forward = Forward(decoder, adapters)
        dtype, device = self.forward.cache_dtype, self.forward.device
        blocks = plan_blocks(self.config, dtype, device, self.batch_size, self.max_length, options.kv_memory)
        self.cache = KVCache(self.config, blocks, dtype, device)
        self.statistics = Statistics()
        self._scheduler = Scheduler(self.cache, self.batch_size, options.prefix_caching, self.statistics)
        self._runner = ModelRunner(self.forward, self.cache, self.batch_size, self.max_length, self.statistics)
        self._in_flight: deque[Sampled] = deque()  # steps whose tokens the host has not read
        self._lag = 1 if on_gpu else 0  # steps that may be in flight when the next one is launched
        self._ids: set[str | int] = set()  # of unfinished requests
        self._events: list[Event] = []
        self._earlier: deque[list[int]] = deque(maxlen=NUM_EARLIER)  # finished sequences, the newest first

    # Requests

    def check(self, request: Request) -> None:
        """Raise UserError if the engine cannot answer this request."""
        sampling, name = request.sampling, f"request {request.id!r}"
        length, V = len(request.prompt) + sampling.max_new_tokens, self.config.vocab_size
        if not request.prompt:
            raise UserError("the prompt has no tokens", where=name)
        if length > self.config.max_positions:
            tokens = f"a prompt of {len(request.prompt)} tokens and {sampling.max_new_tokens} new ones"
            cause = f"{tokens} exceed the model's {self.config.max_positions} positions"
            raise UserError(cause, ("lower ", Setting("max_new_tokens"), " or leave the prompt out"), name)
        if invalid := invalid_tokens(request.prompt, V):
            raise UserError(f"token {invalid[0]} is outside 0..{V - 1}", where=name)
        needed = blocks_for(length)
        if needed > self.cache.num_blocks:
            memory = gigabytes(self.cache.bytes_for(needed))
            remedy: Words = ("raise ", Setting("kv_memory"), f" to {memory} or lower ", Setting("max_new_tokens"))
            if needed > (self.batch_size + 1) * blocks_for(self.max_length):
                remedy = (f"the engine was made for {self.batch_size} x {self.max_length} tokens (max_length)",)
            raise UserError(f"needs {needed} blocks of the KV cache, which has {self.cache.num_blocks}", remedy, name)
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise UserError(f"there is no adapter {request.adapter!r} (known: {known})", where=name)
        if self._decode_of(request) is None and (sampling.stop_strings or request.stream):
            what = "stop strings need" if sampling.stop_strings else "streaming text needs"
            raise UserError(f"{what} `decode`, which turns ids into text", where=name)
        if request.id in self._ids:
            raise UserError("another unfinished request has this id", where=name)

    def add(self, request: Request) -> None:
        """Queue a request. Raises UserError like `check`; other requests are not affected."""
        self.check(request)
        self._ids.add(request.id)
        self._scheduler.add(request)

    def cancel(self, request_id: str | int) -> bool:
        """End a request now; its answer so far comes with the next step. False if there is no such request."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._finish(sequence, "cancelled")
        return sequence is not None

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do for `step`."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._in_flight or self._events)

    # Steps

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass; returns what is new since the last one."""
        start = time.perf_counter()
        for sequence in self._scheduler.admit():
            request, decode = sequence.request, self._decode_of(sequence.request)
            streams = self.stream if request.stream is None else request.stream
            if decode is not None and (streams or request.sampling.stop_strings):
                sequence.stream = TextStream(decode, sequence.prompt, request.sampling.stop_strings)
        launched = self._launch()
        if self._in_flight and (len(self._in_flight) > self._lag or not launched):
            self._collect(self._in_flight.popleft())
        s = self.statistics
        s.steps += 1
        s.blocks_peak = max(s.blocks_peak, self.cache.num_used)
        s.seconds += time.perf_counter() - start
        events, self._events = self._events, []
        s.answers += sum(e.answer is not None for e in events)
        return events

    def run(
        self,
        requests: Iterable[Request],
        on_answer: Callable[[str | int, Answer], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_step: Callable[[Statistics], None] | None = None,
    ) -> None:
        """Answer all requests, which are taken from the iterable only a batch or two ahead.

        Calls `on_event(event)` for each event and `on_answer(request id, answer)` for each answer, and after every
        step `on_step(statistics)`, for a progress line. A request that cannot be answered gets an answer with
        `finish_reason` "error"; the others go on."""
        source: Iterator[Request] | None = iter(requests)
        while source is not None or self.busy:
            while source is not None and len(self._scheduler.waiting) + len(self._events) < 2 * self.batch_size:
                request = next(source, None)
                if request is None:
                    source = None
                    break
                try:
                    self.add(request)
                except UserError as error:
                    self._events.append(Event(request.id, [], "", Answer([], "", "error", error=str(error))))
            for event in self.step():
                if on_event is not None:
                    on_event(event)
                if on_answer is not None and event.answer is not None:
                    on_answer(event.id, event.answer)
            if on_step is not None:
                on_step(self.statistics)

    def _launch(self) -> bool:
        """Start the next step; False if there is nothing to compute."""
        step = self._scheduler.next_step(self.max_prefill_tokens)
        if not step.decode and not step.prefill:
            return False
        if len(step.decode) == 1 and not step.prefill and not self._lag:
            sequence = step.decode[0]
            most = min(MAX_DRAFT_TOKENS, sequence.max_new_tokens - sequence.num_scheduled_tokens - 1)
            step.draft = draft_tokens(sequence.prompt + sequence.answer, most, self._earlier)
        sampled = self._runner.run(step)
        for chunk, _ in step.prefill:
            if isinstance(chunk, PrefixSequence) and chunk.prefilled:
                self.cache.cache_prefix(chunk.table, chunk.prompt, chunk.adapter)
                self._scheduler.remove(chunk)
        if sampled is not None:
            self._in_flight.append(sampled)
        return True

    # Answers

    def _collect(self, sampled: Sampled) -> None:
        """Read the tokens of a step."""
        tokens = sampled.tokens.wait().tolist()
        logprobs = sampled.logprobs.wait().tolist() if sampled.logprobs is not None else [0.0] * len(tokens)
        top_ids, top_values = [copy.wait().tolist() for copy in sampled.top_logprobs or ()] or ([], [])
        for row, (sequence, token) in enumerate(zip(sampled.sequences, tokens, strict=True)):
            if sequence.finished:
                continue
            own = sequence.request.stop_ids
            if token < 0:
                self._finish(sequence, "error", error=NOT_A_NUMBER)
            elif token in (self.stop_ids if own is None else own):
                self._finish(sequence, "stop")
            else:
                if k := sequence.request.sampling.top_logprobs:
                    sequence.top_logprobs.append(list(zip(top_ids[row][:k], top_values[row][:k], strict=True)))
                sequence.logprobs.append(logprobs[row])
                self._append(sequence, token)

    def _append(self, sequence: RequestSequence, token: int) -> None:
        sequence.answer.append(token)
        self.statistics.tokens += 1
        stream = sequence.stream
        if stream is not None and stream.add(token):
            self._finish(sequence, "stop_string", [token])
        elif len(sequence.answer) == sequence.max_new_tokens:
            self._finish(sequence, "length", [token])
        else:
            self._events.append(_event(sequence, [token], stream.new_text(False) if stream else ""))

    def _finish(
        self, sequence: RequestSequence, reason: str, new_tokens: list[int] | None = None, error: str | None = None
    ) -> None:
        sequence.finished = True
        request, stream, token_ids = sequence.request, sequence.stream, sequence.prompt + sequence.answer
        text = new_text = ""
        if stream is not None:
            if reason != "stop_string" and stream.finish():
                reason = "stop_string"  # it was complete but for a character that seemed unfinished
            text, new_text = stream.text, stream.new_text(True)
        elif (decode := self._decode_of(request)) is not None:
            text = decode(sequence.prompt, sequence.answer)
        sampling = request.sampling
        answer = Answer(
            sequence.answer,
            text,
            reason,
            sequence.logprobs if sampling.logprobs else None,
            error,
            sequence.top_logprobs if sampling.top_logprobs else None,
            sequence.num_cached_tokens,
        )
        self._events.append(_event(sequence, new_tokens or [], new_text, answer))
        self._ids.discard(request.id)
        if answer.finish_reason in ("stop", "length", "stop_string"):
            self._earlier.appendleft(token_ids)  # draft tokens from a failed answer might fail, too
            if request.keep_cached:
                self.cache.keep_finished(sequence.table, token_ids[: sequence.num_computed_tokens], sequence.adapter)
        self._scheduler.remove(sequence)

    def _decode_of(self, request: Request) -> Decode | None:
        return request.decode or self.decode


def _event(sequence: RequestSequence, tokens: list[int], text: str, answer: Answer | None = None) -> Event:
    """An event with the log probabilities, as far as they are asked for, of the newest tokens."""
    sampling, first = sequence.request.sampling, len(sequence.answer) - len(tokens)
    logprobs = sequence.logprobs[first:] if sampling.logprobs else None
    top_logprobs = sequence.top_logprobs[first:] if sampling.top_logprobs else None
    return Event(sequence.request.id, tokens, text, answer, logprobs, top_logprobs)


def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    stop_ids: Collection[int],
    sampling: Sampling,
    options: EngineOptions | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Statistics], None] | None = None,
) -> list[Answer]:
    """The answers to a list of prompts (token ids), in order.

        answers = generate(decoder, prompts, stop_ids, Sampling(max_new_tokens=64), decode=tokenizer.decode_answer)
        print(answers[0].text, answers[0].finish_reason)

    `stop_ids` end an answer. Adapters that are attached to the decoder (`load_adapter`) apply; an `Engine` answers with
    several adapters at once. A prompt's id, which with `sampling.seed` determines its random numbers, is its index.
    `decode(prompt ids, answer ids)` gives the answers' text (without it: token ids only). `on_step(statistics)` is
    called after every step, about once per token of an answer.

    Raises UserError, before anything is computed, for an empty prompt and for prompts that with their answers exceed
    the model's context or the memory; the message names the prompt by its index."""
    if not prompts:
        return []
    options = options or EngineOptions()
    length = max(map(len, prompts)) + sampling.max_new_tokens
    batch_size = min(options.batch_size or BATCH_SIZE[decoder.device.type], len(prompts))
    options = replace(options, batch_size=batch_size, max_length=options.max_length or length)
    engine = Engine(decoder, stop_ids, options, decode=decode)
    requests = [Request(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.check(request)
    answers: dict[str | int, Answer] = {}
    engine.run(requests, answers.__setitem__, on_step=on_step)
    return [answers[i] for i in range(len(prompts))]
