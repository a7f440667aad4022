"""A running average of the weights that are trained, to be evaluated and kept in their place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

PREFIX = "average."  # of the names in a checkpoint


class Average:
    """A running average of weights: less noisy than the weights themselves (Polyak and Juditsky, 1992).

        average_t = b average_(t-1) + (1 - b) weights_t,   b = min(decay, t / (t + 1))

    so that at first it is the plain mean of all weights so far, those before training included. `decay` is 0 (the
    weights themselves) or more, and below 1. It is kept in float32 or wider: in bfloat16 a tenth of a small step would
    be rounded away.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, written: Callable[[], None] = lambda: None):
        """`written` is called after the weights have been overwritten."""
        self.weights, self.decay, self.written = weights, decay, written
        self._average = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for name, w in weights.items()
        }

    @property
    def copies(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the weights: their average, under `average.<name>`."""
        return {f"{PREFIX}{name}": t for name, t in self._average.items()}

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
        self.written()

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
            self.written()
