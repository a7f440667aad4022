"""Models of a grid that a defence in weight space composes in memory: of the base model, of the run without a defence,
and of the other models that the defence needs. No file of weights is written for them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.defense_names import WEIGHT_SPACE
from ptst.defenses.compose import Composition, open_others
from ptst.defenses.config import NEEDS, OWN, DefenseSettings
from ptst.defenses.models import Ingredient, open_aligned, open_tuned
from ptst.errors import settings_group
from ptst.experiment.defenses import DEPENDS
from ptst.fingerprints import weights_fingerprint
from ptst.hub.locate import locate_model, locate_tuned, named_by

_LOCATE = {"unaligned": locate_model, "safe_model": locate_tuned}


@dataclass(frozen=True)
class Composer:
    """Composes models over the base model in `folder`, which `name` names."""

    name: str
    folder: Path
    settings: DefenseSettings
    device: str

    @cached_property
    def aligned(self) -> Ingredient:
        return open_aligned(self.name, self.folder)

    @cached_property
    def _others(self) -> dict[str, tuple[Ingredient | None, Ingredient | None]]:
        return {}

    def others(self, defense: str) -> tuple[Ingredient | None, Ingredient | None]:
        """The unaligned and the safe model, where a defence needs them. Raises UserError as `open_others`."""
        if defense not in self._others:
            with settings_group("defense"):
                self._others[defense] = open_others(defense, self.settings, self.aligned)
        return self._others[defense]

    def check(self, names: Iterable[str], exists: bool = True) -> None:
        """Raise UserError for a model that one of these defences needs, and that is not there or does not fit the base
        model. `exists`: whether the aligned model does; until then the base model has its shape alone."""
        for name in names:
            if exists:
                self.others(name)
            else:
                with settings_group("defense"):
                    open_others(name, self.settings, self.aligned, exists)

    def compose(self, defense: str, tuned: Path) -> Composition:
        """The model that a defence makes of the run in a folder. Raises UserError as `ptst.defenses.compose`."""
        run = open_tuned(tuned, self.aligned, "tuned")
        return Composition(defense, self.settings, self.aligned, run, *self.others(defense), device=self.device)


def depends_on(name: str, settings: DefenseSettings) -> dict[str, Any]:
    """What a defence depends on, besides the run, the base model and the safety data: its settings, and the weights of
    the models that it needs. Raises UserError for a model that is not there."""
    own = OWN[name] if name in WEIGHT_SPACE else DEPENDS[name]
    found = {setting: getattr(settings, setting) for setting in own}
    return found | {setting: _weights(setting, str(getattr(settings, setting))) for setting in NEEDS.get(name, ())}


def _weights(setting: str, name: str) -> str:
    with settings_group("defense"), named_by(setting, name):
        return weights_fingerprint(_LOCATE[setting](name))
