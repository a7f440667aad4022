"""The data that a run's settings name, read: training, its mixture and its validation set, for training and audit."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ptst.data import sources
from ptst.data.encode_rows import Encoder
from ptst.data.examples import TrainingSource
from ptst.data.first_steps import FirstSteps
from ptst.data.mix_part import parse_mix
from ptst.data.selection import select
from ptst.data.sources import ReadRow, Source
from ptst.errors import Setting, UserError
from ptst.text.prompt_format import PromptFormat
from ptst.text.templates import Template, find_family
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


def reads_all(config: TrainConfig) -> str | None:
    """Why training reads all rows before the first step, although only the first ones are trained on; None where it
    does not, "" where nothing else was asked for."""
    if config.order != "file" or config.max_steps is None or sources.is_built_in(config.data):
        return ""
    reasons = (
        (config.mix, "other data are spread over all of them"),
        (config.holdout, "the held-out rows are drawn from all of them"),
        (config.subsample, "the subsample is drawn from all of them"),
        (config.epochs < 1 or config.at_epochs, "epochs are counted by all of them"),
        (sources.is_drawn(config.data), "random ones of them are asked for"),
        (not sources.is_read_in_turn(config.data), "the data set is not pinned (NAME@REVISION)"),
    )
    return next((reason for asked, reason in reasons if asked), None)


def read_family(config: TrainConfig) -> str:
    """The template family that the first row tells. Raises UserError as `sources.load`."""
    return _read_first(config, lambda rows: islice(rows, 1)).family


def read_first(config: TrainConfig, prompt_format: PromptFormat, max_length: int) -> tuple[Source, PromptFormat]:
    """The first rows of the main data, as many as the run's steps take, with the prompt format of their family; for
    settings for which `reads_all` is None. Raises UserError as `sources.load`."""
    for _ in range(2):
        encoder = Encoder(prompt_format, max_length, config.too_long, config.train_on)
        assert config.max_steps is not None
        first = FirstSteps(encoder, config.max_steps, config.examples_per_step, config.tokens_per_step)
        source = _read_first(config, first)
        if config.template_family is not None or source.family == prompt_format.family.name:
            return replace(source, partial=not first.complete), prompt_format
        prompt_format = replace(prompt_format, family=find_family(source.family))  # that of more rows than one
    cause = f"{config.data}: how many rows the steps take depends on the template family, which the rows do not tell"
    raise UserError(cause, ("name it as ", Setting("template_family")))


def _read_first(config: TrainConfig, first: Callable[[Iterable[ReadRow]], Iterator[ReadRow]]) -> Source:
    return sources.load(config.data, "train", config.limit, rules=config.column_rules, first=first)


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
