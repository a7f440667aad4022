"""A proximal term: the loss gets rho / 2 |w - a|^2 for the trained weights w and an anchor a.

The anchor is a copy of the weights as they were at the beginning of a turn (Lisa: Huang et al. 2024, arXiv 2405.18641),
or of training where there are no turns. The term's gradient, rho (w - a), is added once, when those of all
micro-batches and ranks are summed, and is clipped with them. What is trained is what is held: under LoRA the adapter's
matrices, as in the authors' code.
"""

import torch
from torch import Tensor

from ptst.training.masters import Masters

PREFIX = "anchor."  # of the names in a checkpoint


class Anchor:
    """The anchor of the weights that `masters` updates, and the strength `rho` of its pull."""

    def __init__(self, masters: Masters, rho: float):
        self.masters, self.rho = masters, rho
        self._anchor = {name: w.detach().clone() for name, w in masters.tensors.items()}

    @property
    def copies(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the weights: the anchor, under `anchor.<name>`."""
        return {f"{PREFIX}{name}": t for name, t in self._anchor.items()}

    @torch.no_grad()
    def move(self) -> None:
        """The anchor becomes the weights of now."""
        for name, weight in self.masters.tensors.items():
            self._anchor[name].copy_(weight)

    @torch.no_grad()
    def pull(self) -> Tensor:
        """Add the term's gradient to that of every weight; returns the term, a float64 scalar."""
        term = torch.zeros((), dtype=torch.float64)
        for name, weight in self.masters.tensors.items():
            # The owner has the gradient; under stochastic rounding it has no values of its own.
            owner = self.masters.weights[name]
            distance = weight.to(owner.dtype) - self._anchor[name].to(owner.dtype)
            owner.grad = self.rho * distance if owner.grad is None else owner.grad.add_(distance, alpha=self.rho)
            term = term.to(weight.device) + distance.square().sum(dtype=torch.float64)
        return self.rho / 2 * term
