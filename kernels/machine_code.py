"""What a loop of a compiled kernel does, read from its machine code (SASS, by the nvdisasm that Triton brings).

A loop is what lies between a label and a branch back to it; the main loop is the innermost one with the most work of
tensor cores for its length (with edges that mask, the loop that masks nothing), or, without tensor cores, the one that
moves the most bytes of global memory. A kernel without a loop counts as a whole.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ptst.kernels.dispatch import triton

LANES = 32


@dataclass(frozen=True)
class Loop:
    """One passage through a loop, counted per warp. `flops` are those of its tensor-core instructions; bytes are those
    of the whole warp, `operand_bytes` those that warpgroup products read from shared memory (per warp, a quarter)."""

    instructions: int
    tensor: int
    flops: int
    exponentials: int
    shared: int
    global_accesses: int
    copies: int  # asynchronous, to shared memory
    global_bytes: int  # by the warp's own instructions; a TMA copy is no warp's
    load_bytes: int  # those of them that are read
    shared_bytes: int
    operand_bytes: int
    waits_with: int  # groups of cp.async that may still be under way when it goes on
    is_loop: bool = True


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, one instruction a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, without predicates, and the place of each label."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(re.sub(r"^@!?U?P\w+\s+", "", code[1]))
    return found, labels


def _innermost(text: str) -> tuple[list[list[str]], list[str]]:
    """The bodies of loops that hold no other loop, and all instructions."""
    found, labels = instructions(text)
    spans = []
    for at, code in enumerate(found):
        if (target := re.match(r"BRA\S*\s.*`\((\.L_x_\d+)\)", code)) and labels.get(target[1], at + 1) <= at:
            spans.append((labels[target[1]], at))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [found[a : b + 1] for a, b in inner], found


def count(body: Sequence[str], is_loop: bool = True) -> Loop:
    """Count one body."""
    kinds = Counter(code.split()[0].split(".")[0] for code in body)
    flops = operand_bytes = 0
    for code in body:
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", code):
            m, n, k = map(int, shape.groups())
            flops += 2 * m * n * k // 4  # of four warps together
            both = re.match(r"HGMMA\S*\s+R\w+,\s*gdesc", code)  # the left factor in shared memory, too
            operand_bytes += 2 * k * (n + m * bool(both)) // 4
        elif shape := re.match(r"HMMA\.(\d\d?)(\d\d?)(\d\d)?", code):
            m, n, k = (16, 8, 16) if "16816" in code else (16, 8, 8)
            flops += 2 * m * n * k
    waits = [int(code.rsplit("0x", 1)[1], 16) for code in body if code.startswith("DEPBAR.LE SB0")]
    return Loop(
        instructions=len(body),
        tensor=kinds["HGMMA"] + kinds["HMMA"],
        flops=flops,
        exponentials=sum(code.startswith("MUFU.EX2") for code in body),
        shared=sum(kinds[k] for k in ("LDS", "STS", "LDSM", "STSM", "ATOMS")),
        global_accesses=sum(kinds[k] for k in ("LDG", "STG", "RED", "ATOMG")),
        copies=kinds["LDGSTS"] + kinds["UTMALDG"],
        global_bytes=sum(_bytes(c) for c in body if c.startswith(("LDG.", "STG.", "LDGSTS."))),
        load_bytes=sum(_bytes(c) for c in body if c.startswith(("LDG.", "LDGSTS."))),
        shared_bytes=sum(_bytes(c) for c in body if c.startswith(("LDS", "STS", "LDSM", "STSM"))),
        operand_bytes=operand_bytes,
        waits_with=min(waits, default=0),
        is_loop=is_loop,
    )


def _bytes(code: str) -> int:
    """Bytes that a warp's load or store moves."""
    name = code.split()[0]
    if name.startswith(("LDSM", "STSM")):
        last = name.rsplit(".", 1)[-1]
        return 128 * (int(last) if last.isdigit() and "M88" in name else 1)
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", name)
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return LANES * (sizes[width[1]] if width else 4)


def loops(text: str) -> tuple[Loop, list[Loop]]:
    """The main loop, and the other innermost loops that compute on tensor cores (the edges), in their order."""
    inner, everything = _innermost(text)
    counted = [count(body) for body in inner]
    products = [loop for loop in counted if loop.tensor]
    if products:
        main = max(products, key=lambda loop: loop.flops / loop.instructions)
        return main, [loop for loop in products if loop is not main]
    reading = [loop for loop in counted if loop.global_bytes or loop.copies]
    if reading:
        return max(reading, key=lambda loop: loop.global_bytes), []
    return count(everything, is_loop=False), []
