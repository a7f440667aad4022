"""Attention of one step over the cache: answers one token each, prompts a piece each, side by side in one flat row.

Everything that says where tokens lie is worked out once and serves every layer.

Shapes: T rows of the step, R answers among them (first), H query heads, K key/value heads, G = H / K, D head_dim, P
tokens of a block, L cached tokens of a request, n new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptst.generation.cache import BLOCK, BlockList, Cache
from ptst.generation.device import send
from ptst.kernels.attention import causal_mask, packed_attention
from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.cpu_attention import paged_attention, rotate_and_store, split_queries
from ptst.kernels.rope import apply_rope
from ptst.model.config import DecoderConfig


class StepAttention:
    """An `attend` for the sampler's forward pass: it turns queries and keys and stores the new keys and values first.

    `decoding`: (blocks, length with the row's own token) of each row that is a single new token; several may be of one
    request, one token longer each. `reading`: (blocks, tokens stored, new tokens) of each piece of a prompt.
    """

    def __init__(
        self,
        cache: Cache,
        decoding: Sequence[tuple[BlockList, int]],
        reading: Sequence[tuple[BlockList, int, int]],
        config: DecoderConfig,
    ):
        self.cache, self.config, self.num_decoding = cache, config, len(decoding)
        device = cache.store.device
        self.written_T = _places(
            [(b.blocks, n - 1, n) for b, n in decoding] + [(b.blocks, s, s + n) for b, s, n in reading]
        )
        if cache.arrays is None:
            self.written_N = send(self._rows(self.written_T), device)
        if decoding:
            blocks, lengths = [b.blocks for b, _ in decoding], [n for _, n in decoding]
            if cache.arrays is not None:
                table, lengths = block_table(blocks).numpy(), np.array(lengths, np.int32)
                self.attended = table, lengths, config.sliding_window
                self.ends = split_queries(lengths, config.sliding_window)
            else:
                self.longest = max(lengths)
                self.lengths_R = send(lengths, device, torch.int32)
                self.table_RN = send(block_table(blocks), device)
        self.read_N: Tensor | None = None
        if reading:
            self.read_N = send(self._rows(_places([(b.blocks, 0, s + n) for b, s, n in reading])), device)
            self.cu_q, self.cu_k = [0], [0]
            for _, start, n in reading:
                self.cu_q.append(self.cu_q[-1] + n)
                self.cu_k.append(self.cu_k[-1] + start + n)
            if not cache.on_gpu:
                G = config.num_heads // config.num_kv_heads
                # To be added: a boolean one would be turned into numbers in every layer.
                seen = [causal_mask(n, s + n, config.sliding_window) for _, s, n in reading]
                dtype = torch.promote_types(cache.store.dtype, torch.float32)
                zeros = [torch.zeros(m.shape, dtype=dtype) for m in seen]
                self.masks = [z.masked_fill_(~m, -math.inf).repeat(G, 1) for z, m in zip(zeros, seen, strict=True)]

    def _rows(self, place_T: np.ndarray) -> Tensor:
        """Rows (tokens K,) of the cache, seen as (B K P, D), for tokens at these places."""
        K = self.config.num_kv_heads
        block_T, p_T = place_T // BLOCK, place_T % BLOCK
        return torch.from_numpy(((block_T[:, None] * K + np.arange(K)) * BLOCK + p_T[:, None]).ravel())

    def __call__(self, layer: int, qkv_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> Tensor:
        """(T, H, D), for queries, keys and values (T, H + 2 K, D), not turned yet."""
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_THD, k_TKD, v_TKD = qkv_THD.split((H, K, K), dim=1)
        q_THD, k_TKD = apply_rope(q_THD, k_TKD, cos_T1D2, sin_T1D2)
        for rows, new_TKD in zip(self.cache.rows[layer], (k_TKD, v_TKD), strict=True):
            rows.index_copy_(0, self.written_N, new_TKD.reshape(-1, D))
        R = self.num_decoding
        outs = [self._decode(q_THD[:R], layer)] if R else []
        if self.read_N is not None:
            outs.append(self._read(q_THD[R:], layer))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def into(self, out_THD: Tensor, layer: int, qkv_THD: Tensor, cos_TD2: np.ndarray, sin_TD2: np.ndarray) -> None:
        """The same through Numba's loops, where the cache has arrays: into `out_THD`, using up `qkv_THD`."""
        arrays, qkv = self.cache.arrays[layer], qkv_THD.numpy()
        rotate_and_store(qkv, cos_TD2, sin_TD2, self.written_T, *arrays)
        R = self.num_decoding
        if R:
            paged_attention(qkv, arrays, *self.attended, out_THD.numpy(), self.ends)
        if self.read_N is not None:
            out_THD[R:] = self._read(qkv_THD[R:, : self.config.num_heads], layer)

    def _decode(self, q_RHD: Tensor, layer: int) -> Tensor:
        views = [x.transpose(1, 2) for x in self.cache.layers[layer]]
        options = {"longest": self.longest, "window": self.config.sliding_window}
        if self.cache.on_gpu:
            return decode_attention(q_RHD, *views, self.lengths_R, table_RN=self.table_RN, **options)
        # Plain torch collects each row's keys and values: a few rows at a time, so that they are a small part of all.
        parts = zip(*(x.split(4) for x in (q_RHD, self.lengths_R, self.table_RN)), strict=True)
        return torch.cat([decode_attention(q, *views, n, table_RN=table, **options) for q, n, table in parts])

    def _read(self, q_THD: Tensor, layer: int) -> Tensor:
        keys_and_values = (rows.index_select(0, self.read_N).to(q_THD.dtype) for rows in self.cache.rows[layer])
        k_LKD, v_LKD = (x.view(-1, self.config.num_kv_heads, self.config.head_dim) for x in keys_and_values)
        if self.cache.on_gpu:
            window = self.config.sliding_window
            return packed_attention(q_THD, k_LKD, v_LKD, self.cu_q, cu_seqlens_k=self.cu_k, window=window)
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        outs = []
        for i, mask in enumerate(self.masks):
            new, known = slice(*self.cu_q[i : i + 2]), slice(*self.cu_k[i : i + 2])
            # The heads that share keys become more queries over one set of keys, so that no key is repeated.
            q_KnD = q_THD[new].unflatten(1, (K, H // K)).permute(1, 2, 0, 3).reshape(1, K, -1, D)
            k_KLD, v_KLD = k_LKD[known].transpose(0, 1), v_LKD[known].transpose(0, 1)
            out_KnD = scaled_dot_product_attention(q_KnD, k_KLD[None], v_KLD[None], attn_mask=mask)
            outs.append(out_KnD.view(H, -1, D).transpose(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _places(spans: Sequence[tuple[list[int], int, int]]) -> np.ndarray:
    """(T,) where the tokens from `start` to `end` of each list of blocks lie: block x P + token."""
    return np.array([b[j // BLOCK] * BLOCK + j % BLOCK for b, s, e in spans for j in range(s, e)], np.int64)


def block_table(blocks: Sequence[Sequence[int]]) -> Tensor:
    """(R, N) int32, rows filled up with block 0, which is nobody's."""
    most = max(map(len, blocks))
    return torch.tensor([[*b, *[0] * (most - len(b))] for b in blocks], dtype=torch.int32)
