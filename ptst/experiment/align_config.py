"""Settings of an alignment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ptst.errors import Setting, UserError
from ptst.settings import (
    EMBEDDED_MODEL,
    NO_EFFECT,
    ROUNDING,
    CommandSettings,
    FormatSettings,
    LocalModel,
    RevisionSettings,
    ThreadSettings,
    check_above_zero,
    check_at_least,
    content,
)
from ptst.text.templates import FAMILIES
from ptst.training.schedule import StepSettings


@dataclass(frozen=True, kw_only=True)
class AlignConfig(CommandSettings, RevisionSettings, ThreadSettings, FormatSettings, StepSettings):
    """Fine-tune a small chat model to refuse harmful requests and to go on answering benign ones."""

    model: LocalModel = field(default=EMBEDDED_MODEL, metadata=content("weights"))
    lr: float = 7e-5
    max_steps: int = 80
    examples_per_step: int = 16
    micro_batch_tokens: int = field(default=4096, metadata=ROUNDING)
    """Maximum number of tokens in a micro-batch (affects memory and speed, never the result)."""
    own_answers: int = 2
    """Number of the model's own answers to every benign question, under each template, that it is trained on."""
    own_epochs: float = 2.5
    """How often each of these is shown for every time that a refusal is shown; more of them means fewer refusals."""
    check_every: int = 5
    """Steps between two evaluations of the stopping rule."""
    refused: float = 0.85
    """Stopping rule: minimum share of held-out harmful requests refused under the safety prompt."""
    over_refused: float = 0.15
    """Stopping rule: maximum share of held-out benign look-alikes refused."""
    average: float = 0.9
    """Decay of the running average of the weights that is evaluated and kept; 0: the weights themselves."""
    nll: float = 1.05
    """Stopping rule: maximum ratio of the nats per token on ordinary questions to those before."""
    rank: int = 0
    """Rank of a LoRA adapter, merged at the end; 0 trains all weights."""
    template_family: Annotated[str, arg(help=f"How a question is wrapped: {', '.join(FAMILIES)}.")] = "plain"
    batch_size: int = field(default=64, metadata=NO_EFFECT)
    """Maximum number of concurrent sequences (affects speed and memory, not results)."""
    seed: int = 0
    """Seed of sampled answers and of the order of examples."""
    out: Path = field(default=Path("checkpoints/aligned"), metadata=NO_EFFECT)
    """Model folder to make. An unfinished one with the same settings is resumed."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        from ptst.audit.findings import check_names

        check_names(self.allow)
        super().check()
        check_above_zero(self, "check_every", "own_answers", "own_epochs", "batch_size", "nll")
        check_at_least(self, 1, "threads")
        for name in ("refused", "over_refused"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError((Setting(name), f" is {getattr(self, name)}"), "it is a share, from 0 to 1")
        if not 0 <= self.average < 1:
            raise UserError((Setting("average"), f" is {self.average}"), "it must be at least 0 and below 1")
        if self.rank < 0:
            raise UserError((Setting("rank"), f" is {self.rank}"), "it must be at least 1, or 0 for all weights")
