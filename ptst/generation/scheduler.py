"""The scheduler: which waiting requests are admitted, and what each step computes.

Admission reserves the most memory that a sequence may need, so an admitted sequence is never preempted. Of the first
requests in the queue the longest is admitted first: the sequences that run last are then short, and the batch stays
full. A request that was bypassed `MAX_BYPASSED` times is next, and all others wait until it fits. A prefix that several
waiting prompts share is computed once, by a `PrefixSequence`; these prompts wait until it is in the prefix cache.

Life of a `RequestSequence`:  waiting -> (admit) -> prefill, `max_prefill_tokens` a step -> decode, one token a step ->
(remove) -> its blocks are free. `num_computed_tokens` counts tokens whose keys and values are in the cache, those of a
cached prefix included; `num_scheduled_tokens` counts answer tokens that are sampled or being sampled on the device, of
which on a GPU the last is not known to the host yet.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from ptst.generation.kv_cache import BLOCK_SIZE, BlockTable, KVCache, blocks_for, common_prefix_length
from ptst.generation.request import Request, Statistics, TopLogprobs
from ptst.generation.stop_strings import TextStream

MIN_SHARED_TOKENS = 32  # a shorter shared prefix is not worth caching
MAX_BYPASSED = 64  # later requests that may be admitted before one; after that it is next


@dataclass(eq=False)
class Sequence:
    """Tokens whose keys and values enter the cache."""

    prompt: list[int]
    adapter: str | None
    table: BlockTable = field(default_factory=BlockTable)
    num_computed_tokens: int = 0

    @property
    def prefilled(self) -> bool:
        return self.num_computed_tokens >= len(self.prompt)


class PrefixSequence(Sequence):
    """A prefix that waiting prompts share, computed for the prefix cache."""


@dataclass(eq=False)
class RequestSequence(Sequence):
    """A request and the state of its answer."""

    request: Request = field(kw_only=True)
    arrival: int = field(kw_only=True)
    num_bypassed: int = 0  # requests that arrived later and were admitted earlier
    running: bool = False
    slot: int = 0  # index of its newest token on the device
    num_scheduled_tokens: int = 0
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    stream: TextStream | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self.max_new_tokens = self.request.sampling.max_new_tokens
        self._random = self.request.random_numbers
        self._uniforms: list[float] = []

    def uniform(self, index: int) -> float:
        """The random number for the answer's token `index`; asking twice (after a rejected draft) gives the same."""
        while len(self._uniforms) <= index:
            self._uniforms.append(self._random.random())
        return self._uniforms[index]


@dataclass
class Step:
    """What one forward pass computes: the newest token of each decoding sequence, then chunks of prompts (sequence,
    number of tokens). `draft` tokens follow the newest token of the only decoding sequence."""

    decode: list[RequestSequence]
    prefill: list[tuple[Sequence, int]]
    draft: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of its tokens), in the order of the step's rows."""
        return [*((s, 1 + len(self.draft)) for s in self.decode), *self.prefill]


