"""A stand-in for a GPU that sees every copy for which the host would wait.

The step runs on torch's meta device, which computes nothing. Copies there from unpinned memory are noted with the line
that makes them: `x.to(device)`, `torch.tensor(..., device=device)`, an index or an operand on the CPU. So is what reads
a tensor from there, which here would have no value: the test says what is read instead.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ptst.kernels import transfer

META = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
_MOVERS = {Tensor.to, Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.index_copy_, Tensor.index_select}
_MOVERS |= {Tensor.type_as, Tensor.new_tensor}
_READERS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


class BlockingCopies(TorchFunctionMode):
    """`found`: lines of ours that copy from pageable memory. `read`: lines that wait for a value; they get ones."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.found: list[str] = []
        self.read: list[str] = []
        self._pinned: list[Tensor] = []  # held, so that no other tensor gets the same address
        patch.setattr(transfer, "waits", lambda device: device.type != "cpu")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if func in _READERS and args[0].device == META:
            self.read.append(_line())
            ones = torch.ones(args[0].shape)
            return ones if func is Tensor.cpu else func(ones)
        result = func(*args, **kwargs)
        if self._copies(func, args, kwargs, result):
            self.found.append(_line())
        return result

    def _copies(self, func, args, kwargs, result) -> bool:
        if func in _MAKERS or func is Tensor.new_tensor:
            return result.device == META
        if func not in _MOVERS or not any(isinstance(x, Tensor) and x.device == META for x in (result, *args)):
            return False
        parts = [x for a in args for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, Tensor)]
        on_host = [x for x in parts if x.device.type == "cpu"]
        pinned = all(any(x is p for p in self._pinned) for x in on_host)
        return bool(on_host) and not (pinned and kwargs.get("non_blocking"))


def _line() -> str:
    ours = [f for f in traceback.extract_stack() if f.filename.startswith((str(ROOT / "ptst"), str(ROOT / "kernels")))]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "a test"
