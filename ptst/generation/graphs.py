"""Decoding steps as captured CUDA graphs: one launch in place of hundreds.

One graph for each batch size of a short list, for which a step's rows are filled up with rows that write into block 0,
which is nobody's. A step's inputs, one small table of integers, are copied into the graph's own; everything else that
depends on them is worked out inside.

Not run on a GPU yet.

Shapes: R rows, N blocks per request at most, K key/value heads, P tokens of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptst.generation.attend import StepAttention
from ptst.generation.cache import BLOCK, Cache, blocks_for
from ptst.generation.device import send
from ptst.generation.forward import Forward

SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 513, 16))


class _Attention(StepAttention):
    """As a step's, from tensors whose values are read when the graph runs."""

    def __init__(self, cache: Cache, forward: Forward, positions_R: Tensor, table_RN: Tensor):
        self.cache, self.config = cache, forward.config
        self.num_decoding, self.read_N = len(positions_R), None
        self.table_RN, self.lengths_R = table_RN, positions_R + 1
        self.longest = table_RN.shape[1] * BLOCK
        block_R1 = table_RN.gather(1, (positions_R // BLOCK)[:, None].long())
        heads_K = torch.arange(self.config.num_kv_heads, device=positions_R.device)
        written_RK = (block_R1 * self.config.num_kv_heads + heads_K) * BLOCK + (positions_R % BLOCK)[:, None]
        self.written_N = written_RK.flatten()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits_RV: Tensor


class DecodeGraphs:
    """`newest` holds the newest token of each slot, and one more place for the rows that fill up."""

    def __init__(self, forward: Forward, cache: Cache, newest: Tensor, max_length: int):
        self.forward, self.cache, self.newest = forward, cache, newest
        self.width = blocks_for(max_length)
        self._captured: dict[tuple[int, str | None], _Captured] = {}
        self._pool = None

    def logits(
        self, slots: Sequence[int], positions: Sequence[int], blocks: Sequence[Sequence[int]], adapter: str | None
    ) -> Tensor | None:
        """(R, V) of one new token in each slot; None for more rows or longer requests than there is a graph for."""
        R = len(slots)
        size = next((s for s in SIZES if s >= R), None)
        if size is None or max(map(len, blocks)) > self.width:
            return None
        rows = [[s, p, *b, *[0] * (self.width - len(b))] for s, p, b in zip(slots, positions, blocks, strict=True)]
        rows += [[len(self.newest) - 1] + [0] * (self.width + 1)] * (size - R)
        captured = self._captured.get((size, adapter)) or self._capture(size, adapter)
        captured.inputs.copy_(send(rows, self.forward.device, torch.int32), non_blocking=True)
        captured.graph.replay()
        return captured.logits_RV[:R]

    def _step(self, inputs: Tensor, adapter: str | None) -> Tensor:
        """Logits (R, V) of rows of (slot, position, blocks)."""
        positions_R = inputs[:, 1]
        attend = _Attention(self.cache, self.forward, positions_R, inputs[:, 2:])
        tokens_R = self.newest[inputs[:, 0]].clamp(min=0)
        return self.forward.logits(self.forward(tokens_R, positions_R, attend, [(adapter, None)]))

    def _capture(self, size: int, adapter: str | None) -> _Captured:
        inputs = torch.zeros(size, 2 + self.width, dtype=torch.int32, device=self.forward.device)
        inputs[:, 0] = len(self.newest) - 1

        # Once beforehand, on another stream: kernels are compiled and workspaces made outside the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(inputs, adapter)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._step(inputs, adapter)
        self._pool = graph.pool()
        captured = self._captured[size, adapter] = _Captured(graph, inputs, logits_RV)
        return captured
