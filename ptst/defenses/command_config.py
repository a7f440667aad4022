"""Settings of ptst.defend."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ptst.defense_names import TRAINING, WEIGHT_SPACE
from ptst.defenses.config import NEEDS, OWN, WeightSpaceSettings
from ptst.errors import Setting, UserError, unknown_name
from ptst.exporting.config import ShardSettings, StoredDtype
from ptst.settings import (
    NO_EFFECT,
    CommandSettings,
    OptionalLocalModel,
    RevisionSettings,
    ThreadSettings,
    check_at_least,
    content,
)

_DEFENSE_HELP = f"The defence: {'; '.join(f'{name}, {meaning}' for name, meaning in WEIGHT_SPACE.items())}."


@dataclass(frozen=True, kw_only=True)
class DefendConfig(CommandSettings, RevisionSettings, ThreadSettings, ShardSettings, WeightSpaceSettings):
    """Compute a safer model from a tuned one and the aligned one that it was tuned from, without training: a model
    folder that eval, chat, grid, export and serve open (docs/defenses.md). Without --checkpoint and --model: the latest
    run."""

    defense: Annotated[str | None, arg(help=_DEFENSE_HELP)] = None
    checkpoint: Path | None = field(default=None, metadata=content("made_of"))
    """The tuned model: run folder of ptst.train, RUN/epoch-2 or RUN/state/step-00000050. It knows the aligned one."""
    model: OptionalLocalModel = field(default=None, metadata=content("made_of"))
    tuned: str | None = field(default=None, metadata=content("made_of"))
    """A model that was tuned elsewhere from --model, the aligned one: the folder or hub id of an adapter in PEFT's
    layout, or of a whole model."""
    out: Path | None = field(default=None, metadata=NO_EFFECT)
    """Folder to write, which must not exist or be empty."""
    adapter_only: bool = False
    """Write an adapter in place of all weights: of wise-ft and safe-lora, where the tuned model is one."""
    dtype: StoredDtype | None = None
    """Data type of the weights written: float32, bfloat16 or float16. Default: that of the tuned model's files."""

    def check(self) -> None:
        """Raise UserError for values that make no sense, alone or together."""
        if self.defense is None:
            raise UserError((Setting("defense"), " is missing"), f"there are: {', '.join(WEIGHT_SPACE)}")
        if self.defense in TRAINING:
            cause = f"{self.defense} is a defence of the training: {TRAINING[self.defense]}"
            raise UserError(cause, "train with it (docs/defenses.md), or run it in a grid (--defenses)")
        if self.defense not in WEIGHT_SPACE:
            raise unknown_name("defense", self.defense, WEIGHT_SPACE)
        if self.out is None:
            raise UserError((Setting("out"), " is missing"), "name the folder to write")
        if self.checkpoint is not None and (self.model is not None or self.tuned is not None):
            other = Setting("model" if self.model is not None else "tuned")
            raise UserError((Setting("checkpoint"), " and ", other, " exclude each other"), "a run knows its model")
        if (self.model is None) != (self.tuned is None):
            both = (Setting("model"), " and ", Setting("tuned"), " belong together")
            raise UserError(both, "give the aligned model and the one tuned from it, or a run")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError((Setting("dtype"), f" is {self.dtype!r}"), "it must be float32, bfloat16 or float16")
        if self.adapter_only:
            self._check_adapter()
        _ = self.shard_bytes
        check_at_least(self, 1, "threads")
        self.check_weight_space((self.defense,))
        self._check_read(self.defense)

    def _check_read(self, defense: str) -> None:
        """Raise UserError for a setting that the defence does not read."""
        used = {*OWN[defense], *NEEDS.get(defense, ())}
        if self.num_projected is not None:
            used -= {"threshold"}  # it takes its place
        for name, default in vars(WeightSpaceSettings()).items():
            if name not in used and getattr(self, name) != default:
                other = Setting("num_projected") if name in OWN[defense] else defense
                raise UserError((Setting(name), " has no effect with ", other), "leave one of them out")

    def _check_adapter(self) -> None:
        """Raise UserError where no adapter can be written."""
        if self.dtype is not None:
            cause = (Setting("dtype"), " is of all weights, and ", Setting("adapter_only"), " writes an adapter")
            raise UserError(cause, "leave one out")
        if self.defense not in ("wise-ft", "safe-lora"):
            what = "adds to all weights" if self.defense == "resta" else "adds up two adapters"
            remedy = ("leave out ", Setting("adapter_only"))
            raise UserError(f"{self.defense} {what}, so that its result is no adapter of the same rank", remedy)
