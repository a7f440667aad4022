"""The data that a run's settings name, read: training, its mixture and its validation set, for training and audit."""

from collections.abc import Iterable
from dataclasses import dataclass

from ptst.data import sources
from ptst.data.examples import TrainingSource
from ptst.data.mix_part import parse_mix
from ptst.data.selection import select
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.templates import Template
from ptst.training.config import TrainConfig


@dataclass(frozen=True)
class RunSources:
    """`training`: each source with the rows that are trained on, the main one first. `whole`: the same sources with all
    rows that were read. `validation`: None without a validation set."""

    training: list[TrainingSource]
    whole: list[Source]
    validation: Source | None = None


def read_main(config: TrainConfig, errors: list[UserError] | None = None) -> Source:
    """The main training data. Raises UserError as `sources.load`."""
    return sources.load(config.data, "train", config.limit, errors, config.holdout, config.column_rules)


def mix_templates(mix: Iterable[str]) -> list[Template]:
    """The templates of sources that are mixed in under their own. Raises UserError as `MixPart.find_template`."""
    found = (parse_mix(text).find_template()[0] for text in mix)
    return [template for template in found if template is not None]


def read_others(config: TrainConfig, main: Source, errors: list[list[UserError]] | None = None) -> RunSources:
    """Beside the main data, all that is mixed in and the validation set. Raises UserError as `sources.load`,
    `MixPart.find_template` and `select`. With `errors`, rows with mistakes are left out; the errors of each source are
    added as a list."""
    rules = config.column_rules

    def read(name: str, split: str, holdout: float = 0.0) -> Source:
        own = None if errors is None else list[UserError]()
        if errors is not None and own is not None:
            errors.append(own)
        return sources.load(name, split, None, own, holdout, rules)

    parts = map(parse_mix, config.mix)
    mixed = [
        TrainingSource(read(part.name, "train"), part.epochs, *part.find_template(), share=part.share) for part in parts
    ]
    asked = [TrainingSource(main, config.epochs), *mixed]
    validation = config.validation
    held_out = read(validation[0], "validation", validation[1]) if validation else None
    return RunSources(select(asked, config.subsample, config.seed), [each.source for each in asked], held_out)
