"""What each defence changes in a grid: settings and data of a training, the words of a test, the weights that answer.

A defence of the training is a grid run of its own. A defence in weight space composes its model of the run without a
defence, when the model is needed. What a defence is set to is kept in the grid's record, so that defences may be added
to a grid later, and one that is used again must be unchanged.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptst.config_file import to_toml
from ptst.defense_names import NONE, TRIGGERED, WEIGHT_SPACE
from ptst.defenses.config import DefenseSettings
from ptst.errors import Setting, UserError, settings_group
from ptst.storage import lock, remove_partial_files_of, write_atomically
from ptst.text.templates import Template
from ptst.training.config import TrainSettings

MIXED = ("mix-safety", TRIGGERED, "lisa")  # which train on the safety data, too
HOSTED = (NONE, "mix-safety", TRIGGERED)  # which need no more than data and messages
# What a run is trained with, by the name of the setting that the group `defense.` has for it.
_TRAINED_WITH = {
    "constrained-sft": {"token_constraint": "betas"},
    "lisa": {"proximal": "proximal", "phases": "phases"},
    "ema": {"average": "average"},
}
# The settings that a defence of the training depends on, besides the contents of data.
DEPENDS = {
    "mix-safety": ("epochs",),
    TRIGGERED: ("epochs", "trigger"),
    "constrained-sft": ("betas",),
    "lisa": ("epochs", "proximal", "phases"),
    "ema": ("average",),
}


@dataclass(frozen=True)
class Changes:
    """What a defence changes in a run: settings of the training, and data that are mixed in."""

    settings: dict[str, Any] = field(default_factory=dict)
    mix: tuple[str, ...] = ()


def changes(defense: str, settings: DefenseSettings, template_file: Path) -> Changes:
    """What a defence of the training changes; `template_file`: the training template with the trigger in it."""
    found = {name: getattr(settings, own) for name, own in _TRAINED_WITH.get(defense, {}).items()}
    if defense not in MIXED:
        return Changes(found)
    own_template = f":{template_file}" if defense == TRIGGERED else ""
    return Changes(found, (f"{settings.data}:{settings.epochs}{own_template}",))


def check_defenses(
    names: Collection[str], settings: DefenseSettings, train: TrainSettings, mix: Collection[str], hosted: bool
) -> None:
    """Raise UserError for an unknown defence, one that lacks what it needs, and a setting of the training that a
    defence sets. `mix`: other data in every run; `hosted`: the models are behind an endpoint."""
    with settings_group("defense"):
        settings.check(names)
    used = [name for name in names if name != NONE]
    if "lisa" in used and mix:
        what = "lisa takes turns between safety data and the training data, and "
        remedy = "leave one of the two out, or give the training data and the others as one file"
        raise UserError((what, Setting("mix"), " names others"), remedy)
    if hosted and (beyond := [name for name in used if name not in HOSTED]):
        cause = (Setting("defenses"), f": {beyond[0]} needs the model's weights, which an endpoint does not give")
        raise UserError(cause, f"there are {', '.join(HOSTED[1:])}")
    if train.quantize != "none" and (composed := [name for name in used if name in WEIGHT_SPACE]):
        cause = (Setting("defenses"), f": {composed[0]} composes weights, and knows no base in {train.quantize}")
        raise UserError(cause, ("leave it out, or ", Setting("train.quantize")))
    defaults = TrainSettings()
    for name in used:
        for setting in _TRAINED_WITH.get(name, {}):
            if getattr(train, setting) != getattr(defaults, setting):
                cause = (Setting(f"train.{setting}"), f" cannot be set here: the defence {name} sets it per run")
                own = Setting(f"defense.{_TRAINED_WITH[name][setting]}")
                raise UserError(cause, ("leave it out, and set ", own, " for the runs of the defence"))
        with settings_group("train"):
            replace(train, **changes(name, settings, Path()).settings).check()


def write_template(path: Path, template: Template, locks: Path) -> None:
    """Write a template as a TOML file, which another worker may be writing, too; `locks`: the folder of locks."""
    content = to_toml(template).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(locks, "templates", wait=True):
        remove_partial_files_of(path)
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
