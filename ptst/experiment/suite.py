"""The tasks of a grid with their data: what every model is measured on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptst.data import prompt_sets
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.evaluation.tasks.table import LoadedTasks, load_tasks
from ptst.evaluation.tasks.task import Defaults, Task, TaskData
from ptst.experiment.config import GridConfig
from ptst.experiment.plan import check_distinct

_OF_FAMILIES = {prompt_sets.BUILT_IN, prompt_sets.LOOK_ALIKES, prompt_sets.SUBSTITUTE}


def load_suite(config: GridConfig, trained: Source, families: Sequence[str] | None = None) -> LoadedTasks:
    """The tasks by name. `trained`: the training data, whose test part gives the problems unless the settings name
    others. `families`: use only these of the built-in requests and look-alikes. Raises UserError as `load_tasks`."""
    c = config.eval
    defaults = Defaults(c.data or trained.name, c.data, c.safety_data, c.limit, config.train.holdout)
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
