"""CPU loops, compiled at run time by Numba.

Decoding on a CPU is many small operations: each torch operation costs a few microseconds to launch, and some (paged
attention) exist in torch only as a chain of copies. Numba compiles plain Python loops without a C++ compiler on the
machine and caches the machine code on disk. The loops compute in float32; other dtypes, and machines without Numba,
take the plain-torch paths.
"""

import hashlib
import inspect
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptst.kernels.dispatch import choice

# Sums may be reordered. Infinities and NaN must propagate, so `nnan` and `ninf` are not among the flags.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:  # not installed, or built for another NumPy
        return False
    return True


def use_numba(*tensors: Tensor) -> bool:
    """Whether these tensors take the Numba loops. Raises UserError for an unknown PTST_KERNELS."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return choice() == "auto" and fitting and _has_numba()


def compiled(function: Callable) -> Callable:
    """The function as machine code that releases the GIL, cached on disk if a cache folder is writable."""
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FAST}
    # The name of the cached file hashes everything that determines the code. Numba's own key omits the constants, so
    # two processes that compile for two models at once could load each other's file.
    determined_by = repr((_sources(function), options | {"fastmath": sorted(FAST)}))
    function.__name__ += "_" + hashlib.sha256(determined_by.encode()).hexdigest()[:16]
    function.__qualname__ = function.__name__
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no writable cache folder
        return njit(**options)(function)


def _sources(function: Callable) -> tuple[str, list]:
    """The source of a function, and its constants and the functions that it calls, in the same form."""
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    return inspect.getsource(function), [_sources(v) if inspect.isfunction(v) else v for v in values]


def jitable(function: Callable) -> Callable:
    """The function in a form that compiled functions can call."""
    from numba.extending import register_jitable

    return register_jitable(fastmath=FAST, error_model="numpy")(function)


@cache
def exponential(least: float) -> Callable:
    """e^x of a float32, for use in compiled functions; an x below `least` counts as `least`, and so does NaN, which has
    no integer part.

    2^n e^u with |u| at most log(2) / 2 and a polynomial of degree 6 for e^u: an error of 2e-7 of the value where
    products and sums are one rounding."""
    one, half, lowest = np.float32(1), np.float32(0.5), np.float32(least)
    log2e, ln2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
    c2, c3, c4, c5, c6 = (np.float32(1 / math.factorial(i)) for i in range(2, 7))

    def exp(x):
        y = x if x > lowest else lowest
        n = np.floor(y * log2e + half)
        u = y - n * ln2
        e = one + u * (one + u * (c2 + u * (c3 + u * (c4 + u * (c5 + u * c6)))))
        return e * np.int32((np.int32(n) + 127) << 23).view(np.float32)

    return jitable(exp)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="ptst")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has no threads


def run_in_threads(function: Callable, arguments: tuple, ends: list[int]) -> None:
    """function(*arguments, start, end) for each piece between two neighbouring `ends`, in parallel threads."""
    if len(ends) > 2:
        others = [_threads().submit(function, *arguments, *piece) for piece in pairwise(ends[1:])]
        function(*arguments, *ends[:2])
        wait(others)
        for other in others:
            other.result()  # reraises its exception
    else:
        function(*arguments, *ends)


def num_threads_for(cost: int, least: int) -> int:
    """Number of threads for work of this cost, if `least` is worth a thread."""
    return max(1, min(torch.get_num_threads(), cost // least))
