"""Choice of the backend of an operation: Triton on CUDA, plain torch elsewhere (for decoding on a CPU, Numba: cpu.py).

`PTST_KERNELS=reference` forces plain torch everywhere; `PTST_KERNELS=triton` forces Triton, which on a CPU works only
in Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported); the tests use it.
"""

import os

from torch import Tensor

from ptst.errors import UserError

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Triton exists for Linux only
    triton = tl = None

    def jit(function):
        return function


CHOICES = ("auto", "reference", "triton")


def choice() -> str:
    """The value of PTST_KERNELS. Raises UserError if it is unknown."""
    chosen = os.environ.get("PTST_KERNELS", "auto")
    if chosen not in CHOICES:
        raise UserError(f"PTST_KERNELS is {chosen!r}", f"it must be one of {', '.join(CHOICES)}")
    return chosen


def use_triton(*tensors: Tensor) -> bool:
    """Whether these tensors take the Triton kernels. Raises UserError if PTST_KERNELS is unknown, or is `triton` where
    Triton cannot run."""
    chosen = choice()
    if chosen == "reference":
        return False
    on_gpu = all(t.is_cuda for t in tensors)
    if chosen == "auto":
        return on_gpu and triton is not None
    if triton is None or not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        remedy = "it needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
        raise UserError("PTST_KERNELS=triton does not work here", remedy)
    return True


def check_alike(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share device and dtype and their last axis is contiguous."""
    (first, lead), *rest = tensors.items()
    for name, t in rest:
        if t.device != lead.device or t.dtype != lead.dtype:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, but {first} is {lead.dtype} on {lead.device}")
    for name, t in tensors.items():
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} {tuple(t.shape)} is not contiguous; call .contiguous() first")


def block(n: int, most: int) -> int:
    """The smallest power of two that is at least n, but at most `most`."""
    return min(most, 1 << max(0, (n - 1).bit_length()))
