"""Who runs: requests wait here, are admitted when there is room for all they may need, and give their room back.

Of the requests in view the longest goes first: the last ones to run are then short, and the batch stays full. What
several waiting prompts begin with is computed first, by a run of its own, and stored; they wait for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from ptst.generation.cache import BLOCK, BlockList, Cache, blocks_for, common
from ptst.generation.request import Request, Statistics
from ptst.generation.stop import TextStream

SHORTEST_SHARED = 32  # a shared prefix of fewer tokens is not worth storing
PATIENCE = 64  # later arrivals that may be admitted before a request; then it is the next, and all wait for its room


@dataclass(eq=False)
class Run:
    """A request on its way, or (without a request) a shared prefix that is computed to be stored."""

    request: Request | None
    prompt: list[int]
    adapter: str | None
    order: int = 0
    passed: int = 0  # requests that were admitted although this one had come before them
    blocks: BlockList | None = None
    slot: int = 0  # its place among the newest tokens on the device
    computed: int = 0  # tokens whose keys and values are stored
    launched: int = 0  # new tokens asked for
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stream: TextStream | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.limit = self.request.sampling.max_new_tokens if self.request else 0
        self._random = self.request.sampling.generator(self.request.id) if self.request else None
        self._uniforms: list[float] = []

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.prompt)

    def uniform(self, index: int) -> float:
        """The random number of the answer's token `index`, whenever it is asked for."""
        while len(self._uniforms) <= index:
            self._uniforms.append(self._random.random())
        return self._uniforms[index]


class Scheduler:
    """The waiting and the running, over one cache."""

    def __init__(self, cache: Cache, max_batch: int, share: bool, statistics: Statistics):
        self.cache, self.max_batch, self.share, self.statistics = cache, max_batch, share, statistics
        self.waiting: deque[Run] = deque()
        self.running: list[Run] = []
        self.free_slots = list(range(max_batch))
        self._arrived = 0
        self._fruitless: tuple[int, ...] | None = None  # how things stood after nothing could be admitted

    def add(self, request: Request) -> None:
        self._arrived += 1
        self.waiting.append(Run(request, list(request.prompt), request.adapter, order=self._arrived))

    def find(self, request_id: str | int) -> Run | None:
        runs = (r for r in (*self.running, *self.waiting) if r.request is not None)
        return next((r for r in runs if r.request.id == request_id), None)

    def remove(self, run: Run) -> None:
        """Take a run out, wherever it is; what it held is free."""
        if run.blocks is None:
            self.waiting.remove(run)
            return
        # On a GPU a step that still writes here may be under way; whoever gets the blocks next writes after it.
        self.cache.release(run.blocks)
        self.running.remove(run)
        if run.request is not None:
            self.free_slots.append(run.slot)

    def admit(self) -> list[Run]:
        """Give waiting requests their places; returns those that got one."""
        if not self.waiting or not self.free_slots or self._standing() == self._fruitless:
            return []
        view = list(islice(self.waiting, 2 * self.max_batch))
        overdue = [r for r in view if r.passed > PATIENCE]
        rest = [r for r in view if r.passed <= PATIENCE]
        admitted: list[Run] = []
        for run in [*overdue, *sorted(rest, key=lambda r: (-len(r.prompt) - r.limit, r.order))]:
            if not self.free_slots:
                break
            if self._held(run):
                continue
            stored, length = self.cache.match(run.prompt, run.adapter) if self.share else (None, 0)
            if length < SHORTEST_SHARED:  # not worth keeping it from making room
                stored, length = None, 0
            most = len(run.prompt) + run.limit
            # A beginning only for whom there is room beside it (its last block is copied): else beginnings would drive
            # each other out, and nobody would come in.
            fits = blocks_for(most) + 1 - length // BLOCK <= self.cache.room(stored)
            if self.share and fits and self._store_beginning(run, length, view):
                continue
            blocks = self.cache.admit(most, stored, length)
            if blocks is None and stored is not None and not self.running:
                length = 0  # even what is stored must give way
                blocks = self.cache.admit(most)
            if blocks is None:
                if run.passed > PATIENCE:
                    break
                continue
            self.waiting.remove(run)
            run.slot = self.free_slots.pop()
            self._start(run, blocks, length)
            self.statistics.saved_tokens += length
            admitted.append(run)
        for run in view:
            if run.blocks is None:
                run.passed += sum(a.order > run.order for a in admitted)
        self._fruitless = None if admitted else self._standing()
        return admitted

    def _standing(self) -> tuple[int, ...]:
        """What decides whether a waiting request can be admitted."""
        return self._arrived, len(self.waiting), len(self.running), len(self.cache.stored), self.cache.available

    def _start(self, run: Run, blocks: BlockList, length: int) -> None:
        run.blocks, run.computed = blocks, length
        self.running.append(run)

    def _held(self, run: Run) -> bool:
        """Whether the beginning of this prompt is being computed at the moment."""
        return any(
            r.request is None and r.adapter == run.adapter and run.prompt[: len(r.prompt)] == r.prompt
            for r in self.running
        )

    def _store_beginning(self, run: Run, known: int, view: list[Run]) -> bool:
        """If this prompt and others in view begin alike, beyond the `known` tokens that are stored, compute that
        beginning first. Its length is the one that saves most."""
        lengths = sorted(
            n
            for other in view
            if other is not run and other.blocks is None and other.adapter == run.adapter
            if (n := min(common(run.prompt, other.prompt), len(run.prompt) - 1, len(other.prompt) - 1))
            >= known + SHORTEST_SHARED
        )
        if not lengths:
            return False
        best = max(range(len(lengths)), key=lambda i: (lengths[i] - known) * (len(lengths) - i))
        beginning = run.prompt[: lengths[best]]
        stored, length = self.cache.match(beginning, run.adapter)
        blocks = self.cache.admit(len(beginning), stored, length)
        if blocks is None:
            return False
        self._start(Run(None, beginning, run.adapter), blocks, length)
        return True

    def rows(self, prefill_tokens: int) -> list[tuple[Run, int]]:
        """(run, tokens) of the next forward pass: answers first, then prompts in the order of admission."""
        rows = [(r, 1) for r in self.running if r.decoding and r.launched < r.limit]
        for run in self.running:
            if prefill_tokens and not run.decoding:
                n = min(prefill_tokens, len(run.prompt) - run.computed)
                rows.append((run, n))
                prefill_tokens -= n
        return rows
