"""Copies to the host that it does not wait for."""

import torch
from torch import Tensor


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
