"""The key/value cache: one allocation, handed out in blocks of P tokens.

Token j of a request lies at offset j % P of the j // P-th block of its list. Requests whose prompts begin alike point
at the same whole blocks, counted by reference; the tokens behind the last whole one are copied. What a request may need
at most is reserved when it is admitted, so that none runs out in the middle; blocks themselves are handed out when they
are reached, the lowest free one first, so that memory which was touched is used again.

Block 0 is nobody's: padding points at it.

Shapes: B blocks of P tokens, K key/value heads, D head_dim, T tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ptst.kernels.cpu import use_numba
from ptst.model.config import DecoderConfig

BLOCK = 32  # tokens. Larger blocks are read a little faster and leave more empty places


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


@dataclass(eq=False)
class BlockList:
    """The blocks of one request, or of a stored beginning; those it begins with may belong to `parent` as well."""

    blocks: list[int] = field(default_factory=list)
    parent: Stored | None = None
    reserved: int = 0  # own blocks it may still ask for


@dataclass(eq=False)
class Stored:
    """Tokens whose keys and values are kept for others. `users` sequences point at its blocks."""

    ids: list[int]
    adapter: str | None
    blocks: list[int]
    users: int = 0
    used_at: int = 0


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which keys and values of a model of this dtype are kept: in its own on a GPU, and bfloat16 also where the
    loops of a CPU read it; else at least float32, in which a CPU computes."""
    if device.type == "cuda" or (dtype == torch.bfloat16 and use_numba(torch.empty(0))):
        return dtype
    return torch.promote_types(dtype, torch.float32)


class Cache:
    """Keys and values of every layer in `blocks` blocks (and block 0)."""

    def __init__(self, config: DecoderConfig, blocks: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, 2, blocks + 1, config.num_kv_heads, BLOCK, config.head_dim)
        # Zeros, not whatever was in memory: a masked key has weight 0, and 0 times a stray NaN would be NaN.
        self.store = _zeros(shape, dtype, device)
        # (keys, values) of each layer, (B, K, P, D) and once more as rows (B K P, D).
        self.layers = [(keys, values) for keys, values in self.store]
        self.rows = [tuple(x.view(-1, config.head_dim) for x in layer) for layer in self.layers]
        self.on_gpu = device.type == "cuda"
        # The layers as Numba takes them, where it serves: it knows no bfloat16.
        bits = self.store.view(torch.uint16) if dtype == torch.bfloat16 else self.store
        numba = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and use_numba(torch.empty(0))
        self.arrays = [(k.numpy(), v.numpy()) for k, v in bits] if numba else None
        self.blocks = blocks
        self._free = list(range(1, blocks + 1))  # a heap
        self._references = [0] * (blocks + 1)
        self._promised = 0  # reserved, not yet handed out
        self._touched = 0  # no block above it was ever written to
        self.stored: list[Stored] = []
        self._clock = 0

    def bytes_for(self, blocks: int) -> int:
        """Bytes of an allocation that holds so many blocks (and block 0)."""
        return (blocks + 1) * (self.store.nbytes // (self.blocks + 1))

    @property
    def used(self) -> int:
        """Blocks that hold something."""
        return self.blocks - len(self._free)

    @property
    def available(self) -> int:
        """Blocks that are free and promised to nobody."""
        return len(self._free) - self._promised

    # Beginnings that are stored

    def match(self, prompt: Sequence[int], adapter: str | None) -> tuple[Stored | None, int]:
        """The stored beginning that shares most with the prompt, and how many tokens; at least one is left over."""
        best, most = None, 0
        for stored in self.stored:
            if stored.adapter == adapter:
                n = min(common(stored.ids, prompt), len(prompt) - 1)
                if n > most:
                    best, most = stored, n
        return best, most

    def keep(self, sequence: BlockList, ids: list[int], adapter: str | None) -> Stored:
        """Store the first `len(ids)` tokens of a sequence for others; its blocks get one more reference."""
        blocks = sequence.blocks[: blocks_for(len(ids))]
        for b in blocks:
            self._references[b] += 1
        self._clock += 1
        stored = Stored(list(ids), adapter, blocks, used_at=self._clock)
        self.stored.append(stored)
        return stored

    def forget(self, stored: Stored) -> None:
        self.stored.remove(stored)
        self._drop(stored.blocks)

    def _idle(self, beginning: Stored | None) -> list[Stored]:
        """Beginnings that nobody uses, the longest unused first; not the one that is about to be used."""
        return sorted((s for s in self.stored if not s.users and s is not beginning), key=lambda s: s.used_at)

    def room(self, beginning: Stored | None = None) -> int:
        """Blocks that a sequence may ask for which begins with `beginning`: what is free and promised to nobody, and
        what the beginnings hold that nobody uses."""
        kept = Counter(b for s in self._idle(beginning) for b in s.blocks)
        return self.available + sum(self._references[b] == n for b, n in kept.items())

    # Sequences

    def admit(self, tokens: int, beginning: Stored | None = None, length: int = 0) -> BlockList | None:
        """A sequence that may grow to `tokens`, of which the first `length` are those of `beginning`; None where too
        little is free. Beginnings that nobody uses make room, the longest unused first."""
        whole = length // BLOCK
        needed = blocks_for(tokens) - whole
        if self.room(beginning) < needed:
            return None  # and nothing is thrown away in vain
        idle = self._idle(beginning)
        while self.available < needed:
            self.forget(idle.pop(0))
        sequence = BlockList(reserved=needed)
        self._promised += needed
        if beginning is not None and length:
            self._clock += 1
            beginning.used_at = self._clock
            beginning.users += 1
            sequence.parent = beginning
            sequence.blocks = beginning.blocks[:whole]
            for b in sequence.blocks:
                self._references[b] += 1
            if length % BLOCK:
                self.grow(sequence, length)
                part = slice(0, length % BLOCK)
                self.store[:, :, sequence.blocks[-1], :, part] = self.store[:, :, beginning.blocks[whole], :, part]
        return sequence

    def grow(self, sequence: BlockList, tokens: int) -> None:
        """Hand out blocks until the sequence has room for `tokens`."""
        while len(sequence.blocks) * BLOCK < tokens:
            assert sequence.reserved > 0, "a sequence asks for more than was reserved for it"
            block = heapq.heappop(self._free)
            if block <= self._touched and not self.on_gpu:
                self.store[:, :, block] = 0  # whoever had it may have left a NaN, and 0 times NaN is NaN
            self._touched = max(self._touched, block)
            self._references[block] = 1
            sequence.blocks.append(block)
            sequence.reserved -= 1
            self._promised -= 1

    def release(self, sequence: BlockList) -> None:
        """Return a sequence's blocks and what is left of its reservation."""
        self._promised -= sequence.reserved
        sequence.reserved = 0
        if sequence.parent is not None:
            sequence.parent.users -= 1
            sequence.parent = None
        self._drop(sequence.blocks)
        sequence.blocks = []

    def _drop(self, blocks: list[int]) -> None:
        for b in blocks:
            self._references[b] -= 1
            assert self._references[b] >= 0, "a block was returned twice"
            if not self._references[b]:
                heapq.heappush(self._free, b)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU pages of zeros from the system, which take time and memory only when they are first touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving, since slices are compared far faster than tokens one by one
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
