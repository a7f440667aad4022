"""The KV cache: one allocation of blocks of P tokens, how many there are, and the prefix cache on top of it.

Token j of a sequence is at offset j % P of block j // P of its block table. Sequences that share a cached prefix share
its full blocks, which count their references; the tokens after the last full block are copied. `allocate` reserves the
most blocks that a sequence may need, so that none runs out of memory while it decodes; `extend` hands blocks out when
the sequence reaches them, the lowest free one first, so that pages of memory that were touched are used again.

Block 0 belongs to no sequence: padding points at it.

Shapes: B blocks of P tokens, K key/value heads, D head_dim.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ptst.errors import Setting, UserError
from ptst.kernels.cpu import use_numba
from ptst.model.config import DecoderConfig
from ptst.system_memory import free_memory

MAX_KEPT = 64  # prefixes of finished requests; every admission looks through them all
BLOCK_SIZE = 32  # tokens. Larger blocks are read a little faster and leave more space unused


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(eq=False)
class CachedPrefix:
    """Tokens whose keys and values stay in the cache for sequences that begin with them."""

    token_ids: list[int]
    adapter: str | None
    blocks: list[int]
    num_users: int = 0  # sequences that share its blocks
    last_used: int = 0


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence; the first ones may be shared with a cached prefix."""

    blocks: list[int] = field(default_factory=list)
    prefix: CachedPrefix | None = None
    num_reserved: int = 0  # blocks it may still ask for


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the KV cache of a model of this dtype: its own on a GPU, and for bfloat16 also on a CPU with Numba;
    otherwise at least float32, in which a CPU computes."""
    if device.type == "cuda" or (dtype == torch.bfloat16 and use_numba(torch.empty(0))):
        return dtype
    return torch.promote_types(dtype, torch.float32)


SHARE_OF_FREE = {"cuda": 0.85, "cpu": 0.5}  # the rest is for activations, and on a CPU for other processes


def plan_blocks(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    max_length: int,
    kv_memory: int | None = None,
) -> int:
    """Number of blocks of the KV cache (without block 0): enough for `batch_size` sequences of `max_length` tokens and
    one cached prefix of that length, but no more than `kv_memory` bytes (None: a share of the free memory). Raises
    UserError if that is less than one block."""
    block_bytes = BLOCK_SIZE * bytes_per_token(config, dtype)
    memory = kv_memory if kv_memory is not None else int(free_memory(device) * SHARE_OF_FREE[device.type])
    blocks = min((batch_size + 1) * blocks_for(max_length), memory // block_bytes - 1)
    if blocks < 1:
        subject = (Setting("kv_memory"),) if kv_memory is not None else ("the memory that is free for the KV cache",)
        remedy = f"the smallest cache, of {BLOCK_SIZE} tokens, takes {gigabytes(2 * block_bytes)}"
        raise UserError((*subject, f" is {gigabytes(memory)}"), remedy)
    return blocks


def gigabytes(size: int) -> str:
    """Bytes in GB, rounded up to a kilobyte."""
    return f"{math.ceil(size / 1e3) / 1e6:g} GB"


class KVCache:
    """Keys and values of every layer in `num_blocks` blocks (and block 0)."""

    def __init__(self, config: DecoderConfig, num_blocks: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, 2, num_blocks + 1, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        # Zeros, not uninitialized memory: a masked key has weight 0, and 0 times a stray NaN would be NaN.
        self.data = _zeros(shape, dtype, device)
        # (keys, values) of each layer, as (B, K, P, D) and as rows (B K P, D).
        self.layers = [(keys, values) for keys, values in self.data]
        self.rows = [tuple(x.view(-1, config.head_dim) for x in layer) for layer in self.layers]
        self.on_gpu = device.type != "cpu"
        # The layers as NumPy arrays where Numba's loops read them; NumPy has no bfloat16.
        bits = self.data.view(torch.uint16) if dtype == torch.bfloat16 else self.data
        numba = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and use_numba(torch.empty(0))
        self.arrays = [(k.numpy(), v.numpy()) for k, v in bits] if numba else None
        self.num_blocks = num_blocks
        self.prefixes: list[CachedPrefix] = []
        self._free = list(range(1, num_blocks + 1))  # a heap
        self._references = [0] * (num_blocks + 1)
        self._num_reserved = 0  # blocks reserved but not handed out
        self._highest_used = 0  # no block above it was ever written to
        self._clock = 0  # counts uses of prefixes, for eviction

    def bytes_for(self, num_blocks: int) -> int:
        """Size in bytes of a cache of this many blocks (and block 0)."""
        return (num_blocks + 1) * (self.data.nbytes // (self.num_blocks + 1))

    @property
    def num_used(self) -> int:
        """Blocks handed out to sequences and prefixes."""
        return self.num_blocks - len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that are neither handed out nor reserved."""
        return len(self._free) - self._num_reserved

    # The prefix cache

    def match_prefix(self, prompt: Sequence[int], adapter: str | None) -> tuple[CachedPrefix | None, int]:
        """The cached prefix that shares most tokens with the prompt, and how many. At least one token of the prompt is
        left over: its hidden state must be computed."""
        best, longest = None, 0
        for prefix in self.prefixes:
            if prefix.adapter == adapter:
                n = min(common_prefix_length(prefix.token_ids, prompt), len(prompt) - 1)
                if n > longest:
                    best, longest = prefix, n
        return best, longest

    def cache_prefix(self, table: BlockTable, token_ids: list[int], adapter: str | None) -> CachedPrefix:
        """Keep the first `len(token_ids)` tokens of a sequence; its blocks get one more reference."""
        blocks = table.blocks[: blocks_for(len(token_ids))]
        for b in blocks:
            self._references[b] += 1
        self._clock += 1
        prefix = CachedPrefix(list(token_ids), adapter, blocks, last_used=self._clock)
        self.prefixes.append(prefix)
        return prefix

    def keep_finished(self, table: BlockTable, token_ids: list[int], adapter: str | None) -> None:
        """Keep the tokens of a finished sequence, where no prefix has them all; the prefixes that were not used for
        longest make room, so that there are at most MAX_KEPT unused ones."""
        if any(p.adapter == adapter and p.token_ids[: len(token_ids)] == token_ids for p in self.prefixes):
            return
        self.cache_prefix(table, token_ids, adapter)
        for prefix in self._evictable(None)[:-MAX_KEPT]:
            self.evict(prefix)

    def evict(self, prefix: CachedPrefix) -> None:
        self.prefixes.remove(prefix)
        self._release(prefix.blocks)

    def _evictable(self, keep: CachedPrefix | None) -> list[CachedPrefix]:
        """Prefixes without users, the least recently used first; without `keep`, which is about to be used."""
        return sorted((p for p in self.prefixes if not p.num_users and p is not keep), key=lambda p: p.last_used)

    def num_allocatable(self, prefix: CachedPrefix | None = None) -> int:
        """Blocks that a sequence that begins with `prefix` may reserve: those available, and those that the eviction of
        unused prefixes would free."""
        held = Counter(b for p in self._evictable(prefix) for b in p.blocks)
        return self.num_available + sum(self._references[b] == n for b, n in held.items())

    # Sequences

    def allocate(self, max_tokens: int, prefix: CachedPrefix | None = None, num_cached: int = 0) -> BlockTable | None:
        """The block table of a sequence of up to `max_tokens`, whose first `num_cached` tokens are those of `prefix`;
        None if too little memory is free. Evicts unused prefixes as needed, the least recently used first."""
        num_shared = num_cached // BLOCK_SIZE
        needed = blocks_for(max_tokens) - num_shared
        if self.num_allocatable(prefix) < needed:
            return None  # without evicting anything in vain
        evictable = self._evictable(prefix)
        while self.num_available < needed:
            self.evict(evictable.pop(0))
        table = BlockTable(num_reserved=needed)
        self._num_reserved += needed
        if prefix is not None and num_cached:
            self._clock += 1
            prefix.last_used = self._clock
            prefix.num_users += 1
            table.prefix = prefix
            table.blocks = prefix.blocks[:num_shared]
            for b in table.blocks:
                self._references[b] += 1
            if num_cached % BLOCK_SIZE:  # the last block will be written to: copy what is cached of it
                self.extend(table, num_cached)
                part = slice(0, num_cached % BLOCK_SIZE)
                self.data[:, :, table.blocks[-1], :, part] = self.data[:, :, prefix.blocks[num_shared], :, part]
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Hand out reserved blocks until the sequence has space for `num_tokens`."""
        while len(table.blocks) * BLOCK_SIZE < num_tokens:
            assert table.num_reserved > 0, "a sequence needs more blocks than it reserved"
            block = heapq.heappop(self._free)
            if block <= self._highest_used and not self.on_gpu:
                self.data[:, :, block] = 0  # its last user may have left a NaN, and 0 times NaN is NaN
            self._highest_used = max(self._highest_used, block)
            self._references[block] = 1
            table.blocks.append(block)
            table.num_reserved -= 1
            self._num_reserved -= 1

    def free(self, table: BlockTable) -> None:
        """Return a sequence's blocks and the rest of its reservation."""
        self._num_reserved -= table.num_reserved
        table.num_reserved = 0
        if table.prefix is not None:
            table.prefix.num_users -= 1
            table.prefix = None
        self._release(table.blocks)
        table.blocks = []

    def _release(self, blocks: list[int]) -> None:
        for b in blocks:
            self._references[b] -= 1
            assert self._references[b] >= 0, "a block was freed twice"
            if not self._references[b]:
                heapq.heappush(self._free, b)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, zero pages of the system, which take time and memory only when they are first touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two sequences begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection, since comparing slices is far faster than comparing tokens one by one
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
