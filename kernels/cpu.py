"""Loops for a CPU, compiled at run time by Numba.

Decoding on a CPU is many small operations: each of torch's costs a few microseconds to launch, and some of them
(attention over a cache in blocks) it has only as a chain of copies. Numba turns plain Python loops into machine code
without a C++ compiler on the machine, and keeps it on disk for the next process. What goes through it is computed in
float32; everything else, and a machine without Numba, takes the plain-torch paths.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ptst.kernels.dispatch import choice

# Sums may be taken in any order. Not among them: that there are no infinities and no NaN, which must come through.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:  # not there, or of another NumPy than this
        return False
    return True


def use_numba(*tensors: Tensor) -> bool:
    """Whether these tensors go through Numba's loops. Raises ValueError for an unknown PTST_KERNELS."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return choice() == "auto" and fitting and _has_numba()


def compiled(function: Callable) -> Callable:
    """The function as machine code that lets other threads run; kept on disk where there is a place for it."""
    from numba import njit

    options = {"nogil": True, "error_model": "numpy", "fastmath": FAST}
    # The name of the file on disk holds all that the code is made of: the constants too, which are no part of it
    # otherwise, so that two processes that compile for two models at once cannot take each other's.
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    made_of = repr((inspect.getsource(function), constants, options | {"fastmath": sorted(FAST)}))
    function.__name__ += "_" + hashlib.sha256(made_of.encode()).hexdigest()[:16]
    function.__qualname__ = function.__name__
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        return njit(**options)(function)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="ptst")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of them


def spread(function: Callable, arguments: tuple, ends: list[int]) -> None:
    """function(*arguments, start, end) for each piece between two neighbouring `ends`, side by side in threads."""
    if len(ends) > 2:
        others = [_threads().submit(function, *arguments, *piece) for piece in pairwise(ends[1:])]
        function(*arguments, *ends[:2])
        wait(others)
        for other in others:
            other.result()  # raises what it raised
    else:
        function(*arguments, *ends)


def pieces(costs: int, least: int) -> int:
    """Among how many threads to spread work of this cost, where `least` is worth a thread of its own."""
    return max(1, min(torch.get_num_threads(), costs // least))
