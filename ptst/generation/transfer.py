"""Copies to and from the device that do not wait for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device`. To a GPU through pinned memory: a plain copy would wait for all that runs there."""
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class HostCopy:
    """A tensor that is being copied to the host; `wait` returns it once it has arrived."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._arrived = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
