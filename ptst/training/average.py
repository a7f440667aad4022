"""A running average of weights: less noisy than the weights themselves (Polyak and Juditsky, 1992).

    average_t = b average_(t-1) + (1 - b) weights_t,   b = min(decay, t / (t + 1))

so that at first it is the plain mean of all weights, those before training among them. It is kept in float32 at least:
in bfloat16 a tenth of a small step would be rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The average of these weights; `decay` from 0 (it is the weights) to below 1."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.weights, self.decay = weights, decay
        wide = {name: torch.promote_types(w.dtype, torch.float32) for name, w in weights.items()}
        self._average = {name: w.detach().to(wide[name], copy=True) for name, w in weights.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a state must hold: the weights and, under other names, their average."""
        return {**self.weights, **{f"average.{name}": t for name, t in self._average.items()}}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        kept = min(self.decay, step / (step + 1))
        for name, weight in self.weights.items():
            average = self._average[name]
            average.lerp_(weight.to(average.dtype), 1 - kept)

    @torch.no_grad()
    def put(self) -> None:
        """Overwrite the weights with their average."""
        for name, weight in self.weights.items():
            weight.copy_(self._average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in the weights' place for a while."""
        held = {name: w.detach().clone() for name, w in self.weights.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(held[name])
