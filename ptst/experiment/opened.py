"""The base model of a grid, opened under everything that it is asked under: test templates, rungs, triggers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ptst.defense_names import TRIGGERED
from ptst.defenses.trigger import triggered
from ptst.experiment.config import GridConfig
from ptst.experiment.ladder.in_grid import Rungs, open_rung
from ptst.open import OpenModel, open_model
from ptst.text.templates import Template

Templates = Mapping[str, tuple[Template, Path | None]]


def chat_format(asked: str | None, template: Template) -> str | None:
    """The chat format that is asked for, under a template that has one."""
    return None if template.is_text else asked


def family_of(config: GridConfig) -> str | None:
    """The template family that the settings name."""
    return config.eval.template_family or config.train.template_family


def open_under(config: GridConfig, template: Template, family: str | None) -> OpenModel:
    """The base model under a template. Raises UserError as `open_model`."""
    allowed, asked = (
        ("role-markers", *config.eval.allow, *config.train.allow),
        chat_format(config.chat_format, template),
    )
    return open_model(config.model, template, family=family, chat_format=asked, allow=allowed)


def open_tests(
    config: GridConfig, train: Templates, test: Templates, rungs: Rungs, family: str | None
) -> dict[str, OpenModel]:
    """The base model under each test template, rungs among them, and under each with the trigger where there is one.
    Raises UserError as `open_model`."""
    found = {name: open_under(config, template, family) for name, (template, _) in test.items() if name not in rungs}
    trainings = {rung.training: train[rung.training][0] for rung in rungs.values()}
    under = {name: open_under(config, template, family) for name, template in trainings.items()}
    found |= {name: open_rung(under[rung.training], rung) for name, rung in rungs.items()}
    if TRIGGERED not in config.defenses:
        return found
    own = (model.with_template(triggered(_template(model), config.defense.trigger)) for model in found.values())
    return found | {_template(model).name: model for model in own}


def in_own_format(opened: Mapping[str, OpenModel], test: Templates, rungs: Rungs) -> Iterator[OpenModel]:
    """The models under test templates that are asked in their own chat format."""
    for name in test:
        if name not in rungs or rungs[name].chat_format is None:
            yield opened[name]


def _template(model: OpenModel) -> Template:
    return model.prompt_format.template
