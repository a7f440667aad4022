"""The main loops of the compiled kernels: a table of what they do and of the bounds that follow, and a watch over their
length: main_loops.json holds their instructions, by version of Triton, and none may grow by more than 5 %."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptst.kernels import flash_attention
from ptst.kernels.flash_blocks import PARTS, Blocks, Part, safe_blocks
from ptst.kernels.machine_code import Loop
from ptst.kernels.roofline import (
    CHIPS,
    Bound,
    attention_seconds,
    blocks_per_sm,
    bound,
    steps,
    streaming_bound,
)

if TYPE_CHECKING:
    from ptst.kernels.compile import Compiled

ARCH = 90
DTYPE = "bfloat16"  # of what README shows
GROWTH = 1.05
FILE = Path(__file__).resolve().parent / "main_loops.json"
TOKENS, HEADS, GROUP = 8192, 32, 4  # one document, Llama-3-8B's heads
TILE = 128 * 64  # scores
PRODUCTS = {"forward": 2, "prefill": 2, "dq": 3, "dkdv": 4}  # of attention, in the loop of each kernel


def _key(c: "Compiled") -> str:
    return f"sm_{c.arch} {c.name}: {c.note}"


def counts(compiled: Sequence["Compiled"]) -> dict[str, int]:
    """Instructions of each main loop by kernel and launch; the longest where a launch has a kernel twice."""
    found: dict[str, int] = {}
    for c in compiled:
        if c.main is not None:
            found[_key(c)] = max(c.main.instructions, found.get(_key(c), 0))
    return found


def read() -> dict[str, dict[str, int]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(version: str, compiled: Sequence["Compiled"]) -> None:
    FILE.write_text(json.dumps(read() | {version: counts(compiled)}, indent=1) + "\n")


def grown(version: str, compiled: Sequence["Compiled"]) -> list[str]:
    """A sentence for each main loop that is more than 5 % longer than it was, or that is new to the file."""
    known = read().get(version)
    if known is None:
        return []
    remedy = "if it must be so: python -m ptst.kernels.compile --loops"
    found = []
    for name, now in counts(compiled).items():
        if name not in known:
            found.append(f"{name} is not in {FILE.name}; {remedy}")
        elif now > GROWTH * known[name]:
            found.append(f"{name}: the main loop has {now} instructions, it had {known[name]}; {remedy}")
    return found


def _ahead(c: "Compiled", loop: Loop) -> int:
    """Tiles of later passages that are under way when a passage begins."""
    if c.tiles and loop is c.main:
        return c.tiles * max(0, c.stages - 2)
    return loop.waits_with if loop.copies else 0


def _bound(c: "Compiled", loop: Loop) -> Bound:
    chip = CHIPS[c.arch]
    blocks = blocks_per_sm(chip, c.registers, c.warps, c.shared)
    if c.name not in PRODUCTS or not loop.flops:
        return streaming_bound(chip, loop, c.warps, blocks)
    return bound(chip, loop, c.warps, blocks, c.tma_bytes if loop is c.main else 0, _ahead(c, loop) > 0)


def _number(c: "Compiled", name: str) -> int:
    """A number of the launch: D from its note, BD from its block shapes."""
    return next(int(word.split("=")[1]) for word in f"{c.note} {c.blocks}".split() if word.startswith(f"{name}="))


def _per_tile(c: "Compiled", loop: Loop) -> float:
    """Passages of this loop for 128 x 64 scores, times its warps over 8: what a count is multiplied by."""
    scores = loop.flops * c.warps / (2 * _number(c, "BD") * PRODUCTS[c.name])
    return TILE / scores * c.warps / 8


def attention_bound(compiled: Sequence["Compiled"]) -> tuple[float, float]:
    """Bounds on FLOP/s of attention, forward and backward (10 P H D FLOPs), at head_dim 128, with edges and the last
    programs, which run alone."""
    of = {c.name: c for c in compiled if c.note == f"attention {DTYPE} D=128 W=0" and c.arch == ARCH}
    seconds = {part: _seconds(of[part], part, safe_blocks(ARCH, 128, torch.bfloat16, part)) for part in PARTS}
    pairs = TOKENS * (TOKENS + 1) / 2 * HEADS * 128
    delta = 2 * TOKENS * HEADS * 128 * 2 / CHIPS[ARCH].bandwidth
    return 4 * pairs / seconds["forward"], 10 * pairs / (seconds["dq"] + seconds["dkdv"] + delta)


def _seconds(c: "Compiled", part: Part, shape: Blocks) -> float:
    of_keys = part == "dkdv"
    size = shape.keys if of_keys else shape.queries
    entries = flash_attention.table((0, TOKENS), (0, TOKENS), size, torch.device("cpu"), 0, of_keys).tolist()
    work = [steps(part, tuple(entry), shape, GROUP) for entry in entries]
    assert c.main is not None
    edge = c.edge or c.main
    return attention_seconds(
        CHIPS[ARCH], work, _bound(c, c.main), _bound(c, edge), HEADS // GROUP if of_keys else HEADS
    )


def markdown(compiled: Sequence["Compiled"]) -> list[str]:
    """The table of main loops and the sentence about attention."""
    head = [
        "kernel",
        "launch",
        "loop",
        "tensor",
        "EX2",
        "shared",
        "global",
        "copies",
        "ahead",
        "registers",
        "blocks per SM",
    ]
    lines = [
        f"Main loops on sm_{ARCH}, instructions per warp and passage (attention: per 128 x 64 scores and 8 warps);",
        "`ahead`: tiles of later passages under way when one begins; `per SM`: blocks of threads (`roofline.py`).",
        "",
        "| " + " | ".join([*head, "bound", "set by"]) + " |",
        "|" + "---|" * (len(head) + 2),
    ]
    seen = set()
    for c in compiled:
        if c.main is None or _key(c) in seen:
            continue
        seen.add(_key(c))
        products = c.name in PRODUCTS and c.main.flops > 0
        factor = _per_tile(c, c.main) if products else 1.0
        m, b = c.main, _bound(c, c.main)
        cells = [m.instructions, m.tensor, m.exponentials, m.shared, m.global_accesses, m.copies]
        useful = _number(c, "D") / _number(c, "BD") if products else 1.0  # columns that head_dim leaves empty
        rate = f"{b.per_second * useful / 1e12:.0f} TFLOP/s" if products else f"{b.per_second / 1e9:.0f} GB/s"
        what = [c.name, c.note, *(f"{n * factor:.0f}" for n in cells)]
        what += [str(n) for n in (_ahead(c, m), c.registers, b.blocks)]
        lines.append("| " + " | ".join([*what, rate, b.resource]) + " |")
    if any(c.note == f"attention {DTYPE} D=128 W=0" for c in compiled):
        forward, backward = attention_bound(compiled)
        lines += [
            "",
            f"With edges and the last programs, {TOKENS} tokens in one document, {HEADS} query heads of 128 and",
            f"{HEADS // GROUP} key heads: at most {forward / 1e12:.0f} TFLOP/s forward,",
            f"{backward / 1e12:.0f} backward. Not run on a GPU.",
        ]
    return lines
