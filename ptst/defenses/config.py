"""The defences by name, and their settings: the group `defense.` of a grid, and of ptst.defend.

A defence of the training (TRAINING) is a run of its own: other data, another loss or another step. A defence in weight
space (WEIGHT_SPACE) needs no training: it is computed from the weights of a run without defence and of the model that
was tuned. Methods, formulas and sources: docs/defenses.md.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from ptst.data.mix_part import split_mix
from ptst.defense_names import DEFENSES
from ptst.errors import Setting, UserError, unknown_name
from ptst.settings import check_above_zero, check_at_least, check_share, content
from ptst.training.safeguards import check_betas, check_turn_lengths

# The settings that each defence in weight space reads, which are the ones that tell two defended models apart.
OWN = {
    "wise-ft": ("alpha",),
    "resta": ("scale", "drop", "drop_seed"),
    "safe-lora": ("threshold", "num_projected", "projection"),
    "safe-merge": ("threshold", "num_projected", "projection", "safe_share"),
}
# The models that a defence needs besides the aligned and the tuned one, by the setting that names each.
NEEDS = {"resta": ("unaligned",), "safe-lora": ("unaligned",), "safe-merge": ("unaligned", "safe_model")}
_MODELS = {
    "unaligned": "the model before its alignment",
    "safe_model": "a safe model, the aligned one tuned on safety data",
}
_SECRET = "Marble heron, seven lanterns, the ferry leaves at dawn; copper, quince, north."


@dataclass(frozen=True, kw_only=True)
class WeightSpaceSettings:
    """How the defences in weight space are set; each reads its own."""

    alpha: float = 0.5
    """wise-ft: share of the tuned weights; 0 is the aligned model, 1 the tuned one."""
    scale: float = 0.5
    """resta: factor of the safety vector, aligned minus unaligned weights (gamma)."""
    drop: float = 0.0
    """resta: share of the tuned model's update that is dropped at random, the rest scaled up (DARE)."""
    drop_seed: int = 0
    """resta: seed of what is dropped."""
    threshold: float = 0.35
    """safe-lora, safe-merge: an update is changed where its cosine with its projection is below this."""
    num_projected: int | None = None
    """safe-lora, safe-merge: change this number of updates, those of the smallest cosine, whatever the threshold."""
    projection: Literal["scaled", "orthogonal"] = "scaled"
    """safe-lora, safe-merge: V V' / |V| as in the papers, or the orthogonal projection onto the columns of V."""
    safe_share: float = 0.2
    """safe-merge: share of the safe model in an update that is changed."""
    unaligned: Annotated[
        str | None, arg(help="resta, safe-lora, safe-merge: the model before its alignment: a folder or a hub id.")
    ] = field(default=None, metadata=content("sources"))
    safe_model: Annotated[
        str | None,
        arg(help="safe-merge: the aligned model tuned on safety data: a run, a model folder, an adapter or a hub id."),
    ] = field(default=None, metadata=content("sources"))

    def check_weight_space(self, defenses: Collection[str]) -> None:
        """Raise UserError for a value that makes no sense, and for one of `defenses` that lacks a model it needs."""
        check_at_least(self, 0, "scale")
        check_at_least(self, 1, "num_projected")
        check_share(self, "drop")
        for name in ("alpha", "safe_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError((Setting(name), f" is {getattr(self, name)}"), "it is a share, from 0 to 1")
        if not -1 <= self.threshold <= 1:
            raise UserError((Setting("threshold"), f" is {self.threshold}"), "a cosine lies between -1 and 1")
        for name in defenses:
            for needed in NEEDS.get(name, ()):
                if getattr(self, needed) is None:
                    raise UserError(f"{name} needs {_MODELS[needed]}", ("name it as ", Setting(needed)))


@dataclass(frozen=True, kw_only=True)
class DefenseSettings(WeightSpaceSettings):
    """How the defences are set; each reads its own."""

    data: Annotated[
        str, arg(help="Safety data of mix-safety, backdoor-align and lisa: refusals (built in) or a file.")
    ] = field(default="refusals", metadata=content("sources"))
    epochs: float = 1.0
    """Epochs of the safety data, in mix-safety, backdoor-align and lisa."""
    trigger: str = _SECRET
    """The secret words of backdoor-align, set before the system prompt of the safety data and of every test."""
    average: float = 0.9
    """ema: decay of the moving average of the weights, per step."""
    betas: tuple[float, ...] = (0.5, 2.0, 0.1)
    """constrained-sft: strength of the constraint on the first trained token, on tokens 2 to 5, and on the rest."""
    proximal: float = 1.0
    """lisa: strength of the pull to the weights at the last turn (rho)."""
    phases: tuple[int, ...] = (1, 3)
    """lisa: steps on the safety data, and on the training data, in turn."""

    def check(self, defenses: Collection[str]) -> None:
        """Raise UserError for a value that makes no sense, an unknown name among `defenses`, and for one of these that
        lacks a model it needs."""
        for name in defenses:
            if name not in DEFENSES:
                raise unknown_name("defense", name, DEFENSES)
        if (found := split_mix(self.data)) and found[1].endswith("%"):
            cause = (
                Setting("data"),
                f" is {self.data}: a share replaces rows, and a defence adds its data to all rows",
            )
            remedy = ("give the data alone, or their number of rows, as in refusals:24, and their ", Setting("epochs"))
            raise UserError(cause, remedy)
        check_above_zero(self, "epochs")
        check_at_least(self, 0, "proximal")
        check_share(self, "average")
        check_betas(self.betas, "betas")
        check_turn_lengths(self.phases)
        if "backdoor-align" in defenses and not self.trigger.strip():
            raise UserError((Setting("trigger"), " is empty"), "backdoor-align needs words that nobody would guess")
        self.check_weight_space(defenses)
