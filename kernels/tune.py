"""Which block shapes of flash attention are the fastest on the GPU at hand: each candidate is compiled and timed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ptst.kernels import attention_prefill, flash_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.flash_blocks import SHARED, TUNED, Blocks, Part, safe_blocks
from ptst.kernels.joined import gradients_like
from ptst.kernels.tuned import entry_name

PAGE = 32  # tokens, as the engine's pages have
# Milliseconds of one pass with these blocks; None where they do not compile or do not fit.
Timer = Callable[[Part, Blocks, int, int], float | None]


def candidates(arch: int, head_dim: int, part: Part) -> Iterator[Blocks]:
    """The safe entry, then others whose tiles fit into the GPU's shared memory."""
    safe = safe_blocks(arch, head_dim, torch.bfloat16, part)
    yield safe
    for queries in (32, 64, 128):
        for keys in (32, 64, 128):
            for warps in (4, 8):
                for stages in (3, 4, 5) if part == "prefill" else (2, 3, 4):
                    found = replace(safe, queries=queries, keys=keys, warps=warps, stages=stages)
                    if found != safe and tiles(found, head_dim, part) <= SHARED.get(arch, max(SHARED.values())):
                        yield found


def tiles(shape: Blocks, head_dim: int, part: Part) -> int:
    """Bytes of the tiles in shared memory: what a program keeps, and what its pipeline copies. Of `prefill` at least:
    two of its stages wait for a page's number, and its queries may lie in registers."""
    own, stepped = (shape.keys, shape.queries) if part == "dkdv" else (shape.queries, shape.keys)
    if part == "prefill":
        return 2 * max(16, head_dim) * max(2, 2 * shape.stages - 5) * stepped
    kept = 1 if part == "forward" else 2
    return 2 * max(16, head_dim) * (kept * own + 2 * shape.stages * stepped)


def tune(time: Timer, arch: int, head_dim: int, group: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fastest candidate of one pass after the other, by its entry's name: {"blocks": settings, "milliseconds":
    time, "safe": time of the safe entry}. A pass of which nothing runs has no entry."""
    for part in TUNED:
        timed = [(time(part, shape, head_dim, group), shape) for shape in candidates(arch, head_dim, part)]
        ran = [(milliseconds, shape) for milliseconds, shape in timed if milliseconds is not None]
        if ran:
            best, shape = min(ran, key=lambda pair: pair[0])
            entry = {"blocks": asdict(shape), "milliseconds": best, "safe": timed[0][0]}
            yield entry_name(part, head_dim, group), entry


def gpu_timer(tokens: int) -> Timer:
    """Times one document of so many tokens, 8 key heads, in bfloat16, each kernel alone."""

    def time(part: Part, shape: Blocks, head_dim: int, group: int) -> float | None:
        try:
            return triton.testing.do_bench(prepared(part, shape, tokens, (head_dim, group), "cuda"))
        except triton.TritonError:  # it does not compile, or does not fit
            return None
        except RuntimeError as error:
            if "PassManager" in str(error):  # the compiler gave up
                return None
            raise

    return time


def prepared(part: Part, shape: Blocks, tokens: int, heads: tuple[int, int], device: str) -> Callable[[], object]:
    """One pass over a document of so many tokens, ready to run. `heads`: head_dim, and query heads for each of 8 key
    heads."""
    head_dim, group = heads
    q, k, v, do = (
        torch.randn(tokens, number, head_dim, dtype=torch.bfloat16, device=device)
        for number in (8 * group, 8, 8, 8 * group)
    )
    if part == "prefill":
        pages = -(-tokens // PAGE)
        keys, values = torch.randn(2, pages, 8, PAGE, head_dim, dtype=q.dtype, device=device).transpose(2, 3)
        order = torch.randperm(pages, device=device).int()[None]
        blocks_B5 = attention_prefill.table_of([(tokens, tokens)], group, shape.queries, q.device)
        return partial(attention_prefill.launch, q, keys, values, order, blocks_B5, shape, 0)
    bounds = ((0, tokens), (0, tokens), 0)
    if part == "forward":
        return partial(flash_attention.launch_forward, q, k, v, bounds, shape)
    statistics = torch.zeros(8 * group, tokens, device=device)
    given, (dq, dk, dv) = (q, k, v, do, statistics, statistics), gradients_like(q, k, v)
    if part == "dq":
        return partial(flash_attention.launch_dq, given, bounds, shape, dq)
    return partial(flash_attention.launch_dkdv, given, bounds, shape, dk, dv)
