"""What a grid consists of: rows (a model each) and cells (a row under a test template, measured on a task).

Row zero is the untouched model; every other row is one training run: train template x seed, looked at after the end or
after some of its epochs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ptst.errors import UserError
from ptst.text.template_file import load_template
from ptst.text.templates import Template, find_template

UNTOUCHED = "untouched"
Names = Sequence[str]


@dataclass(frozen=True)
class Row:
    """A model: the untouched one (`template` None), or a training run after `epochs` of its epochs (None: all)."""

    template: str | None = None
    seed: int = 0
    epochs: float | None = None

    @property
    def run(self) -> str:
        """Name of the training run, and of its folder."""
        return UNTOUCHED if self.template is None else f"{slug(self.template)}.seed{self.seed}"

    @property
    def name(self) -> str:
        return self.run if self.epochs is None else f"{self.run}.{epoch_name(self.epochs)}"


@dataclass(frozen=True)
class Cell:
    """A row under a test template, on a task."""

    row: Row
    test: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.row.name}/{slug(self.test)}.{slug(self.task)}"


def rows(train_templates: Names, seeds: Sequence[int], at_epochs: Sequence[float] = ()) -> list[Row]:
    """Row zero, then every training run at each of its looks, in the order given."""
    return [Row(), *(Row(*r) for r in product(train_templates, seeds, at_epochs or (None,)))]


def cells(all_rows: Sequence[Row], test_templates: Names, tasks: Names) -> list[Cell]:
    """All cells, those of a row together: a model that has to be loaded is loaded once."""
    return [Cell(row, test, task) for row in all_rows for test in test_templates for task in tasks]


def slug(name: str) -> str:
    """The name of a template or task as part of a file name."""
    return re.sub(r"[^\w.-]", "-", name)


def distinct(what: str, names: Names) -> None:
    """Raise UserError for two templates, or tasks, whose cells would be the same files."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(slug(name), name) != name:
            raise UserError(
                f"{what}s {known[slug(name)]} and {name} would both be {slug(name)} in file names; rename one"
            )


def epoch_name(epochs: float) -> str:
    """`epoch-2`, the folder in a run that holds what was trained by then."""
    return f"epoch-{epochs:g}"


def templates(names: Names) -> dict[str, tuple[Template, Path | None]]:
    """Templates by their full names, each with the TOML file it came from, if it did. Raises UserError for an unknown
    one, one named twice, two with the same file name, and for none."""
    found: dict[str, tuple[Template, Path | None]] = {}
    for name in names:
        path = Path(name) if name.endswith(".toml") else None
        template = load_template(path) if path else find_template(name)
        if template.name in found:
            raise UserError(f"template {template.name} is named twice; each row and column stands once")
        found[template.name] = (template, path)
    distinct("template", list(found))
    if not found:
        raise UserError("a grid needs at least one template to train and one to test under")
    return found
