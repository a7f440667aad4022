"""Learning-rate schedules, as a factor of the peak rate."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "step"]
STEP_GAMMA = 0.85  # llama-recipes: StepLR(step_size=1 epoch, gamma=0.85)


def factor(schedule: Schedule, step: int, total: int, warmup: int, epoch: int) -> float:
    """Factor at 0-based `step` of `total`, after `warmup` steps of linear rise. `epoch` counts from 0 ("step" decays
    by 0.85 with each). Linear and cosine reach zero one step after the last, so that no step is wasted."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return STEP_GAMMA**epoch if schedule == "step" else 1.0
