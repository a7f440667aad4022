"""Paged attention of one step: decoding sequences with one token each and chunks of prompts, in one packed row.

Where each token is stored is worked out once per step and serves every layer. A token's slot is block x P + offset.

Shapes: T tokens of the step, of which the first R decode, H query heads, K key/value heads, G = H / K, D head_dim, B
blocks of P tokens, L cached tokens of a prompt, n tokens of its chunk.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptst.generation.kv_cache import BLOCK_SIZE, BlockTable, KVCache
from ptst.kernels import cpu_attention
from ptst.kernels.attention import causal_mask
from ptst.kernels.attention_decode import counters_for, decode_attention
from ptst.kernels.attention_prefill import Chunks, chunks_of, prefill_attention
from ptst.kernels.cpu_attention import paged_attention, split_queries
from ptst.kernels.dispatch import use_triton
from ptst.kernels.rope import apply_rope
from ptst.kernels.rope_store import HeadNorms, rotate_and_store
from ptst.kernels.transfer import to_device
from ptst.model.config import DecoderConfig


class StepAttention:
    """The attention function of one step's forward pass: rotates queries and keys, stores keys and values, attends.

    `decode`: (block table, length including the new token) of each decoding row; rows with draft tokens are several
    rows of one sequence, each one token longer. `prefill`: (block table, tokens stored, new tokens) of each chunk.
    `head_norms`: of each layer, where queries and keys have norms by head (Qwen3) and one kernel may do these as well.
    """

    def __init__(
        self,
        cache: KVCache,
        decode: Sequence[tuple[BlockTable, int]],
        prefill: Sequence[tuple[BlockTable, int, int]],
        config: DecoderConfig,
        head_norms: Sequence[HeadNorms] = (),
    ):
        self.head_norms = head_norms
        self.cache, self.config, self.num_decode = cache, config, len(decode)
        device, windows = cache.data.device, config.windows
        spans = [(t.blocks, n - 1, n) for t, n in decode] + [(t.blocks, s, s + n) for t, s, n in prefill]
        self.written_T = _slots(spans)
        self.slots_T: Tensor | None = None  # where one kernel rotates and stores
        self.counters: Tensor | None = None
        if use_triton(cache.data):
            self.counters = counters_for(len(decode), config.num_kv_heads, device)
            self.slots_T = to_device(torch.from_numpy(self.written_T), device)
        elif cache.arrays is None:
            self.written_N = to_device(self._rows(self.written_T), device)
        if decode:
            blocks, lengths = [t.blocks for t, _ in decode], [n for _, n in decode]
            if cache.arrays is not None:
                lengths_R = np.array(lengths, np.int32)
                self.decode_arguments = block_table(blocks).numpy(), lengths_R
                self.thread_ends = {window: split_queries(lengths_R, window) for window in windows}
            else:
                self.longest = max(lengths)
                self.lengths_R = to_device(lengths, device, torch.int32)
                self.table_RN = to_device(block_table(blocks), device)
        self.has_prefill = bool(prefill)
        self.chunks: Chunks | None = None
        if prefill and (cache.on_gpu or self.slots_T is not None):
            spans_R, G = [(n, s + n) for _, s, n in prefill], config.num_heads // config.num_kv_heads
            self.chunks = chunks_of(spans_R, G, config.head_dim, cache.data.dtype, device)
            self.chunk_table_RN = to_device(block_table([t.blocks for t, _, _ in prefill]), device)
        elif prefill:
            self._plan_gather(prefill, windows)

    @property
    def normalizes(self) -> bool:
        """Whether queries and keys come without their norms by head."""
        return bool(self.head_norms) and self.slots_T is not None

    def _plan_gather(self, prefill: Sequence[tuple[BlockTable, int, int]], windows: Iterable[int | None]) -> None:
        """On a CPU: the rows of the cache that chunks read, and their masks."""
        self.read_N = self._rows(_slots([(t.blocks, 0, s + n) for t, s, n in prefill]))
        self.cu_q = [0, *accumulate(n for _, _, n in prefill)]
        self.cu_k = [0, *accumulate(s + n for _, s, n in prefill)]
        G = self.config.num_heads // self.config.num_kv_heads
        # Additive masks: a boolean one would be converted in every layer.
        zero = torch.zeros((), dtype=torch.promote_types(self.cache.data.dtype, torch.float32))
        self.masks = {
            window: [zero.masked_fill(~causal_mask(n, s + n, window), -math.inf).repeat(G, 1) for _, s, n in prefill]
            for window in windows
        }

    def _rows(self, slots_T: np.ndarray) -> Tensor:
        """Rows (tokens x K,) of the cache as (B K P, D), for tokens in these slots."""
        K = self.config.num_kv_heads
        block_T, offset_T = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
        return torch.from_numpy(((block_T[:, None] * K + np.arange(K)) * BLOCK_SIZE + offset_T[:, None]).ravel())

    def __call__(self, layer: int, qkv_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> Tensor:
        """(T, H, D), from pre-RoPE queries, keys and values (T, H + 2 K, D)."""
        q_THD = self._rotate_and_store(layer, qkv_THD, cos_T1D2, sin_T1D2)
        R = self.num_decode
        outs = [self._decode(q_THD[:R], layer)] if R else []
        if self.has_prefill:
            outs.append(self._prefill(q_THD[R:], layer))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _rotate_and_store(self, layer: int, qkv_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> Tensor:
        """Rotated queries (T, H, D); keys and values are in the cache."""
        if self.slots_T is not None:
            norms = self.head_norms[layer] if self.head_norms else None
            return rotate_and_store(qkv_THD, cos_T1D2, sin_T1D2, self.slots_T, *self.cache.layers[layer], norms)
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_THD, k_TKD, v_TKD = qkv_THD.split((H, K, K), dim=1)
        q_THD, k_TKD = apply_rope(q_THD, k_TKD, cos_T1D2, sin_T1D2)
        for rows, new_TKD in zip(self.cache.rows[layer], (k_TKD, v_TKD), strict=True):
            rows.index_copy_(0, self.written_N, new_TKD.reshape(-1, D))
        return q_THD

    def into(self, out_THD: Tensor, layer: int, qkv_THD: Tensor, cos_TD2: np.ndarray, sin_TD2: np.ndarray) -> None:
        """The same with Numba's loops, for a cache with arrays: writes `out_THD`, overwrites `qkv_THD`."""
        assert self.cache.arrays is not None
        arrays, qkv = self.cache.arrays[layer], qkv_THD.numpy()
        cpu_attention.rotate_and_store(qkv, cos_TD2, sin_TD2, self.written_T, *arrays)
        R = self.num_decode
        if R:
            window = self.config.window(layer)
            arguments = (*self.decode_arguments, window, out_THD.numpy(), self.thread_ends[window])
            paged_attention(qkv, arrays, *arguments)
        if self.has_prefill:
            out_THD[R:] = self._prefill(qkv_THD[R:, : self.config.num_heads], layer)

    def _decode(self, q_RHD: Tensor, layer: int) -> Tensor:
        keys, values = (x.transpose(1, 2) for x in self.cache.layers[layer])
        # Plain torch gathers each row's keys and values: four rows at a time keep that small.
        chunk = len(q_RHD) if self.cache.on_gpu else 4
        window = self.config.window(layer)
        outs = [
            decode_attention(
                *(q, keys, values, lengths),
                longest=self.longest,
                table_RN=table,
                window=window,
                counters=self.counters,
            )
            for q, lengths, table in zip(*(x.split(chunk) for x in (q_RHD, self.lengths_R, self.table_RN)), strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _prefill(self, q_THD: Tensor, layer: int) -> Tensor:
        window = self.config.window(layer)
        if self.chunks is not None:
            keys, values = (x.transpose(1, 2) for x in self.cache.layers[layer])
            return prefill_attention(q_THD, keys, values, self.chunks, table_RN=self.chunk_table_RN, window=window)
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        k_LKD, v_LKD = (x.index_select(0, self.read_N).to(q_THD.dtype).view(-1, K, D) for x in self.cache.rows[layer])
        outs = []
        for i, mask in enumerate(self.masks[window]):
            new, cached = slice(*self.cu_q[i : i + 2]), slice(*self.cu_k[i : i + 2])
            # The G heads of one key head become more queries over it, so that no key is repeated.
            q_KnD = q_THD[new].unflatten(1, (K, H // K)).permute(1, 2, 0, 3).reshape(1, K, -1, D)
            k_KLD, v_KLD = k_LKD[cached].transpose(0, 1), v_LKD[cached].transpose(0, 1)
            out_KnD = scaled_dot_product_attention(q_KnD, k_KLD[None], v_KLD[None], attn_mask=mask)
            outs.append(out_KnD.view(H, -1, D).transpose(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _slots(spans: Sequence[tuple[list[int], int, int]]) -> np.ndarray:
    """(T,) slots of the tokens from `start` to `end` of each list of blocks."""
    P = BLOCK_SIZE
    return np.array([b[j // P] * P + j % P for b, start, end in spans for j in range(start, end)], np.int64)


def block_table(blocks: Sequence[Sequence[int]]) -> Tensor:
    """(R, N) int32, rows padded with block 0, which belongs to no sequence."""
    most = max(map(len, blocks))
    return torch.tensor([[*b, *[0] * (most - len(b))] for b in blocks], dtype=torch.int32)
