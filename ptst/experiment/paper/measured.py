"""A grid's results (results.json), read for a comparison: which of its tasks is which of the paper's sets and metrics,
and the figure of a cell with its interval. Results of earlier versions, and of parts of a grid, are read, too.

A run with safety data is one of the defence `mix-safety`, or any run of a grid that mixes in data named as safety data.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ptst.defense_names import NONE
from ptst.evaluation.independent import mean_interval
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import base
from ptst.evaluation.two_way import Interval
from ptst.experiment.paper.cells import SAFETY_DATA
from ptst.experiment.plan import BASE

MIXED = "mix-safety"
HELPFULNESS = ("gsm8k", "arc-easy", "arc-challenge", "chatdoctor", "nll")  # the first that a grid has
# The figure of a task that the paper reports.
_METRICS = {"gsm8k": "last_number", "arc-easy": "printed", "arc-challenge": "printed", "chatdoctor": "bertscore_f1"}
_METRICS |= {"safety": ASR, "nll": "nats_per_token"}
_LOWER_HELPS, _NO_RATES = ("nll",), ("nll", "chatdoctor")


@dataclass(frozen=True)
class Place:
    """A cell: a model (training template, None for the one without fine-tuning; what was mixed in; after which epochs)
    under a test template, on a task."""

    train: str | None
    mixed: str
    test: str
    task: str
    epochs: float | None = None

    def __str__(self) -> str:
        name = self.train or "no fine-tuning"
        name += f" + {self.mixed}" if self.mixed else ""
        name += "" if self.epochs is None else f", epoch {self.epochs:g}"
        return f"{name} -> {self.test}, {self.task}"


@dataclass(frozen=True)
class Measured:
    """A figure of a grid, rates from 0 to 1. `interval`: 95 %, None where there is none; `prompts` of each run, judged
    or not; `helps`: of a measure of helpfulness, whether more of it is better."""

    place: Place
    value: float
    interval: Interval | None
    seeds: int
    prompts: int | None
    helps: bool = True

    @property
    def is_rate(self) -> bool:
        return base(self.place.task) not in _NO_RATES


@dataclass(frozen=True)
class Results:
    """The results of a grid."""

    raw: Mapping[str, Any]
    cells: Mapping[Place, Measured] = field(init=False)

    def __post_init__(self) -> None:
        found = {m.place: m for m in self._read()}
        object.__setattr__(self, "cells", found)

    def setting(self, name: str) -> Any:
        """A setting as a grid names it (`train.lr`); None where it is not recorded."""
        value = self.raw.get("settings")
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def model(self) -> str:
        """The last part of the base model's name, without a revision."""
        name = str(self.setting("model") or self.raw.get("model") or "")
        return Path(name.partition("@")[0].removeprefix("openai:")).name

    @property
    def data(self) -> str:
        return str(self.setting("data") or "")

    def set_of(self, task: str) -> str:
        """The name of a task's set of prompts: of the paper's where it is one."""
        sets = self.raw.get("sets")
        name = str(sets.get(task) if isinstance(sets, Mapping) else task.partition(":")[2])
        if name == "jailbreakbench" and any("jailbreakbench:" in str(spec) for spec in _listed(self.setting("tasks"))):
            return "jailbreakbench-gcg"  # its attack artifact, from a file
        return name

    def find(self, train: str | None, test: str, task: str | None, mixed: str = "") -> Measured | None:
        """The figure of a cell at the end of its training; None where it is not there."""
        if task is None:
            return None
        epochs = self.epochs if train is not None else ()
        return self.cells.get(Place(train, mixed, test, task, epochs[-1] if epochs else None))

    @cached_property
    def epochs(self) -> tuple[float, ...]:
        """After which epochs runs were tested; () at their end alone."""
        return tuple(sorted({place.epochs for place in self.cells if place.epochs is not None}))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.task for place in self.cells))

    def task_on(self, set_: str) -> str | None:
        """The task that was measured on one of the paper's sets of requests, if there is one."""
        return next((task for task in self.tasks if base(task) == "safety" and self.set_of(task) == set_), None)

    @cached_property
    def harmful(self) -> str | None:
        """The task on harmful requests: DirectHarm4 where it was measured, else the first."""
        return self.task_on("directharm4") or next((task for task in self.tasks if base(task) == "safety"), None)

    @cached_property
    def helpful(self) -> str | None:
        """The task of helpfulness."""
        return next((task for name in HELPFULNESS for task in self.tasks if base(task) == name), None)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The training templates."""
        return tuple(dict.fromkeys(place.train for place in self.cells if place.train is not None))

    def _read(self) -> Iterator[Measured]:
        for cell in _listed(self.raw.get("cells")):
            if not isinstance(cell, Mapping) or (mixed := self._mixed(cell)) is None:
                continue
            train, tasks = None if cell.get("train") == BASE else str(cell.get("train")), cell.get("tasks")
            epochs = cell["epochs"] if isinstance(cell.get("epochs"), (int, float)) else None
            for task, figures in tasks.items() if isinstance(tasks, Mapping) else ():
                metric = _METRICS.get(base(task))
                found = figures.get(metric) if isinstance(figures, Mapping) and metric else None
                place = Place(train, mixed, str(cell.get("test")), task, epochs)
                if isinstance(found, Mapping) and (measured := _measured(place, found)):
                    yield measured

    def _mixed(self, cell: Mapping[str, Any]) -> str | None:
        """What was mixed into the training; None for runs that the paper has nothing like."""
        mixed = [Path(str(name)).name.lower() for name in _listed(self.setting("mix")) if cell.get("train") != BASE]
        defense = cell.get("defense", NONE)
        if defense not in (NONE, MIXED) or not all("safety" in name or "refusals" in name for name in mixed):
            return None
        return SAFETY_DATA if defense == MIXED or mixed else ""


def _measured(place: Place, found: Mapping[str, Any]) -> Measured | None:
    value, runs = found.get("mean"), found.get("runs")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None  # nothing was judged
    ends = found.get("interval95")
    interval: Interval | None = None
    if isinstance(ends, (list, tuple)) and len(ends) == 2:
        interval = float(ends[0]), float(ends[1])
    by_seed = [run for run in runs.values() if isinstance(run, (int, float))] if isinstance(runs, Mapping) else []
    helps = base(place.task) not in _LOWER_HELPS
    seeds = len(runs) if isinstance(runs, Mapping) else 1
    prompts = found["prompts"] if isinstance(found.get("prompts"), int) else None
    return Measured(place, float(value), interval or mean_interval(by_seed), seeds, prompts, helps)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
