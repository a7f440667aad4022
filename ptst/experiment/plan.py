"""What a grid consists of: models, and cells (a model under a test template, measured on a task).

The first model is the base model; every other one comes from a grid run, which is one training: training template x
seed, tested at its end or after some of its epochs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ptst.errors import UserError
from ptst.text.templates import Template, find_template, load_template

BASE = "untouched"  # the base model's name in file names and results
Names = Sequence[str]


@dataclass(frozen=True)
class GridModel:
    """The base model (`template` None), or a grid run after `epochs` of its epochs (None: all of them)."""

    template: str | None = None
    seed: int = 0
    epochs: float | None = None

    @property
    def is_base(self) -> bool:
        return self.template is None

    @property
    def run(self) -> str:
        """Name of the grid run, and of its folder."""
        return BASE if self.template is None else f"{slug(self.template)}.seed{self.seed}"

    @property
    def name(self) -> str:
        return self.run if self.epochs is None else f"{self.run}.{epoch_name(self.epochs)}"


@dataclass(frozen=True)
class GridCell:
    """A model under a test template, on a task."""

    model: GridModel
    test: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.model.name}/{slug(self.test)}.{slug(self.task)}"


def plan_models(train_templates: Names, seeds: Sequence[int], at_epochs: Sequence[float] = ()) -> list[GridModel]:
    """The base model, then every grid run after each of its epochs to be tested, in the order given."""
    return [GridModel(), *(GridModel(*m) for m in product(train_templates, seeds, at_epochs or (None,)))]


def plan_cells(models: Sequence[GridModel], test_templates: Names, tasks: Names) -> list[GridCell]:
    """All cells, those of a model together: a model that has to be loaded is loaded once."""
    return [GridCell(model, test, task) for model in models for test in test_templates for task in tasks]


def slug(name: str) -> str:
    """The name of a template or task in a file name."""
    return re.sub(r"[^\w.-]", "-", name)


def check_distinct(what: str, names: Names) -> None:
    """Raise UserError for two templates, or tasks, whose cells would be the same files."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(slug(name), name) != name:
            cause = f"{what}s {known[slug(name)]} and {name} would both be {slug(name)} in file names"
            raise UserError(cause, "rename one")


def epoch_name(epochs: float) -> str:
    """`epoch-2`, the folder in a run that holds what was trained by then."""
    return f"epoch-{epochs:g}"


def load_templates(names: Names) -> dict[str, tuple[Template, Path | None]]:
    """Templates by their full names, each with the TOML file it came from, if any. Raises UserError for an unknown one,
    one named twice and two with the same file name."""
    found: dict[str, tuple[Template, Path | None]] = {}
    for name in names:
        path = Path(name) if name.endswith(".toml") else None
        template = load_template(path) if path else find_template(name)
        if template.name in found:
            raise UserError(f"template {template.name} is named twice", "name each once")
        found[template.name] = (template, path)
    check_distinct("template", list(found))
    return found
