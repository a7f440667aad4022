"""The tasks of a grid with their data: what every model is measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptst.data import prompt_sets
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.measure import check_room, count_tokens, find_tools, measure, sampling_for
from ptst.evaluation.tasks.table import load_tasks
from ptst.evaluation.tasks.task import Defaults, Prompt, Task, TaskData, TaskResult, Tools
from ptst.experiment.config import GridConfig
from ptst.experiment.plan import check_distinct
from ptst.open import OpenModel

_OF_FAMILIES = {prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES, prompt_sets.SUBSTITUTE}


@dataclass(frozen=True)
class EvaluationSuite:
    """Tasks with their data by name. `family`: template family of the training data, which wraps all prompts."""

    tasks: dict[str, tuple[Task, TaskData]]
    family: str
    settings: EvalSettings
    device: str

    def prompts(self, task: str) -> list[Prompt]:
        what, data = self.tasks[task]
        return what.prompts(data.items)

    def tools(self) -> Tools:
        """The judge, and the similarity where a task uses it. Raises UserError for those that are not available."""
        return find_tools(self.settings, [task for task, _ in self.tasks.values()], self.device)

    def measure(self, task: str, answerer: Answerer, answers: Path | None, tools: Tools) -> TaskResult:
        """The result of a task. Raises UserError as `measure`."""
        what, data = self.tasks[task]
        return measure(what, data, answerer, sampling_for(self.settings, data), tools, answers)

    def count_tokens(self, task: str, model: OpenModel) -> int:
        """Maximum number of tokens that a cell computes."""
        what, data = self.tasks[task]
        return count_tokens(what, data, model.prompt_format, sampling_for(self.settings, data).max_new_tokens)

    def check(self, models: Mapping[str, OpenModel]) -> None:
        """Raise UserError as `tools`, and for a prompt that a template cannot express or that leaves no room for its
        answer."""
        self.tools()
        for test, model in models.items():
            for key, (task, data) in self.tasks.items():
                check_room(f"{key} under {test}", task, data, model, self.settings, self.device)


def open_suite(
    config: GridConfig, trained: Source, device: str, families: Sequence[str] | None = None
) -> EvaluationSuite:
    """The tasks of a grid. `trained`: the training data, whose test part gives the problems unless the settings name
    others. `families`: use only these of the built-in requests and look-alikes. Raises UserError as `load_tasks`."""
    settings = config.eval
    defaults = Defaults(
        settings.data or trained.name, settings.data, settings.safety_data, settings.limit, config.train.holdout
    )
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in config.tasks:
        entry = load_tasks([spec], defaults)
        source = spec.partition(":")[2] or settings.safety_data or ""
        built_in = not Path(source).is_file() and {data.name for _, data in entry.values()} & _OF_FAMILIES
        if families and built_in:
            # The limit applies to the chosen families, not the families to what the limit left.
            everything = load_tasks([spec], replace(defaults, limit=None)).items()
            entry = {key: (task, _of_families(families, data, settings.limit)) for key, (task, data) in everything}
        if twice := entry.keys() & found.keys():
            cause = (Setting("tasks"), f" has {twice.pop()} twice")
            raise UserError(cause, "sets are named by their files: rename one, or drop it")
        found |= entry
    check_distinct("task", list(found))
    return EvaluationSuite(found, trained.family, settings, device)


def _of_families(families: Sequence[str], data: TaskData, limit: int) -> TaskData:
    kept = [p for p in data.items if p.family in families][:limit]
    name = f"{data.name}, {len(set(families))} families"
    return replace(data, name=name, items=kept, fingerprint=digest([p.prompt for p in kept]))


def digest(texts: Sequence[str]) -> str:
    """sha256 over texts in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
