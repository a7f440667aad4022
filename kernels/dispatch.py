"""Choice of the backend of an operation: Triton on CUDA, plain torch elsewhere (for decoding on a CPU, Numba: cpu.py).

`PTST_KERNELS=reference` forces plain torch everywhere; `PTST_KERNELS=triton` forces Triton, which on a CPU works only
in Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported); the tests use it.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ptst.errors import UserError

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Triton exists for Linux only
    triton = tl = None

    def jit(function=None, **_options):
        return function or (lambda function: function)


CHOICES = ("auto", "reference", "triton")
MOST_ROWS = 65532  # of a grid's second axis (CUDA: 65,535), so that each part of a table begins at 16 bytes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels compute in


def choice() -> str:
    """The value of PTST_KERNELS. Raises UserError if it is unknown."""
    chosen = os.environ.get("PTST_KERNELS", "auto")
    if chosen not in CHOICES:
        raise UserError(f"PTST_KERNELS is {chosen!r}", f"it must be one of {', '.join(CHOICES)}")
    return chosen


def use_triton(*tensors: Tensor) -> bool:
    """Whether these tensors take the Triton kernels; float64 does not, unless PTST_KERNELS asks for it. Raises
    UserError if PTST_KERNELS is unknown, or is `triton` where Triton cannot run, and ValueError for tensors that no
    kernel can take: of another dtype than DTYPES under PTST_KERNELS=triton, or on a GPU that is not the current one."""
    chosen = choice()
    if chosen == "reference":
        return False
    on_gpu = all(t.is_cuda for t in tensors)
    fits = all(t.dtype in DTYPES for t in tensors)
    if chosen == "auto" and not (on_gpu and fits and triton is not None):
        return False
    if triton is None or not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        remedy = "it needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
        raise UserError("PTST_KERNELS=triton does not work here", remedy)
    if not fits:
        raise ValueError(f"the kernels compute in {', '.join(map(str, DTYPES))}, not on {_told(tensors)}")
    if on_gpu and not torch.compiler.is_compiling():
        _check_current(tensors)
    return True


def _told(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors)


def _check_current(tensors: Sequence[Tensor]) -> None:
    """Triton launches on the current GPU, whose context knows nothing of another one's memory."""
    current = torch.cuda.current_device()
    if any(t.device.index != current for t in tensors):
        remedy = f"call torch.cuda.set_device({tensors[0].device.index}) first"
        raise ValueError(f"{_told(tensors)}: the current GPU is cuda:{current}; {remedy}")


def check_alike(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share device and dtype, a floating one, and their last axis is contiguous."""
    (first, lead), *rest = tensors.items()
    if not lead.is_floating_point():
        raise ValueError(f"{first} {tuple(lead.shape)} is {lead.dtype}; it must hold real numbers")
    for name, t in rest:
        if t.device != lead.device or t.dtype != lead.dtype:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, but {first} is {lead.dtype} on {lead.device}")
    for name, t in tensors.items():
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} {tuple(t.shape)} is not contiguous; call .contiguous() first")


def check_integers(device: torch.device, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold integers on `device`, one after another along the last axis."""
    for name, t in tensors.items():
        if t.device != device or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"{name} {tuple(t.shape)} is {t.dtype} on {t.device}; it must hold integers on {device}")
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} {tuple(t.shape)} is not contiguous; call .contiguous() first")


def check_frozen(**tensors: Tensor | None) -> None:
    """Raise ValueError for tensors whose gradient is wanted: what is called here forms none of them."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} {tuple(t.shape)} requires a gradient, but none is formed; freeze it, or use torch.no_grad()"
            )


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere those of an H200, for the compiler and the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def block(n: int, most: int) -> int:
    """The smallest power of two that is at least n, but at most `most`."""
    return min(most, 1 << max(0, (n - 1).bit_length()))


def launchable(table: Tensor) -> Sequence[Tensor]:
    """A table of blocks in parts, each with a row per program of the grid's second axis."""
    return [table] if len(table) <= MOST_ROWS else table.split(MOST_ROWS)


def whole_block(what: str, n: int, most: int) -> int:
    """The smallest power of two that is at least n, for what must lie in one block. Raises ValueError above `most`."""
    if n > most:
        raise ValueError(f"{what} is {n}; the kernel takes at most {most}")
    return block(n, most)
