"""The memory of a rank where weights are spread over ranks (ptst/training/sharding.py), in bytes.

A rank keeps its share of the weights, and of masters, gradients and moments where all weights are trained. While it
computes, it has the embedding and the head whole, a layer, the next one on its way (FSDP2 gathers into one buffer and
copies from that), and, in the backward pass of all weights, their gradients as they are computed, widened to be summed,
and summed.
"""

from typing import Protocol


class Whole(Protocol):
    """What a rank would take that keeps all weights: the figures of ptst.training.memory.MemoryPlan."""

    @property
    def parameters(self) -> int: ...
    @property
    def trained(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def optimizer(self) -> int: ...
    @property
    def copies(self) -> int: ...


def spread(plan: Whole, block: int, root: int, size: int, wide: int, ranks: int, cpu: bool) -> dict[str, int]:
    """The figures that change. `block`, `root`: elements of a layer, and of embedding, head and last norm; `size`,
    `wide`: bytes of an element as it is computed, and of a gradient. `cpu`: gloo sums in a copy of its own."""
    gathered = (3 * block + root) * size
    if plan.trained < plan.parameters:  # adapters are whole on every rank
        return {"weights": gathered + -(-plan.parameters * size // ranks) + plan.trained * wide}
    passing = (block + root) * (size + (3 if cpu else 2) * wide)
    return {
        "weights": gathered,
        "masters": -(-plan.parameters * wide // ranks),
        "gradients": -(-plan.gradients // ranks) + passing,
        "optimizer": -(-plan.optimizer // ranks),
        "copies": -(-plan.copies // ranks),
    }
