"""A running average of weights: less noisy than the weights themselves (Polyak and Juditsky, 1992).

    average_t = b average_(t-1) + (1 - b) weights_t,   b = min(decay, t / (t + 1))

so that at first it is the plain mean of all weights so far, those before training included. It is kept in float32 or
wider: in bfloat16 a tenth of a small step would be rounded away.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The average of these weights; `decay` is 0 (the weights themselves) or more, and below 1."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.weights, self.decay = weights, decay
        self._average = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for name, w in weights.items()
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the weights, and their average under `average.<name>`."""
        return {**self.weights, **{f"average.{name}": t for name, t in self._average.items()}}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
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
        """Inside, the weights are their average; after it they are themselves again."""
        held = {name: w.detach().clone() for name, w in self.weights.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(held[name])
