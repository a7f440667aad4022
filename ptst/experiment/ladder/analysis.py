"""A study's outcomes as tables by run and prompt, from which every rate, interval and contrast is computed.

A run is an alignment and a seed of training. Of the aligned model there is one run for each alignment.

    R: runs, U: units (families of prompts, or prompts)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

import numpy as np

from ptst.defense_names import DEFENSES, NONE
from ptst.errors import UserError
from ptst.evaluation import statistics
from ptst.evaluation.tasks.requests import HALVES, XSTEST, half_of
from ptst.evaluation.tasks.table import base
from ptst.evaluation.two_way import two_way_t
from ptst.experiment.config import GridConfig
from ptst.experiment.ladder.names import is_rung, parts, short
from ptst.experiment.ladder.outcomes import Key, Measured, Outcomes, Prompts, outcome, split_measure

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
    def margin(self) -> float:
        """What a loss must stay below for safety to be called kept, as a share."""
        settings = self.outcomes.about.get("settings") or {}
        return float(settings.get("equivalence_margin", GridConfig.equivalence_margin)) / 100

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

    def letters(self, key: Key) -> dict[str, str]:
        """The letters of a cell by run. Raises UserError where this judge has judged none of it."""
        found = self.measured(key).judged.get(self.judge)
        if not found:
            raise UserError(f"{self.judge} has judged no answer of {key.train or ALIGNED} under {key.test}, {key.task}")
        return dict(sorted(found.items(), key=lambda pair: _run_order(pair[0])))

    def table(self, key: Key, measure: str) -> statistics.Cell:
        """The outcomes of a judged cell by run and prompt; of XSTest those of the half that the measure names. Raises
        UserError as `letters`, and for a half of another task, or none of XSTest."""
        return self._cell(key, measure, self.letters(key))

    def _cell(self, key: Key, measure: str, letters: dict[str, str]) -> statistics.Cell:
        prompts, (half, of) = self.outcomes.prompts[key.task], split_measure(measure)
        used = _of_half(prompts, key.task, half, measure)
        names = [f"{i}:{prompts.ids[i]}" for i in used]
        rows = {_as_run(run): [outcome(found[i], of) for i in used] for run, found in letters.items()}
        families = [prompts.families[i] for i in used]
        return statistics.cell(names, rows, families if all(families) else None)

    def shown(self, key: Key, measure: str) -> statistics.Summary:
        """Mean, spread and interval of a judged cell. Of the aligned models the interval is for further families (or
        prompts) asked of these models: there are one or two of them, which say little of further alignments."""
        cell = self.table(key, measure)
        found = statistics.summary(cell)
        if key.train or len(found.runs) == 1:
            return found
        whole = np.flatnonzero(~np.isnan(cell.outcomes_SP).any(0))
        families = [cell.families[i] for i in whole] if cell.families else None
        units_RU = statistics.units(cell.outcomes_SP[:, whole], families)[0]
        interval = two_way_t(units_RU.mean(0, keepdims=True), within=(0.0, 1.0)).interval if units_RU.size > 1 else None
        return replace(found, interval=interval)

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
        """In the order of ptst.defenses, `none` first."""
        found = {key.defense for key in self.keys}
        return [name for name in DEFENSES if name in found] + sorted(found - set(DEFENSES))

    def task(self, name: str) -> str:
        """The study's task of a name without its set (`safety`); the first of several. Raises UserError for none."""
        found = next((task for task in self.outcomes.prompts if base(task) == name), None)
        if found is None:
            raise UserError(f"the study has no task {name}")
        return found

    def rungs(self, train: str) -> list[str]:
        """The test prompts of a training template's ladder."""
        own = (key.test for key in self.keys if is_rung(key.test) and parts(key.test)[0] == short(train))
        return list(dict.fromkeys(own))

    def distance(self, key: Key, measure: str) -> float | None:
        """How far a cell's test prompt is from the model's training prompt, the mean over runs."""
        return self.mean(Key(key.data, key.train, key.defense, key.test, DISTANCE), measure)


def _of_half(prompts: Prompts, task: str, half: str, measure: str) -> list[int]:
    """The numbers of a task's prompts that a measure is of: all, or of XSTest one half."""
    of_xstest = base(task) == XSTEST.name
    if of_xstest and not half:
        raise UserError(f"{task} has two halves", f"say which: {' or '.join(f'{h}:{measure}' for h in HALVES)}")
    if half and not of_xstest:
        raise UserError(f"{task} has no half {half}: only xstest has two", f"say {split_measure(measure)[1]}")
    return [i for i, category in enumerate(prompts.categories) if not half or half_of(category) == half]


def _as_run(name: str) -> statistics.Run:
    """A run as (alignment, seed); the aligned model itself has no seed."""
    alignment, _, seed = name.partition("/")
    return alignment, int(seed or 0)


def _run_order(run: str) -> tuple[str, int]:
    alignment, _, seed = run.partition("/")
    return alignment, int(seed) if seed.isdigit() else -1


def weighted(cells: Sequence[statistics.Cell], weights: Sequence[float]) -> np.ndarray:
    """A weighted sum of cells by run and unit, (R, U). Prompts that some run of some cell did not judge are left out.
    Raises UserError for cells of different runs, and where no prompt is left."""
    if len({cell.runs for cell in cells}) > 1:
        raise UserError("the cells have different runs", "finish the study first")
    sum_RP = sum(weight * cell.outcomes_SP for weight, cell in zip(weights, cells, strict=True))
    assert isinstance(sum_RP, np.ndarray)
    whole = np.flatnonzero(~np.isnan(sum_RP).any(0))
    if not whole.size:
        raise UserError("no prompt was judged in every run of all cells")
    families = cells[0].families
    return statistics.units(sum_RP[:, whole], [families[i] for i in whole] if families else None)[0]
