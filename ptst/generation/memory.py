"""How much memory the key/value cache takes: what was asked for, or what is free, and never more than is needed."""

from __future__ import annotations

import math

import torch

from ptst.errors import UserError
from ptst.free_memory import free_memory
from ptst.generation.cache import BLOCK, blocks_for, bytes_per_token
from ptst.model.config import DecoderConfig

SHARE_OF_FREE = {"cuda": 0.85, "cpu": 0.5}  # the rest is for activations, and on a CPU for everyone else


def plan_memory(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    max_length: int,
    kv_memory: int | None = None,
) -> int:
    """Blocks of the cache (block 0, which is nobody's, not counted): enough for `max_batch` requests of `max_length`
    tokens and one stored beginning of that length, but no more than `kv_memory` bytes or a share of what is free.

    Raises UserError where that is not one block.
    """
    per_block = BLOCK * bytes_per_token(config, dtype)
    memory = kv_memory if kv_memory is not None else int(free_memory(device) * SHARE_OF_FREE[device.type])
    blocks = min((max_batch + 1) * blocks_for(max_length), memory // per_block - 1)
    if blocks < 1:
        what = "--kv-memory is" if kv_memory is not None else "what is free for the key/value cache comes to"
        raise UserError(
            f"{what} {gigabytes(memory)}; {gigabytes(2 * per_block)} hold {BLOCK} tokens, the least there is"
        )
    return blocks


def gigabytes(size: int) -> str:
    """Bytes in the unit of --kv-memory, rounded up."""
    return f"{math.ceil(size / 1e3) / 1e6:g} GB"


def workspace_bytes(config: DecoderConfig, dtype: torch.dtype, rows: int, asking: int) -> int:
    """What a step of `rows` tokens, `asking` of which get a token, takes beside the cache, about: queries, keys and
    values before and after their rotation and once more on the way, the widest hidden states, and the logits twice."""
    c = config
    heads = 4 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    per_row = heads + 3 * c.intermediate_size + 4 * c.hidden_size
    return (rows * per_row + 2 * asking * c.vocab_size) * dtype.itemsize
