"""Which block shapes of flash attention are the fastest on the GPU at hand: each candidate is compiled and timed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from ptst.kernels import flash_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.flash_blocks import PARTS, SHARED, Blocks, Part, safe_blocks
from ptst.kernels.joined import gradients_like
from ptst.kernels.tuned import entry_name

# Milliseconds of one pass with these blocks; None where they do not compile or do not fit.
Timer = Callable[[Part, Blocks, int, int], float | None]


def candidates(arch: int, head_dim: int, part: Part) -> Iterator[Blocks]:
    """The safe entry, then others whose tiles fit into the GPU's shared memory."""
    safe = safe_blocks(arch, head_dim, torch.bfloat16, part)
    yield safe
    for queries in (32, 64, 128):
        for keys in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    found = replace(safe, queries=queries, keys=keys, warps=warps, stages=stages)
                    if found != safe and tiles(found, head_dim, part) <= SHARED.get(arch, max(SHARED.values())):
                        yield found


def tiles(shape: Blocks, head_dim: int, part: Part) -> int:
    """Bytes of the tiles in shared memory: what a program keeps, and what its pipeline copies."""
    own, stepped = (shape.keys, shape.queries) if part == "dkdv" else (shape.queries, shape.keys)
    kept = 1 if part == "forward" else 2
    return 2 * max(16, head_dim) * (kept * own + 2 * shape.stages * stepped)


def tune(time: Timer, arch: int, head_dim: int, group: int) -> dict[str, dict[str, Any]]:
    """The fastest candidate of each pass: {entry name: {"blocks": settings, "milliseconds": time, "safe": time of the
    safe entry}}. A pass of which nothing runs has no entry."""
    found = {}
    for part in PARTS:
        timed = [(time(part, shape, head_dim, group), shape) for shape in candidates(arch, head_dim, part)]
        ran = [(milliseconds, shape) for milliseconds, shape in timed if milliseconds is not None]
        if ran:
            best, shape = min(ran, key=lambda pair: pair[0])
            entry = {"blocks": asdict(shape), "milliseconds": best, "safe": timed[0][0]}
            found[entry_name(part, "bfloat16", head_dim, group)] = entry
    return found


def gpu_timer(tokens: int) -> Timer:
    """Times one document of so many tokens, 8 key heads, in bfloat16, each kernel alone."""

    def time(part: Part, shape: Blocks, head_dim: int, group: int) -> float | None:
        q, k, v, do = (
            torch.randn(tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
            for heads in (8 * group, 8, 8, 8 * group)
        )
        bounds = ((0, tokens), (0, tokens), 0)
        statistics = torch.zeros(8 * group, tokens, device="cuda")
        given = (q, k, v, do, statistics, statistics)
        try:
            if part == "forward":
                return triton.testing.do_bench(lambda: flash_attention.launch_forward(q, k, v, bounds, shape))
            dq, dk, dv = gradients_like(q, k, v)
            if part == "dq":
                return triton.testing.do_bench(lambda: flash_attention.launch_dq(given, bounds, shape, dq))
            return triton.testing.do_bench(lambda: flash_attention.launch_dkdv(given, bounds, shape, dk, dv))
        except triton.TritonError:  # it does not compile, or does not fit
            return None
        except RuntimeError as error:
            if "PassManager" in str(error):  # the compiler gave up
                return None
            raise

    return time
