"""Numbers to the device and back without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device`. To a GPU through pinned memory: a plain copy would wait for all that runs there."""
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Fetch:
    """Tensors on their way to the host. `get` waits until they are there."""

    def __init__(self, *tensors: Tensor | None):
        self._tensors, self._arrived = tensors, None
        if any(x is not None and x.is_cuda for x in tensors):
            self._tensors = tuple(
                None if x is None else torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def get(self) -> tuple[Tensor | None, ...]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
