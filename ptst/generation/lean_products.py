"""Products of the sampler over weights of which there is no other copy: quantized ones, and those of a model of which
a packed copy (forward.py) does not fit into the memory. They read or rebuild the weights for every product, which is
slower, and take no memory between two.

Shapes: T tokens, I inputs and O outputs of a projection.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptst.model.quantized import QuantizedWeight
from ptst.progress import say_once
from ptst.system_memory import free_memory

SHARE = 0.8  # of the free memory that a packed copy may take
WIDENED = 2**24  # elements that are float32 at a time


def room_to_pack(num_bytes: int) -> bool:
    """Whether a packed copy of weights of this size fits into the free memory; says so where it does not."""
    free = free_memory("cpu")
    if num_bytes <= SHARE * free:
        return True
    copy = f"a packed copy of the weights takes {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    say_once(f"note: {copy}: answers are computed without one, slower and with other last digits")
    return False


def unpacked_product(w_OI: Tensor, b_O: Tensor | None, amx: bool) -> Callable[[Tensor], Tensor]:
    """x (T, I) in float32 -> x W^T + b in float32, over a 16-bit weight as it is. `amx`: as `amx_product`, x and the
    result are rounded to bfloat16; otherwise the weight is widened, some rows at a time."""
    if amx:
        half_O = None if b_O is None else b_O.bfloat16()
        return lambda x_TI: nn.functional.linear(x_TI.bfloat16(), w_OI, half_O).float()
    parts = w_OI.split(max(1, WIDENED // w_OI.shape[1]))

    def multiply(x_TI: Tensor) -> Tensor:
        y_TO = torch.cat([x_TI @ part.float().t() for part in parts], dim=1)
        return y_TO if b_O is None else y_TO + b_O

    return multiply


def quantized_product(weights: Sequence[Tensor], b_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x (T, I) -> x W^T + b in x's dtype over weights of which some are quantized, one after the other."""

    def multiply(x_TI: Tensor) -> Tensor:
        y_TO = torch.cat([x_TI @ _dense(w_OI, x_TI.dtype).t() for w_OI in weights], dim=1)
        return y_TO if b_O is None else y_TO + b_O

    return multiply


def _dense(w_OI: Tensor, dtype: torch.dtype) -> Tensor:
    return (w_OI.dense() if isinstance(w_OI, QuantizedWeight) else w_OI).to(dtype)
