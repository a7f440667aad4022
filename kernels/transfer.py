"""Copies to a GPU that the host does not wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether a copy there from pageable memory makes the host wait for all that is queued on it."""
    return device.type == "cuda"


def to_device(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device`, of `dtype` if `values` are numbers. To a GPU through pinned memory."""
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if x.device.type == "cpu" and waits(device):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
