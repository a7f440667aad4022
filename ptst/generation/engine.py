"""The engine: requests enter as others finish, over one key/value cache.

A step is one forward pass over a flat row: one token of every request that is being answered, and a piece of the prompts
that are being read, at most `prefill_tokens` of them, so that a long prompt never holds the answers up. What several
waiting prompts begin with is computed once and stored.

A request is admitted when the most it may need is free (prompt and `max_new_tokens`), so none is ever thrown out again.
Of the requests in view the longest goes first: the last ones to run are then short, and the batch stays full.

On a GPU the host never waits for a token before it launches the next step: sampled tokens stay on the device, and what
they were is looked at one step late. A request that turns out to have ended has then made one token too many, which is
dropped.

Shapes: T rows of a step, R requests being answered, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ptst.generation.adapters import Adapter
from ptst.generation.attend import StepAttention
from ptst.generation.cache import BlockList, Cache, blocks_for, common
from ptst.generation.forward import Forward
from ptst.generation.memory import plan_memory
from ptst.generation.request import Completion, Event, Request, Statistics
from ptst.generation.sampling import draw, log_probabilities
from ptst.generation.stop import Decode, TextStream
from ptst.model.decoder import Decoder

SHORTEST_SHARED = 32  # a common beginning of fewer tokens is not worth storing
PATIENCE = 64  # admissions that may pass a request for which there is not enough room; then all wait for it


@dataclass(eq=False)
class _Run:
    """A request on its way, or (without a request) a common beginning that is computed to be stored."""

    request: Request | None
    prompt: list[int]
    adapter: str | None
    limit: int = 0  # new tokens at most
    order: int = 0
    passed: int = 0  # times a younger request was admitted before it
    blocks: BlockList | None = None
    slot: int = 0  # its place among the newest tokens on the device
    computed: int = 0  # tokens whose keys and values are stored
    launched: int = 0  # new tokens asked for
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stream: TextStream | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        if self.request is not None:
            self.random = self.request.sampling.generator(self.request.id)
            self.limit = self.request.sampling.max_new_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.prompt)


class Engine:
    """Answers requests over a decoder.

    `stop_ids` end an answer. `kv_memory` is what the cache may take, in bytes (left out: see `plan_memory`).
    `decode(prompt ids, answer ids)` gives an answer's text: needed for stop strings, and with `stream` for the text of
    events. `adapters` are those that requests may name. `max_length` is the longest prompt with its answer to be expected
    (left out: the model's context). `share` may be turned off to compute every prompt in full.
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
            raise ValueError(f"--batch-size is {self.max_batch}; it must be at least 1")
        if prefill_tokens < 1:
            raise ValueError(f"a step of {prefill_tokens} prompt tokens gets nowhere; at least 1 is needed")
        if stream and decode is None:
            raise ValueError("streaming text needs `decode`, which turns ids into text")
        self.config, self.stop_ids = decoder.config, frozenset(stop_ids)
        self.prefill_tokens, self.decode, self.stream, self.share = prefill_tokens, decode, stream, share
        self.forward = Forward(decoder, adapters)
        self.adapters = frozenset(adapters or ())
        dtype, device = self.forward.dtype, self.forward.device
        length = min(max_length or self.config.max_positions, self.config.max_positions)
        self.cache = Cache(
            self.config, plan_memory(self.config, dtype, device, self.max_batch, length, kv_memory), dtype, device
        )
        self.statistics = Statistics(blocks=self.cache.blocks)
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        self._ids: set[str | int] = set()
        self._arrived = 0
        self._free_slots = list(range(self.max_batch))
        self._newest = torch.zeros(self.max_batch + 1, dtype=torch.long, device=self.forward.device)
        self._in_flight: deque[tuple[list[_Run], Tensor, Tensor | None, torch.cuda.Event | None]] = deque()
        self._late = 1 if on_gpu else 0  # steps after which tokens are looked at
        self._events: list[Event] = []

    # What comes in

    def check(self, request: Request) -> None:
        """Raise ValueError, naming the request, for one that cannot be answered."""
        s, what = request.sampling, f"request {request.id!r}"
        if not request.prompt:
            raise ValueError(f"{what}: the prompt has no tokens, so nothing can follow it")
        room, V = self.config.max_positions, self.config.vocab_size
        if len(request.prompt) + s.max_new_tokens > room:
            raise ValueError(
                f"{what}: a prompt of {len(request.prompt)} tokens and {s.max_new_tokens} new ones exceed the model's "
                f"{room} positions; lower --max-new-tokens or leave it out"
            )
        if not all(0 <= t < V for t in request.prompt):
            raise ValueError(f"{what}: token {next(t for t in request.prompt if not 0 <= t < V)} is outside 0..{V - 1}")
        needed = blocks_for(len(request.prompt) + s.max_new_tokens)
        if needed > self.cache.blocks:
            raise ValueError(
                f"{what} needs {needed} blocks of the key/value cache and there are {self.cache.blocks}; raise "
                f"--kv-memory to {self.cache.bytes_for(needed)} bytes or lower --max-new-tokens"
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise ValueError(f"{what}: there is no adapter {request.adapter!r} here ({known})")
        if s.stop_strings and self.decode is None:
            raise ValueError(f"{what}: stop strings need `decode`, which turns ids into text")
        if request.id in self._ids:
            raise ValueError(f"{what}: a request of this id is still here")

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError as `check`; the others go on."""
        self.check(request)
        self._ids.add(request.id)
        self._arrived += 1
        self._waiting.append(_Run(request, list(request.prompt), request.adapter, order=self._arrived))

    def cancel(self, request_id: str | int) -> bool:
        """End a request where it stands; its completion comes with the next step. False if it is not here."""
        for run in (*self._waiting, *self._running):
            if run.request is not None and run.request.id == request_id:
                if run.blocks is None:
                    self._waiting.remove(run)
                self._end(run, "cancelled")
                return True
        return False

    @property
    def busy(self) -> bool:
        """Whether a further step would do something."""
        return bool(self._waiting or self._running or self._in_flight or self._events)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # A step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass; what is new since the last one."""
        began = time.perf_counter()
        self._admit()
        rows = self._rows()
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
        s.answers += sum(e.completion is not None for e in events)
        return events

    def run(
        self,
        requests: Iterable[Request],
        on_done: Callable[[str | int, Completion], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Answer requests, which are taken from the iterable only a batch or two ahead. One that cannot be answered gets
        a completion with `reason` error; the others go on."""
        source: Iterator[Request] | None = iter(requests)
        while source is not None or self.busy:
            while source is not None and len(self._waiting) < 2 * self.max_batch:
                request = next(source, None)
                if request is None:
                    source = None
                    break
                try:
                    self.add(request)
                except ValueError as error:
                    completion = Completion([], False, "error", error=str(error))
                    self._events.append(Event(request.id, [], "", completion))
            for event in self.step():
                if on_event is not None:
                    on_event(event)
                if on_done is not None and event.completion is not None:
                    on_done(event.id, event.completion)

    # Admission

    def _admit(self) -> None:
        """Give waiting requests their places: the longest first, where there is room for all it may need."""
        if not self._waiting or not self._free_slots:
            return
        view = list(islice(self._waiting, 2 * self.max_batch))
        stuck = next((r for r in view if r.passed > PATIENCE), None)
        queue = [stuck] if stuck else sorted(view, key=lambda r: (-len(r.prompt) - r.limit, r.order))
        passed: list[_Run] = []
        for run in queue:
            if not self._free_slots:
                break
            if self._held(run):
                continue
            stored, length = self.cache.match(run.prompt, run.adapter) if self.share else (None, 0)
            if self.share and not stuck and self._store_beginning(run, length, view):
                continue
            blocks = self.cache.admit(len(run.prompt) + run.limit, stored, length)
            if blocks is None and stored is not None and not self._running:
                stored, length = None, 0  # even what is stored must give way
                blocks = self.cache.admit(len(run.prompt) + run.limit)
            if blocks is None:
                passed.append(run)
                continue
            self._waiting.remove(run)
            self._start(run, blocks, length)
            self.statistics.saved_tokens += length
            for other in passed:
                other.passed += 1

    def _start(self, run: _Run, blocks: BlockList, length: int) -> None:
        run.blocks, run.computed = blocks, length
        if run.request is not None:
            run.slot = self._free_slots.pop()
            if self.decode is not None and (self.stream or run.request.sampling.stop_strings):
                run.stream = TextStream(self.decode, run.prompt, run.request.sampling.stop_strings)
        self._running.append(run)

    def _held(self, run: _Run) -> bool:
        """Whether the beginning of this prompt is being computed at the moment."""
        return any(
            r.request is None and r.adapter == run.adapter and run.prompt[: len(r.prompt)] == r.prompt
            for r in self._running
        )

    def _store_beginning(self, run: _Run, known: int, view: list[_Run]) -> bool:
        """If this prompt and other waiting ones begin alike, beyond the `known` tokens that are stored, compute that
        beginning first. The length is the one that saves most tokens."""
        lengths = sorted(
            n
            for other in view
            if other is not run and not other.blocks and other.adapter == run.adapter
            if (n := min(common(run.prompt, other.prompt), len(run.prompt) - 1, len(other.prompt) - 1))
            >= known + SHORTEST_SHARED
        )
        if not lengths:
            return False
        best = max(range(len(lengths)), key=lambda i: (lengths[i] - known) * (len(lengths) - i))
        beginning = run.prompt[: lengths[best]]
        stored, length = self.cache.match(beginning, run.adapter)
        # Room for the beginning and for the request that it is for: else it would only be in the way.
        blocks = self.cache.admit(len(beginning), stored, length)
        if blocks is None:
            return False
        self._start(_Run(None, beginning, run.adapter), blocks, length)
        return True

    # Rows of a step

    def _rows(self) -> list[tuple[_Run, int]]:
        """(request, tokens) of the next forward pass: answers first, then prompts in the order of admission."""
        rows = [(r, 1) for r in self._running if r.decoding and r.launched < r.limit]
        room = self.prefill_tokens
        for run in self._running:
            if room and not run.decoding:
                n = min(room, len(run.prompt) - run.computed)
                rows.append((run, n))
                room -= n
        return rows

    def _launch(self, rows: list[tuple[_Run, int]]) -> None:
        decoding = [run for run, _ in rows if run.decoding]
        reading = [(run, n) for run, n in rows if not run.decoding]
        for run, n in rows:
            self.cache.grow(run.blocks, run.computed + n)
        if not self.forward.device.type == "cuda" and self.cache.highest > 1.25 * self.cache.used + 8:
            self.cache.compact([r.blocks for r in self._running])
        device = self.forward.device
        prompt_tokens = [t for run, n in reading for t in run.prompt[run.computed : run.computed + n]]
        tokens_T = torch.tensor(prompt_tokens, dtype=torch.long, device=device)
        if decoding:
            slots_R = torch.tensor([r.slot for r in decoding], device=device)
            tokens_T = torch.cat((self._newest[slots_R].clamp_(min=0), tokens_T))
        positions = [r.computed for r in decoding] + [p for r, n in reading for p in range(r.computed, r.computed + n)]
        positions_T = torch.tensor(positions, device=device)
        attend = StepAttention(
            self.cache,
            [(r.blocks, r.computed + 1) for r in decoding],
            [(r.blocks, r.computed, n) for r, n in reading],
            self.config,
        )
        hidden_TE = self.forward(tokens_T, positions_T, attend, self._adapter_rows(rows, device))
        last, asking, at = [], [], 0
        for run, n in rows:
            at += n
            run.computed += n
            if run.decoding and run.request is not None:
                last.append(at - 1)
                asking.append(run)
        self.statistics.prompt_tokens += len(prompt_tokens)
        for run, _ in reading:
            if run.decoding and run.request is None:
                self.cache.keep(run.blocks, run.prompt, run.adapter)
                self.cache.release(run.blocks)
                self._running.remove(run)
        if asking:
            self._sample(
                hidden_TE if len(last) == len(hidden_TE) else hidden_TE[torch.tensor(last, device=device)], asking
            )

    def _sample(self, hidden_NE: Tensor, runs: list[_Run]) -> None:
        logits_NV = self.forward.logits(hidden_NE)
        samplings = [r.request.sampling for r in runs]
        # One number for every token, drawn whether it is needed or not: the n-th token's is always the n-th.
        uniforms = [r.random.random() if s.temperature else 0.0 for r, s in zip(runs, samplings, strict=True)]
        tokens_N = draw(logits_NV, samplings, uniforms)
        logprobs_N = log_probabilities(logits_NV, tokens_N) if any(s.logprobs for s in samplings) else None
        self._newest[torch.tensor([r.slot for r in runs], device=tokens_N.device)] = tokens_N
        for run in runs:
            run.launched += 1
        self._in_flight.append((runs, *_to_host(tokens_N, logprobs_N)))

    def _adapter_rows(
        self, rows: list[tuple[_Run, int]], device: torch.device
    ) -> list[tuple[str | None, Tensor | None]]:
        """Which rows go through which adapter."""
        by_name: dict[str | None, list[int]] = {}
        at = 0
        for run, n in rows:
            by_name.setdefault(run.adapter, []).extend(range(at, at + n))
            at += n
        if len(by_name) == 1:
            return [(next(iter(by_name)), None)]
        return [(name, torch.tensor(at, device=device)) for name, at in by_name.items() if name in self.forward.thin]

    # What comes out

    def _collect(
        self, runs: list[_Run], tokens: Tensor, logprobs: Tensor | None, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        told = logprobs.tolist() if logprobs is not None else [0.0] * len(runs)
        for run, token, logprob in zip(runs, tokens.tolist(), told, strict=True):
            if run.ended:
                continue
            if token < 0:
                self._end(run, "error", error="the model's output is not a number")
            elif token in self.stop_ids:
                self._end(run, "stop")
            else:
                self._take(run, token, logprob)

    def _take(self, run: _Run, token: int, logprob: float) -> None:
        run.answer.append(token)
        run.logprobs.append(logprob)
        self.statistics.tokens += 1
        if run.stream is not None and run.stream.add(token):
            self._end(run, "stop_string", [token])
        elif len(run.answer) == run.limit:
            self._end(run, "length", [token])
        else:
            self._events.append(Event(run.request.id, [token], run.stream.news(False) if run.stream else ""))

    def _end(self, run: _Run, reason: str, tokens: list[int] | None = None, error: str | None = None) -> None:
        run.ended = True
        request, text = run.request, None
        if run.stream is not None:
            if reason != "stop_string" and run.stream.finish():
                reason = "stop_string"  # it was complete but for a character that looked unfinished
            text = run.stream.text
        elif self.decode is not None:
            text = self.decode(run.prompt, run.answer)
        logprobs = run.logprobs if request.sampling.logprobs else None
        completion = Completion(run.answer, reason == "length", reason, text, logprobs, error)
        self._events.append(Event(request.id, tokens or [], run.stream.news(True) if run.stream else "", completion))
        self._ids.discard(request.id)
        if run.blocks is None:
            return
        if request.keep and reason in ("stop", "length", "stop_string"):
            self.cache.keep(run.blocks, (run.prompt + run.answer)[: run.computed], run.adapter)
        # On a GPU a step that still writes here may be under way; whoever gets the blocks next writes after it.
        self.cache.release(run.blocks)
        self._running.remove(run)
        self._free_slots.append(run.slot)


def _to_host(tokens_N: Tensor, logprobs_N: Tensor | None) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
    """Both on the host, and on a GPU what to wait for until they are."""
    if not tokens_N.is_cuda:
        return tokens_N, logprobs_N, None
    out = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        for x in (tokens_N, logprobs_N)
    ]
    arrived = torch.cuda.Event()
    arrived.record()
    return (*out, arrived)
