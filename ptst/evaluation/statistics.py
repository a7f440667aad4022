"""Statistics of a cell: one pair of templates (training and test) and one measure, over several seeds and the same
prompts for every seed.

Seeds and prompts are both samples, and crossed: every run meets every prompt (evaluation/two_way.py has the variance of
a mean over both). Where prompts come in families, further families are what a claim is about, so families are the
units: prompts that resemble each other are no independent ones. evaluation/paired.py compares two cells.

    S: seeds (runs), P: prompts, F: families
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ptst.errors import UserError
from ptst.evaluation.rates import Rate, wilson
from ptst.evaluation.two_way import Interval, margins

Run = int | tuple[str, int]
"""A seed, or an alignment and a seed."""
_Run = TypeVar("_Run", bound=Run)
SEED, DECODING = "seed", "decoding"


@dataclass(frozen=True)
class Cell:
    """Outcomes of one cell: 1 (success), 0, or NaN (unjudged), by seed and prompt."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    outcomes_SP: NDArray[np.float64]
    families: tuple[str, ...] | None = None
    """Family of each prompt, where prompts come in families."""
    groups: tuple[str, ...] | None = None
    """Alignment of each run, where runs are of several aligned models."""
    sample: str = SEED
    """What a run is: a training of its own ("seed"), or a decoding of one training ("decoding")."""

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.seeds if self.groups is None else tuple(zip(self.groups, self.seeds, strict=True))


def cell(prompts: Sequence[str], by_run: Mapping[_Run, ArrayLike], families: Sequence[str] | None = None) -> Cell:
    """A cell from one array of outcomes (P,) per run, in the order of `prompts`. A run is a seed, or (alignment, seed)
    where runs are of several aligned models. Raises UserError for no prompts, a repeated prompt, no seeds, a run of
    another length, outcomes other than 0, 1 and NaN, an unjudged run, and seeds with and without an alignment."""
    if not prompts:
        raise UserError("a cell needs at least one prompt")
    if len(set(prompts)) < len(prompts):
        raise UserError("a cell has a prompt twice, so runs cannot be paired by prompt")
    if not by_run:
        raise UserError("a cell needs at least one seed")
    if families and len(families) != len(prompts):
        raise UserError(f"a cell has {len(families)} families of {len(prompts)} prompts", "name one for each")
    runs = []
    for run, outcomes in by_run.items():
        name = f"seed {run}" if isinstance(run, int) else f"seed {run[1]} of {run[0]}"
        run_P = np.asarray(outcomes, dtype=np.float64)
        if run_P.shape != (len(prompts),):
            raise UserError(f"{name} has outcomes of shape {run_P.shape}, but there are {len(prompts)} prompts")
        judged = run_P[~np.isnan(run_P)]
        if not judged.size:
            raise UserError(f"{name} has no judged outcome")
        if not np.isin(judged, (0, 1)).all():
            raise UserError(f"{name} has an outcome that is neither 0, 1 nor NaN (unjudged)")
        runs.append(run_P)
    pairs = [run for run in by_run if not isinstance(run, int)]
    if pairs and len(pairs) < len(by_run):
        raise UserError("only some seeds of a cell have an alignment", "name (alignment, seed) for all, or seeds alone")
    seeds = tuple(run if isinstance(run, int) else run[1] for run in by_run)
    groups = tuple(group for group, _ in pairs) or None
    return Cell(tuple(prompts), seeds, np.stack(runs), tuple(families) if families else None, groups)


def units(x_SP: NDArray[np.float64], families: Sequence[str] | None) -> tuple[NDArray[np.float64], str]:
    """The table of runs and units, and what a unit is ("family" or "prompt"). Prompts are the units where there are no
    families, or only one.

    Each family's value is linearized, so that the mean over families is that over prompts also where families have
    different sizes (a ratio estimator: Cochran 1977, chapter 6); for equal sizes it is the family's mean."""
    names, family_P = np.unique(families or [], return_inverse=True)
    if len(names) < 2 or len(names) == x_SP.shape[1]:
        return x_SP, "family" if len(names) > 1 else "prompt"
    member_FP = (family_P == np.arange(len(names))[:, None]).astype(float)
    size_F = member_FP.sum(1)
    mean = x_SP.mean()
    return mean + (x_SP - mean) @ member_FP.T * (len(names) / size_F.sum()), "family"


@dataclass(frozen=True)
class Summary:
    """Summary of a cell. `mean` and SDs are over the rates of the runs; the paper reports the population SD."""

    mean: float
    population_sd: float
    sample_sd: float | None
    """None for a single seed."""
    interval: Interval | None
    """95 %, for further seeds and families or prompts (with a single seed, for this run alone). None where no prompt
    was judged in every run."""
    runs: dict[Run, Rate]
    """Rate by run, over the judged prompts."""


def summary(of: Cell) -> Summary:
    """Mean (over alignments, where there are several), SDs and a Wilson interval. Its n is the effective sample size:
    the number of independent answers for which the mean has the variance of the two-way table (after Korn and Graubard
    1998), with the quantile that the two-way t has."""
    runs = {
        run: Rate(int(np.nansum(run_P)), int((~np.isnan(run_P)).sum()))
        for run, run_P in zip(of.runs, of.outcomes_SP, strict=True)
    }
    rates_S = np.array([r.value for r in runs.values()])
    names, group_S = np.unique(of.groups or [""] * len(rates_S), return_inverse=True)
    mean = float(np.mean([rates_S[group_S == g].mean() for g in range(len(names))]))
    sds = float(rates_S.std()), float(rates_S.std(ddof=1)) if len(runs) > 1 else None
    return Summary(mean, *sds, _interval(of, mean), runs)


def _interval(of: Cell, mean: float) -> Interval | None:
    judged = np.flatnonzero(np.isfinite(of.outcomes_SP).all(axis=0))
    complete_SP = of.outcomes_SP[:, judged]
    if not complete_SP.size:
        return None
    families = [of.families[i] for i in judged] if of.families else None
    x_SU, unit = units(complete_SP, families)
    if len(x_SU) == 1 and unit == "prompt":
        return wilson(float(complete_SP.sum()), complete_SP.size)
    # Runs of one seed each are samples of alignments as well as of seeds.
    groups = of.groups if of.groups and len(set(of.groups)) < len(of.groups) else None
    table = margins(x_SU, groups)
    variance = float(table.variance)
    if variance < 1e-24:
        # Without any spread (all are refusals, say) more runs add no information: n is the number of prompts.
        return wilson(mean * complete_SP.shape[1], complete_SP.shape[1])
    n = min(mean * (1 - mean) / variance, complete_SP.size)
    return wilson(mean * n, n, float(table.half_width(0.05)) / variance**0.5)
