"""CPU loops, compiled at run time by Numba.

Decoding on a CPU is many small operations: each torch operation costs a few microseconds to launch, and some (paged
attention) exist in torch only as a chain of copies. Numba compiles plain Python loops without a C++ compiler on the
machine and caches the machine code on disk. The loops compute in float32; other dtypes, and machines without Numba,
take the plain-torch paths.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

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
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    determined_by = repr((inspect.getsource(function), constants, options | {"fastmath": sorted(FAST)}))
    function.__name__ += "_" + hashlib.sha256(determined_by.encode()).hexdigest()[:16]
    function.__qualname__ = function.__name__
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no writable cache folder
        return njit(**options)(function)


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
