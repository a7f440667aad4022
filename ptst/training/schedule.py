"""How optimizer steps are taken: the settings that every training shares, and the learning-rate schedules."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ptst.data.order import OrderName
from ptst.errors import Setting, UserError
from ptst.settings import ROUNDING, check_above_zero, check_at_least, check_share

Schedule = Literal["constant", "linear", "cosine", "step"]
WeightUpdate = Literal["master", "stochastic"]
STEP_GAMMA = 0.85  # llama-recipes: StepLR(step_size=1 epoch, gamma=0.85)


def factor(schedule: Schedule, step: int, total: int, warmup: int, epoch: int) -> float:
    """Factor at 0-based `step` of `total`, after `warmup` steps of linear rise. `epoch` counts from 0 ("step" decays
    by 0.85 with each). Warm-up begins above zero, and linear and cosine reach zero one step after the last, so that no
    step is wasted (transformers' warm-up takes its first step at rate zero)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return STEP_GAMMA**epoch if schedule == "step" else 1.0


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One optimizer step after another."""

    max_steps: int | None = None
    """Maximum number of optimizer steps."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """Learning-rate schedule after warm-up; step multiplies the rate by 0.85 after each epoch."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Maximum gradient norm; 0 for no clipping."""
    examples_per_step: int = 8
    """Examples in an optimizer step."""
    micro_batch_tokens: int | Literal["auto"] = field(default=2048, metadata=ROUNDING)
    """Maximum number of tokens in a micro-batch (affects memory and speed, never the result). auto: what fits into the
    free memory."""

    weight_update: WeightUpdate = "master"
    """How bfloat16 weights are updated in full fine-tuning. master: through float32 copies. stochastic: with stochastic
    rounding and without copies, which takes 4 bytes a weight less and adds noise. Moments are float32 in both."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        check_above_zero(self, "lr")
        check_at_least(self, 1, "max_steps", "examples_per_step", "micro_batch_tokens")
        check_share(self, "warmup")
        for name in ("clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError((Setting(name), f" is {getattr(self, name)}"), "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class PassSettings(StepSettings):
    """Passes over data."""

    epochs: float = 1.0
    """Passes over the data; may be a fraction."""
    tokens_per_step: int | None = None
    """Maximum number of tokens in an optimizer step, in packs of 4096, instead of a number of examples."""
    order: OrderName = "random"
    """Order of the examples. random: newly shuffled in each epoch, by the seed. file: as the data have them; with
    --max-steps, only the rows that these steps need are read."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        super().check()
        check_above_zero(self, "epochs")
        check_at_least(self, 1, "tokens_per_step")
