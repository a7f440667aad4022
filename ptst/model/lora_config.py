"""Rank, scale and target projections of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptst.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """`scale` = alpha / rank, or alpha / sqrt(rank) with rslora. `dropout`: probability that an input of A is zeroed in
    training (kernels/lora_layer.py). Raises UserError for a rank below 1, a dropout outside [0, 1), and unknown
    targets."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank is {self.rank}", "it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout is {self.dropout}", "it must be at least 0 and below 1")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            what = f"LoRA target {unknown[0]!r} is unknown" if unknown else "the list of LoRA targets is empty"
            raise UserError(what, f"choose from {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