class Scheduler:
    """The waiting and the running sequences over one cache."""

    def __init__(self, cache: KVCache, batch_size: int, prefix_caching: bool, statistics: Statistics):
        self.cache, self.batch_size, self.statistics = cache, batch_size, statistics
        self.prefix_caching = prefix_caching
        self.waiting: deque[RequestSequence] = deque()
        self.running: list[Sequence] = []
        self.free_slots = list(range(batch_size))
        self._num_arrived = 0
        self._blocked: tuple[int, ...] | None = None  # the state in which nothing could be admitted

    def add(self, request: Request) -> None:
        self._num_arrived += 1
        sequence = RequestSequence(list(request.prompt), request.adapter, request=request, arrival=self._num_arrived)
        self.waiting.append(sequence)

    def find(self, request_id: str | int) -> RequestSequence | None:
        sequences = (s for s in (*self.running, *self.waiting) if isinstance(s, RequestSequence))
        return next((s for s in sequences if s.request.id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free what it holds."""
        if isinstance(sequence, RequestSequence):
            if not sequence.running:
                self.waiting.remove(sequence)
                return
            self.free_slots.append(sequence.slot)
        # On a GPU a step that writes to these blocks may still run; their next owner's steps come after it.
        self.cache.free(sequence.table)
        self.running.remove(sequence)

    # Admission

    def admit(self) -> list[RequestSequence]:
        """Move waiting requests to the running ones, as far as slots and memory go; returns those admitted."""
        if not self.waiting or not self.free_slots or self._state() == self._blocked:
            return []
        candidates = list(islice(self.waiting, 2 * self.batch_size))
        overdue = [s for s in candidates if s.num_bypassed > MAX_BYPASSED]
        rest = [s for s in candidates if s.num_bypassed <= MAX_BYPASSED]
        rest.sort(key=lambda s: (-len(s.prompt) - s.max_new_tokens, s.arrival))
        admitted: list[RequestSequence] = []
        for sequence in (*overdue, *rest):
            if not self.free_slots:
                break
            if self._prefix_is_running(sequence):
                continue
            if self._try_admit(sequence, candidates):
                admitted.append(sequence)
            elif sequence.num_bypassed > MAX_BYPASSED and not self._prefix_is_running(sequence):
                break  # all others wait until this one fits
        for sequence in candidates:
            if not sequence.running:
                sequence.num_bypassed += sum(a.arrival > sequence.arrival for a in admitted)
        self._blocked = None if admitted else self._state()
        return admitted

    def _try_admit(self, sequence: RequestSequence, candidates: list[RequestSequence]) -> bool:
        """Admit a sequence if its memory is free; or start to compute the prefix that it shares with others."""
        cache = self.cache
        prefix, num_cached = cache.match_prefix(sequence.prompt, sequence.adapter) if self.prefix_caching else (None, 0)
        if num_cached < MIN_SHARED_TOKENS:  # not worth protecting the prefix from eviction
            prefix, num_cached = None, 0
        max_tokens = len(sequence.prompt) + sequence.max_new_tokens
        # A prefix is computed only if the request fits beside it (its last block is copied); otherwise prefixes would
        # evict each other and no request would ever be admitted.
        needed = blocks_for(max_tokens) + 1 - num_cached // BLOCK_SIZE
        fits = needed <= cache.num_allocatable(prefix)
        if self.prefix_caching and fits and self._start_prefix(sequence, num_cached, candidates):
            return False
        table = cache.allocate(max_tokens, prefix, num_cached)
        if table is None and prefix is not None and not self.running:
            num_cached = 0  # nothing will be freed: give up the cached prefix itself
            table = cache.allocate(max_tokens)
        if table is None:
            return False
        self.waiting.remove(sequence)
        sequence.running, sequence.slot, sequence.num_cached_tokens = True, self.free_slots.pop(), num_cached
        self._start(sequence, table, num_cached)
        self.statistics.cached_tokens += num_cached
        return True

    def _state(self) -> tuple[int, ...]:
        """All that decides whether a waiting request can be admitted."""
        cache = self.cache
        return self._num_arrived, len(self.waiting), len(self.running), len(cache.prefixes), cache.num_available

    def _start(self, sequence: Sequence, table: BlockTable, num_cached: int) -> None:
        sequence.table, sequence.num_computed_tokens = table, num_cached
        self.running.append(sequence)

    def _prefix_is_running(self, sequence: RequestSequence) -> bool:
        """Whether a prefix of this prompt is being computed at the moment."""
        prefixes = (s for s in self.running if isinstance(s, PrefixSequence) and s.adapter == sequence.adapter)
        return any(sequence.prompt[: len(p.prompt)] == p.prompt for p in prefixes)

    def _start_prefix(self, sequence: RequestSequence, num_cached: int, candidates: list[RequestSequence]) -> bool:
        """If other candidates share a longer prefix with this prompt than the `num_cached` tokens that are cached,
        start to compute it. Of the possible lengths, takes the one that saves most tokens."""
        lengths = []
        for other in candidates:
            if other is not sequence and not other.running and other.adapter == sequence.adapter:
                n = common_prefix_length(sequence.prompt, other.prompt)
                n = min(n, len(sequence.prompt) - 1, len(other.prompt) - 1)
                if n >= num_cached + MIN_SHARED_TOKENS:
                    lengths.append(n)
        if not lengths:
            return False
        lengths.sort()
        # lengths[i] tokens are shared with len(lengths) - i others.
        best = max(range(len(lengths)), key=lambda i: (lengths[i] - num_cached) * (len(lengths) - i))
        shared = sequence.prompt[: lengths[best]]
        prefix, num_cached = self.cache.match_prefix(shared, sequence.adapter)
        table = self.cache.allocate(len(shared), prefix, num_cached)
        if table is None:
            return False
        self._start(PrefixSequence(shared, sequence.adapter), table, num_cached)
        return True

    # Steps

    def next_step(self, max_prefill_tokens: int) -> Step:
        """The next forward pass: all decoding sequences, then prompts in the order of admission."""
        step = Step([], [])
        for sequence in self.running:
            if not sequence.prefilled:
                if max_prefill_tokens:
                    n = min(max_prefill_tokens, len(sequence.prompt) - sequence.num_computed_tokens)
                    step.prefill.append((sequence, n))
                    max_prefill_tokens -= n
            elif isinstance(sequence, RequestSequence) and sequence.num_scheduled_tokens < sequence.max_new_tokens:
                step.decode.append(sequence)
        return step
