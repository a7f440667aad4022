"""A running average of weights: less noisy than the weights themselves (Polyak and Juditsky, 1992).

    average_t = b average_(t-1) + (1 - b) weights_t,   b = min(decay, t / (t + 1))

so that at first it is the plain mean of all weights, those before training among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """The average of these weights; `decay` from 0 (it is the weights) to below 1."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.weights, self.decay = weights, decay
        self._average = {name: w.detach().clone() for name, w in weights.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a state must hold: the weights and, under other names, their average."""
        return {**self.weights, **{f"average.{name}": t for name, t in self._average.items()}}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        kept = min(self.decay, step / (step + 1))
        for name, weight in self.weights.items():
            self._average[name].lerp_(weight, 1 - kept)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average in the weights' place, or back."""
        for name, weight in self.weights.items():
            held = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(held)
