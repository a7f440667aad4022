"""What a grid consists of: models, tasks with their data, and cells (a model under a test template, on a task).

The first model is the base model; then come those of grid runs, each of which is one training (training template x
defence x seed), tested at its end or after some of its epochs; and last those that were fine-tuned elsewhere. A defence
in weight space has no training of its own: its model is composed of the run without a defence.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ptst.data import prompt_sets
from ptst.data.mix_part import parse_mix
from ptst.data.sources import Source
from ptst.defense_names import NONE, WEIGHT_SPACE, asked_under
from ptst.errors import Setting, UserError
from ptst.evaluation.tasks.table import LoadedTasks, load_tasks
from ptst.evaluation.tasks.task import Defaults, Task, TaskData
from ptst.experiment.config import GridConfig
from ptst.experiment.ladder.rungs import Rung
from ptst.text.templates import Template, find_template, load_template

BASE = "untouched"  # the base model's name in file names and results
Names = Sequence[str]
_OF_FAMILIES = {prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES, prompt_sets.SUBSTITUTE}


@dataclass(frozen=True)
class GridModel:
    """A grid run after `epochs` of its epochs (None: all of them), trained with `defense` or composed by it; without
    `template` the model named `tuned`, or the base model."""

    template: str | None = None
    seed: int = 0
    epochs: float | None = None
    tuned: str | None = None
    defense: str = NONE

    @property
    def is_base(self) -> bool:
        return self.template is None and self.tuned is None

    @property
    def trained(self) -> str:
        """The training template, or the name of a model that was fine-tuned elsewhere."""
        return self.template or self.tuned or BASE

    @property
    def is_composed(self) -> bool:
        """Whether the weights are made of those of a run, when they are needed."""
        return self.defense in WEIGHT_SPACE

    @property
    def training(self) -> "GridModel":
        """The model at the end of its training: of a composed model, of the run without a defence."""
        return replace(self, epochs=None, defense=NONE if self.is_composed else self.defense)

    @property
    def run(self) -> str:
        """Name of the grid run that it needs, and of that run's folder."""
        return self._name(self.training.defense)

    @property
    def name(self) -> str:
        name = self._name(self.defense)
        return name if self.epochs is None else f"{name}.{epoch_name(self.epochs)}"

    def _name(self, defense: str) -> str:
        if self.tuned is not None:
            return f"tuned.{self.tuned}"
        own = "" if defense == NONE else f".{defense}"
        return BASE if self.template is None else f"{slug(self.template)}.seed{self.seed}{own}"


@dataclass(frozen=True)
class GridCell:
    """A model under a test template, on a task."""

    model: GridModel
    test: str
    task: str

    @property
    def asked(self) -> str:
        """The name of the template in whose words it is asked: with the trigger, where its defence has one."""
        return asked_under(self.test, self.model.defense)

    @property
    def identity(self) -> dict[str, Any]:
        """Which cell it is, as its file says."""
        free = {"tuned": None, "defense": NONE}  # which earlier versions did not write
        model = {key: value for key, value in asdict(self.model).items() if key not in free or value != free[key]}
        return {**model, "test": self.test, "task": self.task}

    @property
    def name(self) -> str:
        return f"{self.model.name}/{slug(self.test)}.{slug(self.task)}"


def plan_models(
    train_templates: Names,
    seeds: Sequence[int],
    at_epochs: Sequence[float] = (),
    tuned: Iterable[str] = (),
    defenses: Names = (NONE,),
) -> list[GridModel]:
    """The base model, every grid run under each defence and after each of its epochs to be tested, and the others, in
    the order given."""
    crossed = product(train_templates, defenses, seeds, at_epochs or (None,))
    runs = [GridModel(template, seed, epochs, defense=defense) for template, defense, seed, epochs in crossed]
    return [GridModel(), *runs, *(GridModel(tuned=name) for name in tuned)]


def plan_cells(
    models: Sequence[GridModel], test_templates: Names, tasks: Names, rungs: Mapping[str, Rung] | None = None
) -> list[GridCell]:
    """All cells, those of a model together: a model that has to be loaded is loaded once. `rungs`: those among the test
    templates; a run is tested on the rungs of its own training template."""
    own = {name: rung.training for name, rung in (rungs or {}).items()}
    tested = product(models, test_templates)
    pairs = [(m, test) for m, test in tested if m.template is None or own.get(test, m.template) == m.template]
    return [GridCell(model, test, task) for model, test in pairs for task in tasks]


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


def load_mix_templates(mix: Sequence[str]) -> dict[str, tuple[Template, Path | None]]:
    """The templates that data are mixed in under, as `load_templates` has them. Raises UserError as
    `MixPart.find_template`, and for two of the same name and other words."""
    return merge_templates(*({t.name: (t, path)} for t, path in map(_mix_template, mix) if t is not None))


def _mix_template(text: str) -> tuple[Template | None, Path | None]:
    return parse_mix(text).find_template()


def merge_templates(*found: Mapping[str, tuple[Template, Path | None]]) -> dict[str, tuple[Template, Path | None]]:
    """All templates by name. Raises UserError for two of the same name and other words."""
    merged: dict[str, tuple[Template, Path | None]] = {}
    for templates in found:
        for name, (template, path) in templates.items():
            if name in merged and merged[name][0] != template:
                cause = f"{merged[name][1]} and {path} are different templates named {name}"
                raise UserError(cause, "rename one")
            merged.setdefault(name, (template, path))
    return merged


def load_suite(config: GridConfig, trained: Source, families: Sequence[str] | None = None) -> LoadedTasks:
    """The tasks by name. `trained`: the training data, whose test part gives the problems unless the settings name
    others. `families`: use only these of the built-in requests and look-alikes. Raises UserError as `load_tasks`."""
    c = config.eval
    defaults = Defaults(c.data or trained.name, c.data, c.safety_data, c.limit, config.train.holdout, c.column_rules)
    if not c.data:
        defaults = replace(defaults, problem_rules=config.train.column_rules)
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in config.tasks:
        entry = load_tasks([spec], defaults)
        source = spec.partition(":")[2] or c.safety_data or ""
        built_in = not Path(source).is_file() and {data.name for _, data in entry.values()} & _OF_FAMILIES
        if families and built_in:
            # The limit applies to the chosen families, not the families to what the limit left.
            everything = load_tasks([spec], replace(defaults, limit=None)).items()
            entry = {key: (task, _of_families(families, data, c.limit)) for key, (task, data) in everything}
        if twice := entry.keys() & found.keys():
            cause = (Setting("tasks"), f" has {twice.pop()} twice")
            raise UserError(cause, "sets are named by their files: rename one, or drop it")
        found |= entry
    check_distinct("task", list(found))
    return found


def _of_families(families: Sequence[str], data: TaskData, limit: int) -> TaskData:
    kept = [p for p in data.items if p.family in families][:limit]
    name = f"{data.name}, {len(set(families))} families"
    return replace(data, name=name, items=kept, fingerprint=digest([p.prompt for p in kept]))


def digest(texts: Sequence[str]) -> str:
    """sha256 over texts in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
