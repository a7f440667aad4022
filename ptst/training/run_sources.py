"""The data that a run's settings name, read: training, its mixture and its validation set, for training and audit."""

from dataclasses import dataclass

from ptst.data import sources
from ptst.data.examples import parse_mix
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.training.config import TrainConfig


@dataclass(frozen=True)
class RunSources:
    """`training`: each source with its epochs, the main one first. `validation`: None without a validation set."""

    training: list[tuple[Source, float]]
    validation: Source | None = None


def read_main(config: TrainConfig, errors: list[UserError] | None = None) -> Source:
    """The main training data. Raises UserError as `sources.load`."""
    return sources.load(config.data, "train", config.limit, errors, config.holdout, config.column_rules)


def read_others(config: TrainConfig, main: Source, errors: list[list[UserError]] | None = None) -> RunSources:
    """Beside the main data, all that is mixed in and the validation set. Raises UserError as `sources.load`. With
    `errors`, rows with mistakes are left out; the errors of each source are added as a list."""
    rules = config.column_rules

    def read(name: str, split: str, holdout: float = 0.0) -> Source:
        own = None if errors is None else list[UserError]()
        if errors is not None and own is not None:
            errors.append(own)
        return sources.load(name, split, None, own, holdout, rules)

    mixed = [(read(name, "train"), epochs) for name, epochs in map(parse_mix, config.mix)]
    validation = config.validation
    held_out = read(validation[0], "validation", validation[1]) if validation else None
    return RunSources([(main, config.epochs), *mixed], held_out)
