"""The key/value cache: one slot per request, all of one length, so that decoding is one batched operation per layer.

Every slot begins with the keys of the prompts' common beginning (the system text of a template), which is computed
once and copied. Slots in use are always the first ones: when a request ends, the last slot in use moves into its place.

Shapes: S slots, L cache length, H query heads, K key/value heads, D head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import packed_attention
from kernels.attention_decode import decode_attention
from ptst.model.config import DecoderConfig


class Cache:
    """Keys and values of S slots of up to L tokens, of every layer."""

    def __init__(self, config: DecoderConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        # Zeros, not whatever was in memory: a masked key has weight 0, and 0 times a stray NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.config = config

    def share_prefix(self, length: int) -> None:
        """Copy the first `length` tokens of slot 0 into every slot."""
        for stored in (self.keys, self.values):
            stored[:, 1:, :, :length] = stored[:, :1, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]

    def prefill(self, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int]):
        """An `attend` for new tokens of several slots, side by side in one flat row: `lengths[i]` tokens of slot
        `slots[i]`, after the `starts[i]` tokens it holds already."""
        cu_q, cu_k = [0], [0]
        for start, length in zip(starts, lengths, strict=True):
            cu_q.append(cu_q[-1] + length)
            cu_k.append(cu_k[-1] + start + length)

        def attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            k_all, v_all = [], []
            for i, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True)):
                new = slice(cu_q[i], cu_q[i + 1])
                keys_KLD, values_KLD = self.keys[layer, slot], self.values[layer, slot]
                keys_KLD[:, start : start + length] = k_TKD[new].transpose(0, 1)
                values_KLD[:, start : start + length] = v_TKD[new].transpose(0, 1)
                k_all.append(keys_KLD[:, : start + length].transpose(0, 1))
                v_all.append(values_KLD[:, : start + length].transpose(0, 1))
            return packed_attention(
                q_THD, torch.cat(k_all), torch.cat(v_all), cu_q, cu_seqlens_k=cu_k, window=self.config.sliding_window
            )

        return attend

    def decode(self, positions_S: Tensor):
        """An `attend` for one new token in each of the first S slots, at its slot's position."""
        lengths_S = positions_S + 1
        longest = int(positions_S.max()) + 1
        rows_S = torch.arange(len(positions_S), device=positions_S.device)

        def attend(layer: int, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
            self.keys[layer][rows_S, :, positions_S] = k_SKD
            self.values[layer][rows_S, :, positions_S] = v_SKD
            keys_SLKD, values_SLKD = (x[layer].transpose(1, 2) for x in (self.keys, self.values))
            window = self.config.sliding_window
            return decode_attention(q_SHD, keys_SLKD, values_SLKD, lengths_S, longest=longest, window=window)

        return attend
