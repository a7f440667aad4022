"""Decode steps as captured CUDA graphs: one launch in place of hundreds.

There is one graph for each power of two up to the engine's batch size, all captured before the first answer, the
largest first; a step is padded to the next size with rows that write into block 0. They share one memory pool and one
tensor of logits, which the next replay overwrites. The step's inputs, one small table of integers, are copied into the
graph's own; all that depends on them is computed inside the graph. Not run on a GPU yet.

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
from ptst.kernels.attention_decode import counters_for
from ptst.kernels.dispatch import use_triton
from ptst.kernels.transfer import to_device


class Several(Enum):
    """In place of an adapter's name: rows of a step have adapters of their own."""

    ADAPTERS = 0


def batch_sizes(most: int) -> list[int]:
    """Rows of the graphs for batches of at most `most`: powers of two, and `most`."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


class _GraphAttention(StepAttention):
    """A decode step's attention from tensors whose values are read when the graph runs."""

    def __init__(self, cache: KVCache, forward: Forward, positions_R: Tensor, table_RN: Tensor):
        self.cache, self.config, self.head_norms = cache, forward.config, forward.head_norms
        self.num_decode, self.has_prefill = len(positions_R), False
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


class DecodeGraphs:
    """`newest_tokens` holds the newest token of each slot, and one more place for the padding rows."""

    def __init__(self, forward: Forward, cache: KVCache, newest_tokens: Tensor, max_length: int):
        self.forward, self.cache, self.newest_tokens = forward, cache, newest_tokens
        self.max_blocks = blocks_for(max_length)
        self.sizes = batch_sizes(len(newest_tokens) - 1)
        self._captured: dict[tuple[int, str | Several | None], _Captured] = {}
        self._pool: Any = None
        self._logits_NV: Tensor | None = None

    def prepare(self) -> None:
        """Capture what any batch may need: with adapters that are not stacked, the base's graphs alone."""
        self._capture_all(None)
        if self.forward.stacked is not None:
            self._capture_all(Several.ADAPTERS)

    def logits(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        blocks: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
    ) -> Tensor | None:
        """(R, V) for one new token in each slot, until the next call; None for longer sequences than the graphs take.
        Several `adapters` need those of the forward pass to be stacked."""
        R = len(slots)
        if max(map(len, blocks)) > self.max_blocks:
            return None
        size = next(s for s in self.sizes if s >= R)
        rows = [[s, p, *b, *[0] * (self.max_blocks - len(b))] for s, p, b in zip(slots, positions, blocks, strict=True)]
        rows += [[len(self.newest_tokens) - 1] + [0] * (self.max_blocks + 1)] * (size - R)
        kind = self._kind(adapters)
        if isinstance(kind, Several):
            assert self.forward.stacked is not None, "a graph of several adapters needs stacked ones"
            numbers = [*self.forward.stacked.which(adapters), *[-1] * (size - R)]
            rows = [[*row, number] for row, number in zip(rows, numbers, strict=True)]
        if (size, kind) not in self._captured:
            self._capture_all(kind)
        captured = self._captured[size, kind]
        captured.inputs.copy_(to_device(rows, self.forward.device, torch.int32), non_blocking=True)
        captured.graph.replay()
        assert self._logits_NV is not None
        return self._logits_NV[:R]

    def _kind(self, adapters: Sequence[str | None]) -> str | Several | None:
        """Whose graphs a batch takes: the base's (with what is attached to it), those of all adapters where they are
        stacked, else an adapter's own."""
        alone = len(set(adapters)) == 1 and (adapters[0] is None or self.forward.stacked is None)
        return adapters[0] if alone else Several.ADAPTERS

    def _step(self, inputs: Tensor, adapter: str | Several | None) -> None:
        """Logits of rows of (slot, position, blocks), and the adapter's number where there are several; into those that
        all graphs share."""
        adapter_rows: AdapterRows
        if isinstance(adapter, Several):
            inputs, adapter_rows = inputs[:, :-1], inputs[:, -1].contiguous()
        else:
            adapter_rows = [(adapter, None)]
        positions_R = inputs[:, 1]
        attend = _GraphAttention(self.cache, self.forward, positions_R, inputs[:, 2:])
        tokens_R = self.newest_tokens[inputs[:, 0]].clamp(min=0)
        logits_RV = self.forward.logits(self.forward(tokens_R, positions_R, attend, adapter_rows))
        if self._logits_NV is None:  # the largest size comes first, and runs once before it is captured
            self._logits_NV = torch.empty_like(logits_RV)
        self._logits_NV[: len(logits_RV)].copy_(logits_RV)

    def columns(self, adapter: str | Several | None) -> int:
        """Numbers in a row of a step's inputs."""
        return 2 + self.max_blocks + isinstance(adapter, Several)

    def _capture_all(self, adapter: str | Several | None) -> None:
        for size in reversed(self.sizes):
            self._captured[size, adapter] = self._capture(size, adapter)

    @torch.inference_mode()
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
            self._step(inputs, adapter)
        self._pool = graph.pool()
        return _Captured(graph, inputs)
