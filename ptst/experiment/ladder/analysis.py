"""A study's outcomes as tables by run and prompt, from which every rate, interval and contrast is computed.

A run is an alignment and a seed of training. Of the aligned model there is one run for each alignment; where a cell is
compared with it, every run is paired with its own alignment's.

    R: runs, P: prompts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from ptst.errors import UserError
from ptst.evaluation import statistics
from ptst.evaluation.tasks.table import base
from ptst.experiment.ladder.outcomes import Key, Measured, Outcomes, alignment_of, outcome

NONE = "none"
LADDER = "ladder:"  # what the name of a rung begins with: ladder:llama/system-50
DISTANCE = "distance"  # the task that measures how far rungs are
ALIGNED = "aligned model"


@dataclass(frozen=True)
class Study:
    """`judge`: whose verdicts are counted."""

    outcomes: Outcomes
    judge: str

    @classmethod
    def of(cls, outcomes: Outcomes, judge: str | None = None) -> "Study":
        """With the judge that the study names, unless another is asked for. Raises UserError for one without verdicts
        in it."""
        known = list(outcomes.judges)
        name = judge or str(outcomes.about.get("judge") or (known[0] if known else ""))
        if known and name not in known:
            raise UserError(f"there are no verdicts of the judge {name}", f"there are those of {', '.join(known)}")
        return cls(outcomes, name)

    @property
    def keys(self) -> list[Key]:
        return list(self.outcomes.cells)

    def measured(self, key: Key) -> Measured:
        """Raises UserError for a cell that the study does not have."""
        try:
            return self.outcomes.cells[key]
        except KeyError:
            cell = f"{key.train or ALIGNED}, defence {key.defense}, under {key.test}: {key.task} ({key.data})"
            raise UserError(f"the study has no cell {cell}") from None

    @cached_property
    def runs(self) -> list[str]:
        """All runs of trained models."""
        found = (run for measured in self.outcomes.cells.values() for run in measured.runs())
        return sorted({run for run in found if "/" in run}, key=_run_order)

    def seeds_of(self, runs: Sequence[str]) -> tuple[int, ...]:
        """A number for each run: its seed where seeds are unique, else its place among all runs."""
        seeds = [int(run.partition("/")[2]) for run in self.runs]
        numbers = seeds if len(set(seeds)) == len(seeds) else list(range(len(seeds)))
        by_run = dict(zip(self.runs, numbers, strict=True))
        return tuple(by_run[run] if run in by_run else -1 - i for i, run in enumerate(runs))

    def letters(self, key: Key) -> dict[str, str]:
        """The letters of a cell by run. Raises UserError where this judge has judged none of it."""
        found = self.measured(key).judged.get(self.judge)
        if not found:
            raise UserError(f"{self.judge} has judged no answer of {key.train or ALIGNED} under {key.test}, {key.task}")
        return dict(sorted(found.items(), key=lambda pair: _run_order(pair[0])))

    def table(self, key: Key, measure: str) -> statistics.Cell:
        """The outcomes of a judged cell by run and prompt. Raises UserError as `letters`."""
        return self._cell(key, measure, self.letters(key))

    def aligned(self, key: Key, measure: str) -> statistics.Cell:
        """The aligned model under the same test prompt, with the runs of `key`, each its alignment's. Raises UserError
        where the study has not measured it."""
        own = self.letters(self.base_of(key))
        runs = self.letters(key)
        if missing := {alignment_of(run) for run in runs} - own.keys():
            raise UserError(f"the aligned model of {min(missing)} was not tested under {key.test}")
        return self._cell(key, measure, {run: own[alignment_of(run)] for run in runs})

    def _cell(self, key: Key, measure: str, letters: dict[str, str]) -> statistics.Cell:
        prompts = self.outcomes.prompts[key.task]
        names = [f"{i}:{name}" for i, name in enumerate(prompts.ids)]
        seeds = self.seeds_of(list(letters))
        rows = [[outcome(each, measure) for each in found] for found in letters.values()]
        families = prompts.families if all(prompts.families) else None
        cell = statistics.cell(names, dict(zip(seeds, rows, strict=True)), families)
        return self._grouped(cell, [alignment_of(run) for run in letters])

    def _grouped(self, cell: statistics.Cell, groups: Sequence[str]) -> statistics.Cell:
        return cell

    def base_of(self, key: Key) -> Key:
        """The aligned model's cell under the same test prompt and task."""
        return Key(key.data, "", NONE, key.test, key.task)

    def mean(self, key: Key, name: str) -> float | None:
        """The mean over runs of a figure that is no rate of judged answers; None where it was not measured."""
        measured = self.outcomes.cells.get(key)
        if measured is None:
            return None
        if name in measured.values:
            return fmean(measured.values[name].values())
        marks = measured.marks.get(name)
        if not marks:
            return None
        known = [float(mark) for found in marks.values() for mark in found if mark != "-"]
        return fmean(known) if known else None

    # The ladder

    @cached_property
    def data(self) -> list[str]:
        return list(dict.fromkeys(key.data for key in self.keys))

    @cached_property
    def trains(self) -> list[str]:
        return list(dict.fromkeys(key.train for key in self.keys if key.train))

    @cached_property
    def defenses(self) -> list[str]:
        """`none` first."""
        found = dict.fromkeys(key.defense for key in self.keys)
        return sorted(found, key=lambda name: name != NONE)

    def task(self, name: str) -> str:
        """The study's task of a name without its set (`safety`); the first of several. Raises UserError for none."""
        found = next((task for task in self.outcomes.prompts if base(task) == name), None)
        if found is None:
            raise UserError(f"the study has no task {name}")
        return found

    def rungs(self, train: str) -> list[str]:
        """The test prompts of a training template's ladder."""
        head = f"{LADDER}{short(train)}/"
        return list(dict.fromkeys(key.test for key in self.keys if key.test.startswith(head)))

    def distance(self, key: Key, measure: str) -> float | None:
        """How far a cell's test prompt is from the model's training prompt, the mean over runs."""
        return self.mean(Key(key.data, key.train, key.defense, key.test, DISTANCE), measure)


def short(template: str) -> str:
    """The name of a template in those of its rungs: `llama` of `chat:llama`."""
    return template.removeprefix("chat:")


def rung_name(test: str) -> str:
    """`system-50` of `ladder:llama/system-50`; of another test template its name."""
    return test.rpartition("/")[2] if test.startswith(LADDER) else test


def _run_order(run: str) -> tuple[str, int]:
    alignment, _, seed = run.partition("/")
    return alignment, int(seed) if seed.isdigit() else -1


def weighted(cells: Sequence[statistics.Cell], weights: Sequence[float]) -> np.ndarray:
    """A weighted sum of cells by run and prompt, (R, P), of the prompts that all judged in every run. Raises UserError
    for cells of different runs, and where no prompt is left."""
    if len({cell.seeds for cell in cells}) > 1:
        raise UserError("the cells have different runs", "finish the study first")
    sum_RP = sum(weight * cell.outcomes_SP for weight, cell in zip(weights, cells, strict=True))
    assert isinstance(sum_RP, np.ndarray)
    whole_P = ~np.isnan(sum_RP).any(0)
    if not whole_P.any():
        raise UserError("no prompt was judged in every run of all cells")
    return sum_RP[:, whole_P]
