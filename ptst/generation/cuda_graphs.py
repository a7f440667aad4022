"""Decode steps as captured CUDA graphs: one launch in place of hundreds.

There is one graph for each batch size of a short list; a step is padded to the next size with rows that write into
block 0. The step's inputs, one small table of integers, are copied into the graph's own; all that depends on them is
computed inside the graph. Not run on a GPU yet.

Shapes: R rows, N blocks per sequence at most, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ptst.generation.forward import AdapterRows, Forward
from ptst.generation.kv_cache import BLOCK_SIZE, KVCache, blocks_for
from ptst.generation.paged_attention import StepAttention
from ptst.generation.transfer import to_device
from ptst.kernels.attention_decode import counters_for
from ptst.kernels.dispatch import use_triton


class Several(Enum):
    """In place of an adapter's name: rows of a step have adapters of their own."""

    ADAPTERS = 0


BATCH_SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 513, 16))


class _GraphAttention(StepAttention):
    """A decode step's attention from tensors whose values are read when the graph runs."""

    def __init__(self, cache: KVCache, forward: Forward, positions_R: Tensor, table_RN: Tensor):
        self.cache, self.config = cache, forward.config
        self.num_decode, self.read_N = len(positions_R), None
        self.table_RN, self.lengths_R = table_RN, positions_R + 1
        self.longest = table_RN.shape[1] * BLOCK_SIZE
        block_R1 = table_RN.gather(1, (positions_R // BLOCK_SIZE)[:, None].long())
        self.slots_T = self.counters = None
        if use_triton(cache.data):
            self.counters = counters_for(self.num_decode, self.config.num_kv_heads, positions_R.device)
            self.slots_T = block_R1[:, 0] * BLOCK_SIZE + positions_R % BLOCK_SIZE
            return
        heads_K = torch.arange(self.config.num_kv_heads, device=positions_R.device)
        offset_R1 = (positions_R % BLOCK_SIZE)[:, None]
        self.written_N = ((block_R1 * self.config.num_kv_heads + heads_K) * BLOCK_SIZE + offset_R1).flatten()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits_RV: Tensor


class DecodeGraphs:
    """`newest_tokens` holds the newest token of each slot, and one more place for the padding rows."""

    def __init__(self, forward: Forward, cache: KVCache, newest_tokens: Tensor, max_length: int):
        self.forward, self.cache, self.newest_tokens = forward, cache, newest_tokens
        self.max_blocks = blocks_for(max_length)
        self._captured: dict[tuple[int, str | Several | None], _Captured] = {}
        self._pool: Any = None

    def logits(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        blocks: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
    ) -> Tensor | None:
        """(R, V) for one new token in each slot; None for more rows or longer sequences than any graph takes. Several
        `adapters` need those of the forward pass to be stacked."""
        R = len(slots)
        size = next((s for s in BATCH_SIZES if s >= R), None)
        if size is None or max(map(len, blocks)) > self.max_blocks:
            return None
        rows = [[s, p, *b, *[0] * (self.max_blocks - len(b))] for s, p, b in zip(slots, positions, blocks, strict=True)]
        rows += [[len(self.newest_tokens) - 1] + [0] * (self.max_blocks + 1)] * (size - R)
        adapter = adapters[0] if len(set(adapters)) == 1 else Several.ADAPTERS
        if isinstance(adapter, Several):
            assert self.forward.stacked is not None, "a graph of several adapters needs stacked ones"
            numbers = [*self.forward.stacked.which(adapters), *[-1] * (size - R)]
            rows = [[*row, number] for row, number in zip(rows, numbers, strict=True)]
        captured = self._captured.get((size, adapter)) or self._capture(size, adapter)
        captured.inputs.copy_(to_device(rows, self.forward.device, torch.int32), non_blocking=True)
        captured.graph.replay()
        return captured.logits_RV[:R]

    def _step(self, inputs: Tensor, adapter: str | Several | None) -> Tensor:
        """Logits (R, V) of rows of (slot, position, blocks), and the adapter's number where there are several."""
        adapter_rows: AdapterRows
        if isinstance(adapter, Several):
            inputs, adapter_rows = inputs[:, :-1], inputs[:, -1].contiguous()
        else:
            adapter_rows = [(adapter, None)]
        positions_R = inputs[:, 1]
        attend = _GraphAttention(self.cache, self.forward, positions_R, inputs[:, 2:])
        tokens_R = self.newest_tokens[inputs[:, 0]].clamp(min=0)
        return self.forward.logits(self.forward(tokens_R, positions_R, attend, adapter_rows))

    def columns(self, adapter: str | Several | None) -> int:
        """Numbers in a row of a step's inputs."""
        return 2 + self.max_blocks + isinstance(adapter, Several)

    def _capture(self, size: int, adapter: str | Several | None) -> _Captured:
        inputs = torch.zeros(size, self.columns(adapter), dtype=torch.int32, device=self.forward.device)
        inputs[:, 0] = len(self.newest_tokens) - 1
        # Once before the capture, on another stream: compiles kernels and allocates workspaces.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(inputs, adapter)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._step(inputs, adapter)
        self._pool = graph.pool()
        return self._captured.setdefault((size, adapter), _Captured(graph, inputs, logits_RV))
