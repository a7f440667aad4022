"""What the runs of a grid train on: every source is read once, and mixed as the run's defence asks."""

from ptst.data import sources
from ptst.data.mix_part import parse_mix
from ptst.data.sources import Source
from ptst.errors import settings_group
from ptst.experiment.config import GridConfig
from ptst.experiment.defenses import MIXED

SAFETY = "safety-data"


def read_training(config: GridConfig) -> dict[str, Source]:
    """What training reads: `data`, other data by their `mix` setting, the defences' safety data, and `val-data`, where
    there is any. Raises UserError as `sources.load`."""
    settings = config.train
    with settings_group("train"):
        rules, holdout = settings.column_rules, settings.holdout
        read = {"data": sources.load(config.data, "train", settings.limit, holdout=holdout, rules=rules)}
        read |= {text: sources.load(parse_mix(text).name, "train", rules=rules) for text in config.mix}
    if any(name in MIXED for name in config.defenses):
        with settings_group("defense"):
            read[SAFETY] = sources.load(config.defense.data, "train", rules=rules)
    with settings_group("train"):
        if settings.val_data:
            read["val-data"] = sources.load(settings.val_data, "validation", rules=rules)
        elif settings.holdout:
            read["val-data"] = sources.load(config.data, "validation", holdout=holdout, rules=rules)
    return read
