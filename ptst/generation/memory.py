"""Memory plan: how many blocks the KV cache gets."""

from __future__ import annotations

import math

import torch

from ptst.errors import Setting, UserError
from ptst.free_memory import free_memory
from ptst.generation.kv_cache import BLOCK_SIZE, blocks_for, bytes_per_token
from ptst.model.config import DecoderConfig

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
    one cached prefix of that length, but no more than `kv_memory` bytes (None: a share of the free memory).

    Raises UserError if that is less than one block.
    """
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
