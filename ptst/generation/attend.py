"""Attention of one step over the cache: answers one token each, prompts a piece each, side by side in one flat row.

Everything that says where tokens lie is worked out once and serves every layer.

Shapes: T rows of the step, R answers among them (first), H query heads, K key/value heads, G = H / K, D head_dim, P
tokens of a block, L cached tokens of a request, n new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import causal_mask, packed_attention
from kernels.attention_blocks import blocks_attention, plan_blocks
from kernels.attention_decode import decode_attention
from ptst.generation.cache import BLOCK, BlockList, Cache
from ptst.generation.device import send
from ptst.model.config import DecoderConfig


class StepAttention:
    """An `attend` for the decoder's forward pass; it stores the new keys and values first.

    `decoding`: (blocks, length with the newest token) of each answer. `reading`: (blocks, tokens stored, new tokens) of
    each piece of a prompt.
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
        written = [(b.blocks, n - 1, n) for b, n in decoding] + [(b.blocks, s, s + n) for b, s, n in reading]
        self.written_N = self._places(written, device)
        if decoding:
            blocks, lengths = [b.blocks for b, _ in decoding], [n for _, n in decoding]
            if cache.on_gpu:
                self.longest = max(lengths)
                self.lengths_R = send(lengths, device, torch.int32)
                self.table_RN = send(block_table(blocks), device)
            else:
                shared = [b.shared for b, _ in decoding]
                H, dtype, window = config.num_heads, cache.store.dtype, config.sliding_window
                self.plan = plan_blocks(blocks, shared, lengths, H, BLOCK, dtype, window)
        self.read_N: Tensor | None = None
        if reading:
            self.read_N = self._places([(b.blocks, 0, s + n) for b, s, n in reading], device)
            self.cu_q, self.cu_k = [0], [0]
            for _, start, n in reading:
                self.cu_q.append(self.cu_q[-1] + n)
                self.cu_k.append(self.cu_k[-1] + start + n)
            if not cache.on_gpu:
                G = config.num_heads // config.num_kv_heads
                # To be added: a boolean one would be turned into numbers in every layer.
                seen = [causal_mask(n, s + n, config.sliding_window) for _, s, n in reading]
                zeros = [torch.zeros(m.shape, dtype=cache.store.dtype) for m in seen]
                self.masks = [z.masked_fill_(~m, -math.inf).repeat(G, 1) for z, m in zip(zeros, seen, strict=True)]

    def _places(self, spans: Sequence[tuple[list[int], int, int]], device: torch.device) -> Tensor:
        """Rows (tokens K,) of the cache, seen as (B K P, D), for the tokens from `start` to `end` of each list."""
        K = self.config.num_kv_heads
        first_L = torch.tensor([b[j // BLOCK] * K * BLOCK + j % BLOCK for b, s, e in spans for j in range(s, e)])
        return send((first_L[:, None] + torch.arange(K) * BLOCK).flatten(), device)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        D, (keys, values) = q_THD.shape[2], self.cache.rows[layer]
        keys.index_copy_(0, self.written_N, k_TKD.reshape(-1, D))
        values.index_copy_(0, self.written_N, v_TKD.reshape(-1, D))
        R, outs = self.num_decoding, []
        if R:
            outs.append(self._decode(q_THD[:R] if self.read_N is not None else q_THD, *self.cache.layers[layer]))
        if self.read_N is not None:
            k_LKD, v_LKD = (x.index_select(0, self.read_N).view(-1, *k_TKD.shape[1:]) for x in (keys, values))
            outs.append(self._read(q_THD[R:], k_LKD, v_LKD))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(self, q_RHD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not self.cache.on_gpu:
            return blocks_attention(q_RHD, keys, values, self.plan)
        views = (x.transpose(1, 2) for x in (keys, values))
        window = self.config.sliding_window
        return decode_attention(
            q_RHD, *views, self.lengths_R, longest=self.longest, table_RN=self.table_RN, window=window
        )

    def _read(self, q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor) -> Tensor:
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


def block_table(blocks: Sequence[Sequence[int]]) -> Tensor:
    """(R, N) int32, rows filled up with block 0, which is nobody's."""
    most = max(map(len, blocks))
    return torch.tensor([[*b, *[0] * (most - len(b))] for b in blocks], dtype=torch.int32)
