"""The engine: requests enter as others finish, over one key/value cache.

A step is one forward pass over a flat row: one token of every request that is being answered, and a piece of the
prompts that are being read, at most `prefill_tokens` of them, so that a long prompt never holds the answers up. A
request is admitted when the most it may need is free (prompt and `max_new_tokens`), so none is ever thrown out again.

On a GPU the host never waits for a token before it launches the next step: sampled tokens stay on the device, and what
they were is looked at one step late. A request that turns out to have ended has then made one token too many, which is
dropped. On a CPU tokens are looked at at once, and a request that is answered alone gets guesses (draft.py).

Shapes: T rows of a step, N of them with a token to draw, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.generation.adapters import Adapter
from ptst.generation.attend import StepAttention
from ptst.generation.cache import Cache, blocks_for, common
from ptst.generation.device import Fetch, send
from ptst.generation.draft import DRAFT, EARLIER, draft
from ptst.generation.forward import Forward
from ptst.generation.graphs import DecodeGraphs
from ptst.generation.memory import gigabytes, plan_memory, workspace_bytes
from ptst.generation.request import Answer, Event, Request, Statistics, outside
from ptst.generation.sampling import draw, log_probabilities
from ptst.generation.schedule import Run, Scheduler
from ptst.generation.stop import Decode, TextStream
from ptst.model.decoder import Decoder


class Engine:
    """Answers requests over a decoder.

    `stop_ids` end an answer. `kv_memory` is what the cache may take, in bytes (left out: see `plan_memory`).
    `decode(prompt ids, answer ids)` gives an answer's text: needed for stop strings, and with `stream` for the text of
    events. `adapters` are those that requests may name. `max_length` is the longest prompt with its answer to be
    expected (left out: the model's context); the memory is planned for `max_batch` of these and one beginning, and a
    request that does not fit into that is refused. `share` may be turned off to compute every prompt in full.
    `planned_bytes` is what it will take, weights not counted. Raises UserError for values that cannot be meant.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_ids: Iterable[int],
        *,
        max_batch: int | None = None,
        kv_memory: int | None = None,
        prefill_tokens: int = 512,
        decode: Decode | None = None,
        stream: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
        max_length: int | None = None,
        share: bool = True,
    ):
        on_gpu = decoder.device.type == "cuda"
        self.max_batch = max_batch if max_batch is not None else 256 if on_gpu else 64
        if self.max_batch < 1:
            raise UserError(f"--batch-size is {self.max_batch}; it must be at least 1")
        if prefill_tokens < 1:
            raise UserError(f"a step of {prefill_tokens} prompt tokens gets nowhere; at least 1 is needed")
        if stream and decode is None:
            raise UserError("streaming text needs `decode`, which turns ids into text")
        self.config, self.stop_ids = decoder.config, frozenset(stop_ids)
        self.prefill_tokens, self.decode, self.stream = prefill_tokens, decode, stream
        self.forward = Forward(decoder, adapters)
        self.adapters = frozenset(adapters or ())
        dtype, device = self.forward.cache_dtype, self.forward.device
        length = min(max_length or self.config.max_positions, self.config.max_positions)
        self.max_length = length
        blocks = plan_memory(self.config, dtype, device, self.max_batch, length, kv_memory)
        self.cache = Cache(self.config, blocks, dtype, device)
        work = workspace_bytes(self.config, self.forward.dtype, prefill_tokens + self.max_batch, self.max_batch)
        self.planned_bytes = self.cache.bytes_for(blocks) + work
        self.statistics = Statistics(blocks=blocks)
        self._schedule = Scheduler(self.cache, self.max_batch, share, self.statistics)
        self._ids: set[str | int] = set()
        self._newest = torch.zeros(self.max_batch + 1, dtype=torch.long, device=device)
        self._in_flight: deque[tuple[list[Run], Fetch]] = deque()
        self._late = 1 if on_gpu else 0  # steps after which tokens are looked at
        self._graphs = DecodeGraphs(self.forward, self.cache, self._newest, length) if on_gpu else None
        self._events: list[Event] = []
        self._earlier: deque[list[int]] = deque(maxlen=EARLIER)  # what was said, the newest first

    # What comes in

    def check(self, request: Request) -> None:
        """Raise UserError, naming the request, for one that cannot be answered."""
        s, what = request.sampling, f"request {request.id!r}"
        if not request.prompt:
            raise UserError(f"{what}: the prompt has no tokens, so nothing can follow it")
        room, V = self.config.max_positions, self.config.vocab_size
        if len(request.prompt) + s.max_new_tokens > room:
            raise UserError(
                f"{what}: a prompt of {len(request.prompt)} tokens and {s.max_new_tokens} new ones exceed the model's "
                f"{room} positions; lower --max-new-tokens or leave it out"
            )
        if wrong := outside(request.prompt, V):
            raise UserError(f"{what}: token {wrong[0]} is outside 0..{V - 1}")
        needed = blocks_for(len(request.prompt) + s.max_new_tokens)
        if needed > self.cache.blocks:
            mend = f"raise --kv-memory to {gigabytes(self.cache.bytes_for(needed))} or lower --max-new-tokens"
            if needed > (self.max_batch + 1) * blocks_for(self.max_length):
                mend = f"the engine was made for {self.max_batch} x {self.max_length} tokens (max_length)"
            raise UserError(
                f"{what} needs {needed} blocks of the key/value cache and there are {self.cache.blocks}; {mend}"
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise UserError(f"{what}: there is no adapter {request.adapter!r} here ({known})")
        if s.stop_strings and self.decode is None:
            raise UserError(f"{what}: stop strings need `decode`, which turns ids into text")
        if request.id in self._ids:
            raise UserError(f"{what}: a request of this id is still here")

    def add(self, request: Request) -> None:
        """Queue a request. Raises UserError as `check`; the others go on."""
        self.check(request)
        self._ids.add(request.id)
        self._schedule.add(request)

    def cancel(self, request_id: str | int) -> bool:
        """End a request where it stands; its answer comes with the next step. False if it is not here."""
        run = self._schedule.find(request_id)
        if run is not None:
            self._end(run, "cancelled")
        return run is not None

    @property
    def busy(self) -> bool:
        """Whether a further step would do something."""
        return bool(self.waiting or self._schedule.running or self._in_flight or self._events)

    @property
    def waiting(self) -> int:
        return len(self._schedule.waiting)

    # A step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass; what is new since the last one."""
        began = time.perf_counter()
        for run in self._schedule.admit():
            if self.decode is not None and (self.stream or run.request.sampling.stop_strings):
                run.stream = TextStream(self.decode, run.prompt, run.request.sampling.stop_strings)
        rows = self._schedule.rows(self.prefill_tokens)
        if rows:
            self._launch(rows)
        if self._in_flight and (len(self._in_flight) > self._late or not rows):
            self._collect(*self._in_flight.popleft())
        s = self.statistics
        s.steps += 1
        s.blocks_used = self.cache.used
        s.blocks_peak = max(s.blocks_peak, s.blocks_used)
        s.seconds += time.perf_counter() - began
        events, self._events = self._events, []
        s.answers += sum(e.answer is not None for e in events)
        return events

    def run(
        self,
        requests: Iterable[Request],
        on_done: Callable[[str | int, Answer], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Answer requests, which are taken from the iterable only a batch or two ahead. One that cannot be answered
        gets an answer with `finish_reason` "error"; the others go on."""
        source: Iterator[Request] | None = iter(requests)
        while source is not None or self.busy:
            while source is not None and self.waiting + len(self._events) < 2 * self.max_batch:
                request = next(source, None)
                if request is None:
                    source = None
                    break
                try:
                    self.add(request)
                except ValueError as error:
                    answer = Answer([], "", "error", error=str(error))
                    self._events.append(Event(request.id, [], "", answer))
            for event in self.step():
                if on_event is not None:
                    on_event(event)
                if on_done is not None and event.answer is not None:
                    on_done(event.id, event.answer)

    # A forward pass

    def _launch(self, rows: list[tuple[Run, int]]) -> None:
        guesses: list[int] = []
        if len(rows) == 1 and rows[0][0].decoding and not self._late:
            run = rows[0][0]
            most = min(DRAFT, run.limit - run.launched - 1)
            guesses = draft(run.prompt + run.answer, most, self._earlier)
            rows = [(run, 1 + len(guesses))]
        for run, n in rows:
            self.cache.grow(run.blocks, run.computed + n)
        decoding = [run for run, _ in rows if run.decoding]
        asking, logits_NV = self._graph_step(decoding) if len(decoding) == len(rows) else (None, None)
        if logits_NV is None:
            asking, logits_NV = self._eager_step(rows, guesses)
        for run, n in rows:
            run.computed += n
            if run.request is None and run.decoding:  # a shared prefix, whole
                self.cache.keep(run.blocks, run.prompt, run.adapter)
                self._schedule.remove(run)
        if asking:
            self._sample(asking, guesses, logits_NV)

    def _graph_step(self, runs: list[Run]) -> tuple[list[Run], Tensor | None]:
        """A step of decoding alone as one launch, where that is possible."""
        if self._graphs is None or len({r.adapter for r in runs}) > 1:
            return runs, None
        places = ([r.slot for r in runs], [r.computed for r in runs], [r.blocks.blocks for r in runs])
        return runs, self._graphs.logits(*places, runs[0].adapter)

    def _eager_step(self, rows: list[tuple[Run, int]], guesses: list[int]) -> tuple[list[Run], Tensor | None]:
        """Any step: the runs that get a token (one with guesses several times), and their logits (N, V)."""
        device = self.forward.device
        decoding = [run for run, _ in rows if run.decoding]
        reading = [(run, n) for run, n in rows if not run.decoding]
        read = guesses + [t for run, n in reading for t in run.prompt[run.computed : run.computed + n]]
        self.statistics.prompt_tokens += len(read) - len(guesses)
        tokens_T = send(read, device, torch.long)
        if decoding:
            newest_R = self._newest[send([r.slot for r in decoding], device)].clamp_(min=0)
            tokens_T = torch.cat((newest_R, tokens_T))
        positions_T = send([p for run, n in rows for p in range(run.computed, run.computed + n)], device)
        attend = StepAttention(
            self.cache,
            [(r.blocks, r.computed + 1 + j) for r, n in rows if r.decoding for j in range(n)],
            [(r.blocks, r.computed, n) for r, n in reading],
            self.config,
        )
        hidden_TE = self.forward(tokens_T, positions_T, attend, self._adapter_rows(rows))
        places, asking, at = [], [], 0
        for run, n in rows:
            if run.decoding:
                places += range(at, at + n)
                asking += [run] * n
            elif run.computed + n == len(run.prompt) and run.request is not None:
                places.append(at + n - 1)
                asking.append(run)
            at += n
        if not asking:
            return [], None
        return asking, self.forward.logits(hidden_TE[send(places, device)] if len(places) < at else hidden_TE)

    def _adapter_rows(self, rows: list[tuple[Run, int]]) -> list[tuple[str | None, Tensor | None]]:
        """Which rows go through which adapter."""
        by_name: dict[str | None, list[int]] = {}
        at = 0
        for run, n in rows:
            by_name.setdefault(run.adapter, []).extend(range(at, at + n))
            at += n
        if len(by_name) == 1:
            return [(next(iter(by_name)), None)]
        device = self.forward.device
        return [(name, send(places, device)) for name, places in by_name.items() if name in self.forward.thin]

    def _sample(self, asking: list[Run], guesses: list[int], logits_NV: Tensor) -> None:
        samplings = [r.request.sampling for r in asking]
        uniforms = []
        for run, sampling in zip(asking, samplings, strict=True):
            uniforms.append(run.uniform(run.launched) if sampling.temperature else 0.0)
            run.launched += 1
        tokens_N = draw(logits_NV, samplings, uniforms)
        logprobs_N = log_probabilities(logits_NV, tokens_N) if any(s.logprobs for s in samplings) else None
        if guesses:
            # The first token that is not as guessed is the last that counts.
            right = common(guesses, tokens_N.tolist())
            run, wrong = asking[0], len(guesses) - right
            run.launched -= wrong
            run.computed -= wrong
            asking, tokens_N = asking[: right + 1], tokens_N[: right + 1]
            logprobs_N = None if logprobs_N is None else logprobs_N[: right + 1]
            self._newest[run.slot] = tokens_N[-1]
        else:
            self._newest[send([r.slot for r in asking], tokens_N.device)] = tokens_N
        self._in_flight.append((asking, Fetch(tokens_N, logprobs_N)))

    # What comes out

    def _collect(self, asking: list[Run], fetch: Fetch) -> None:
        tokens, logprobs = fetch.get()
        told = logprobs.tolist() if logprobs is not None else [0.0] * len(asking)
        for run, token, logprob in zip(asking, tokens.tolist(), told, strict=True):
            if run.ended:
                continue
            if token < 0:
                self._end(run, "error", error="the model's output is not a number")
            elif token in self.stop_ids:
                self._end(run, "stop")
            else:
                self._take(run, token, logprob)

    def _take(self, run: Run, token: int, logprob: float) -> None:
        run.answer.append(token)
        run.logprobs.append(logprob)
        self.statistics.tokens += 1
        if run.stream is not None and run.stream.add(token):
            self._end(run, "stop_string", [token])
        elif len(run.answer) == run.limit:
            self._end(run, "length", [token])
        else:
            self._events.append(Event(run.request.id, [token], run.stream.news(False) if run.stream else ""))

    def _end(self, run: Run, reason: str, tokens: list[int] | None = None, error: str | None = None) -> None:
        run.ended = True
        request, text = run.request, ""
        if run.stream is not None:
            if reason != "stop_string" and run.stream.finish():
                reason = "stop_string"  # it was complete but for a character that looked unfinished
            text = run.stream.text
        elif self.decode is not None:
            text = self.decode(run.prompt, run.answer)
        logprobs = run.logprobs if request.sampling.logprobs else None
        answer = Answer(run.answer, text, reason, logprobs, error)
        self._events.append(Event(request.id, tokens or [], run.stream.news(True) if run.stream else "", answer))
        self._ids.discard(request.id)
        whole = reason in ("stop", "length", "stop_string")
        if whole:  # a guess from a text that failed might fail, too
            self._earlier.appendleft(run.prompt + run.answer)
        if run.blocks is not None and request.keep and whole:
            self.cache.keep(run.blocks, (run.prompt + run.answer)[: run.computed], run.adapter)
        self._schedule.remove(run)
