"""Block shapes of flash attention, in training and over the paged cache: by architecture, head_dim and pass; those that
were tuned on this machine come first.

The entries below are the safe ones: python -m ptst.kernels.compile compiles each for its architecture and fails if a
register spills or the GPU's shared memory does not suffice. None has been timed. `ptst tune-kernels` times the
candidates on the machine at hand and keeps the fastest (tuned.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ptst.kernels.tuned import entry_name, read_tuned

Part = Literal["forward", "dq", "dkdv", "prefill"]
PARTS: tuple[Part, ...] = ("forward", "dq", "dkdv")
TUNED: tuple[Part, ...] = (*PARTS, "prefill")


@dataclass(frozen=True)
class Blocks:
    """A program takes `queries` (forward, dq) or `keys` (dk, dv), and steps by the other; `edge`: the step where scores
    are masked. `stages`: blocks in the pipeline of copies; `tma`: copied by tensor descriptor."""

    queries: int
    keys: int
    edge: int
    warps: int
    stages: int
    edge_stages: int = 1
    tma: bool = False


# Shared memory that a program can have, bytes (CUDA programming guide, table of compute capabilities).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# By head_dim, up to that many columns. Half precision.
_SM80: dict[int, dict[Part, Blocks]] = {
    64: {"forward": Blocks(128, 64, 64, 8, 3), "dq": Blocks(64, 64, 64, 8, 2), "dkdv": Blocks(32, 64, 32, 4, 2)},
    128: {"forward": Blocks(128, 64, 32, 8, 3), "dq": Blocks(64, 64, 32, 8, 2), "dkdv": Blocks(64, 64, 32, 8, 2)},
    256: {"forward": Blocks(64, 32, 32, 8, 2), "dq": Blocks(64, 32, 32, 8, 1), "dkdv": Blocks(16, 64, 16, 8, 1)},
}
_SM86: dict[int, dict[Part, Blocks]] = {
    64: {"forward": Blocks(128, 64, 64, 8, 2), "dq": Blocks(64, 64, 64, 8, 2), "dkdv": Blocks(32, 64, 32, 4, 2)},
    128: {"forward": Blocks(64, 64, 32, 4, 2), "dq": Blocks(64, 32, 32, 4, 2), "dkdv": Blocks(32, 64, 32, 8, 2)},
    256: {"forward": Blocks(64, 32, 32, 8, 1), "dq": Blocks(32, 32, 32, 4, 1), "dkdv": Blocks(16, 32, 16, 8, 1)},
}
_SM90: dict[int, dict[Part, Blocks]] = {
    64: {
        "forward": Blocks(128, 64, 64, 8, 3, 2, True),
        "dq": Blocks(128, 64, 64, 8, 3, 2, True),
        "dkdv": Blocks(64, 128, 32, 8, 3, 2, True),
    },
    128: {
        "forward": Blocks(128, 128, 64, 8, 3, 2, True),
        "dq": Blocks(128, 64, 32, 8, 3, 2, True),
        "dkdv": Blocks(64, 128, 32, 8, 3, 2, True),
    },
    256: {
        # Warpgroup products of 256 columns leave no registers for a second one: backward does without them.
        "forward": Blocks(128, 64, 16, 8, 2, 1, True),
        "dq": Blocks(32, 32, 32, 4, 1),
        "dkdv": Blocks(32, 32, 16, 8, 1, 1, True),
    },
}
_SM100: dict[int, dict[Part, Blocks]] = {
    64: {
        "forward": Blocks(128, 64, 64, 4, 3, 1, True),
        "dq": Blocks(128, 64, 32, 4, 3, 1, True),
        "dkdv": Blocks(64, 128, 32, 8, 2, 1, True),
    },
    128: {
        "forward": Blocks(128, 64, 64, 8, 3, 1, True),
        "dq": Blocks(128, 64, 32, 4, 2, 1, True),
        "dkdv": Blocks(64, 128, 32, 8, 2, 1, True),
    },
    256: {
        "forward": Blocks(128, 64, 16, 8, 2, 1, True),
        "dq": Blocks(64, 32, 32, 8, 2, 1, True),
        "dkdv": Blocks(32, 64, 16, 8, 1, 1, True),
    },
}
_SM120 = _SM86 | {
    64: _SM86[64] | {"dq": Blocks(64, 64, 32, 8, 2)},
    128: _SM86[128] | {"forward": Blocks(64, 32, 32, 4, 3), "dq": Blocks(64, 32, 32, 8, 2)},
}
BLOCKS = {80: _SM80, 86: _SM86, 89: _SM86, 90: _SM90, 100: _SM100, 120: _SM120}
# Twice the bytes, and no tensor cores.
FLOAT32: dict[int, dict[Part, Blocks]] = {
    64: {"forward": Blocks(32, 32, 32, 4, 1), "dq": Blocks(32, 32, 32, 8, 1), "dkdv": Blocks(32, 16, 16, 8, 1)},
    128: {"forward": Blocks(16, 32, 32, 8, 1), "dq": Blocks(16, 32, 16, 8, 1), "dkdv": Blocks(32, 16, 16, 8, 1)},
    256: {"forward": Blocks(16, 16, 16, 16, 1), "dq": Blocks(16, 16, 16, 8, 1), "dkdv": Blocks(16, 16, 16, 8, 1)},
}
# Of attention over the paged cache (attention_prefill.py): `queries` are rows, queries x heads of a group. A page's
# number is loaded before its keys, so that of `stages` two are no copies of tiles.
_PREFILL86 = {64: Blocks(128, 64, 64, 8, 5), 128: Blocks(64, 64, 32, 4, 5), 256: Blocks(64, 32, 32, 8, 3)}
PREFILL: dict[int, dict[int, Blocks]] = {
    80: {64: Blocks(128, 64, 64, 8, 5), 128: Blocks(128, 64, 32, 8, 5), 256: Blocks(64, 32, 32, 8, 4)},
    86: _PREFILL86,
    89: _PREFILL86,
    90: {64: Blocks(128, 64, 64, 4, 5), 128: Blocks(128, 128, 64, 8, 5), 256: Blocks(128, 64, 32, 8, 3)},
    100: {64: Blocks(128, 64, 64, 8, 5), 128: Blocks(128, 64, 64, 8, 5), 256: Blocks(128, 32, 32, 8, 4)},
    120: _PREFILL86,
}
PREFILL32 = {64: Blocks(32, 32, 32, 4, 1), 128: Blocks(16, 32, 32, 8, 1), 256: Blocks(16, 16, 16, 16, 1)}
# Where ptxas, which stops at 48, 64 or 80 registers, would spill a few bytes of the entry above: dq, by architecture
# and columns.
_FLOAT32_DQ = {
    (80, 128): Blocks(16, 64, 16, 8, 1),
    (86, 64): Blocks(32, 32, 16, 8, 1),
    (89, 64): Blocks(32, 32, 16, 8, 1),
    (100, 128): Blocks(16, 16, 16, 8, 1),
    (120, 128): Blocks(16, 16, 16, 8, 1),
}


def safe_blocks(arch: int, head_dim: int, dtype: torch.dtype, part: Part) -> Blocks:
    """The safe entry of an architecture (90 for sm_90); of one without entries, that of the nearest older one."""
    known = _known(arch)
    if part == "prefill":
        return PREFILL32[_size(head_dim)] if dtype == torch.float32 else PREFILL[known][_size(head_dim)]
    if dtype == torch.float32:
        blocks = FLOAT32[_size(head_dim)][part]
        return _FLOAT32_DQ.get((known, _size(head_dim)), blocks) if part == "dq" else blocks
    return BLOCKS[known][_size(head_dim)][part]


def _size(head_dim: int) -> int:
    return next((size for size in (64, 128) if head_dim <= size), 256)


def _known(arch: int) -> int:
    """The nearest architecture that has entries, not a newer one."""
    return max(known for known in BLOCKS if known <= max(arch, 80))


@lru_cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _tuned(device: torch.device) -> dict[str, Blocks]:
    return {name: Blocks(**settings) for name, settings in read_tuned(torch.cuda.get_device_name(device)).items()}


def blocks_of(
    arch: int | None, device: torch.device, head_dim: int, dtype: torch.dtype, group: int, part: Part
) -> Blocks:
    """The tuned entry of this machine's GPU (both half precisions have the same), or else the safe one of its
    architecture; with `arch`, that one's. In the interpreter, the oldest architecture's."""
    if arch is not None or device.type != "cuda":
        return safe_blocks(arch or min(SHARED), head_dim, dtype, part)
    tuned = None if dtype == torch.float32 else _tuned(device).get(entry_name(part, head_dim, group))
    return tuned or safe_blocks(_architecture(device), head_dim, dtype, part)
