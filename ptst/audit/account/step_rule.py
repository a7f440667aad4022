"""How a run takes its steps, as its settings say."""

from dataclasses import dataclass

from ptst.data.order import OrderName


@dataclass(frozen=True)
class StepRule:
    """The settings of the same names."""

    micro_batch_tokens: int = 2048
    examples_per_step: int = 8
    tokens_per_step: int | None = None
    max_steps: int | None = None
    seed: int = 0
    phases: tuple[int, ...] = ()
    order: OrderName = "random"
