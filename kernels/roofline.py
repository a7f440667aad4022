"""Bounds on the speed of a compiled loop, from its machine code: which resource sets it. A model, not a measurement.

A passage of a block of threads takes, in clocks of a streaming multiprocessor (SM), at least

    tensor cores   flops / (4096 per clock on sm_90)         issue          instructions * warps / 4 schedulers
    exponentials   32 * warps * EX2 / 16                     shared memory  bytes / 128
    L2 cache       bytes / (5120 per clock of the whole chip)

The bound is pessimistic about overlap: within a block of threads, products wait for the softmax and the softmax for
products, so that a passage takes their sum, and only other blocks on the same SM fill the gaps. A loop whose copies
have not been started a passage ahead waits for the L2 cache's latency as well. It is optimistic in all else: no stall,
no bank conflict. For memory-bound loops the bytes in flight count, too (Little's law).
"""

import heapq
from dataclasses import dataclass

from ptst.kernels.flash_blocks import Blocks, Part
from ptst.kernels.machine_code import LANES, Loop

L2_LATENCY = 800  # clocks: from a copy's start to its data in shared memory (assumed)
MEMORY_LATENCY = 700e-9  # seconds, under load (assumed)
PROGRAM = 2000  # clocks: a program's start, first copies and last stores (assumed)


@dataclass(frozen=True)
class Chip:
    """What one GPU offers; rates per clock and SM. `clock`: under load, not the data sheet's highest."""

    sms: int
    clock: float
    tensor: int
    l2: float
    shared: int  # bytes of an SM
    bandwidth: float


CHIPS = {
    80: Chip(108, 1.3e9, 2048, 5120 / 108, 164 * 1024, 2.04e12),  # A100 80 GB
    90: Chip(132, 1.6e9, 4096, 5120 / 132, 228 * 1024, 4.3e12),  # H200
}


@dataclass(frozen=True)
class Bound:
    """`clocks` of a passage, per block of threads, where `blocks` of them share an SM; `resource` sets them."""

    clocks: float
    resource: str
    blocks: int
    flops: float
    per_second: float  # FLOP, or bytes where there are no products


def blocks_per_sm(chip: Chip, registers: int, warps: int, shared: int) -> int:
    """How many blocks of threads an SM holds at once."""
    by_registers = 65536 // (-(-registers // 8) * 8 * LANES * warps)
    return max(1, min(by_registers, chip.shared // (shared + 1024), 64 // warps, 32))


def bound(chip: Chip, loop: Loop, warps: int, blocks: int, tma_bytes: int, ahead: bool) -> Bound:
    """The bound on a loop with tensor-core products. `tma_bytes`: copied by TMA in a passage, which no warp's
    instructions show; `ahead`: whether all of a passage's copies were started a passage before."""
    clocks = {
        "tensor cores": loop.flops * warps / chip.tensor,
        "issue": loop.instructions * warps / 4,
        "exponentials": loop.exponentials * LANES * warps / 16,
        "shared memory": (loop.shared_bytes + loop.operand_bytes) * warps / 128,
        "L2": (loop.global_bytes * warps + tma_bytes) / chip.l2,
    }
    between = max(clocks["issue"], clocks["exponentials"], loop.shared_bytes * warps / 128)
    chain = clocks["tensor cores"] + between + (0 if ahead else L2_LATENCY)
    resource = max(clocks, key=lambda name: clocks[name])
    time = clocks[resource]
    if chain / blocks > time:
        time = chain / blocks
        resource = "products and softmax in turn" if ahead else "copies, products, softmax in turn"
    flops = loop.flops * warps
    return Bound(time, resource, blocks, flops, flops / time * chip.clock * chip.sms)


def streaming_bound(chip: Chip, loop: Loop, warps: int, blocks: int) -> Bound:
    """The bound on a loop without products: bytes per second."""
    issue = loop.instructions * warps / 4
    moved, loaded = max(1, loop.global_bytes * warps), loop.load_bytes * warps
    rates = {"memory": chip.bandwidth, "issue": moved / issue * chip.clock * chip.sms}
    if loaded:  # what is stored meanwhile counts, too
        rates["bytes in flight"] = moved * blocks * chip.sms / MEMORY_LATENCY
    resource = min(rates, key=lambda name: rates[name])
    return Bound(issue, resource, blocks, 0, rates[resource])


def steps(part: Part, entry: tuple[int, int, int, int], shape: Blocks, group: int) -> tuple[int, int]:
    """(unmasked, masked) steps of the program of a table's entry, without a window, as the kernels loop."""
    start, end, begin, other_end = entry
    if part == "dkdv":
        offset = end - other_end
        low, high = max(begin, start - offset), other_end
        span = max(start + shape.keys - 1 - offset - low, 0)
        first = min(low + -(-span // shape.edge) * shape.edge, high)
        last = first + (high - first) // shape.queries * shape.queries
        edges = -(-(first - low) // shape.edge) - (-(high - last) // shape.edge)
        return (last - first) // shape.queries * group, edges * group
    offset = other_end - end
    last = begin + (start + offset + 1 - begin) // shape.keys * shape.keys
    high = min(start + shape.queries, end) + offset
    return (last - begin) // shape.keys, -(-(high - last) // shape.edge)


def makespan(times: list[float], slots: int) -> float:
    """When the last program ends, programs being handed to whichever slot is free first, in their order."""
    free = [0.0] * slots
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def attention_seconds(chip: Chip, work: list[tuple[int, int]], main: Bound, edge: Bound, heads: int) -> float:
    """Of one kernel, its programs' (unmasked, masked) steps given, each for all heads."""
    times = [(a * main.clocks * main.blocks + b * edge.clocks * edge.blocks) + PROGRAM for a, b in work]
    return makespan([t for t in times for _ in range(heads)], chip.sms * main.blocks) / chip.clock
