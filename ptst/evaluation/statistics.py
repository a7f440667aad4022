"""Statistics of a cell: one pair of templates (training, test), several seeds, the same prompts for every seed.

Seeds and prompts are both samples, and crossed (every run meets every prompt). The variance of a mean over both is
estimated from the margins of the table x_SP:

    v = v_S + v_P - v_R,   v_S = var(run means) / S,  v_P = var(prompt means) / P,  v_R = MS(residual) / (S P)

with Satterthwaite's degrees of freedom (Satterthwaite 1946; v is that of two-way clustering, Cameron, Gelbach and
Miller 2011). With S = 3 runs v_S has 2 degrees of freedom, which widens the interval; a bootstrap does not account for
that (docs/statistics.md has the coverage of both).

    S: seeds (runs), P: prompts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ptst.errors import UserError
from ptst.evaluation.rates import Z_95, Rate, wilson

Interval = tuple[float, float]
MOST_FLIPPED = 20  # seeds; there are 2^20 ways to flip their signs


@dataclass(frozen=True)
class Cell:
    """Outcomes of one cell: 1 (success), 0, or NaN (unjudged), by seed and prompt."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    outcomes_SP: NDArray[np.float64]
    families: tuple[str, ...] | None = None
    """Family of each prompt, where prompts come in families."""


def cell(prompts: Sequence[str], by_seed: Mapping[int, ArrayLike], families: Sequence[str] | None = None) -> Cell:
    """A cell from one array of outcomes (P,) per seed, in the order of `prompts`. Raises UserError for no prompts, a
    repeated prompt, no seeds, a run of another length, outcomes other than 0, 1 and NaN, and an unjudged run."""
    if not prompts:
        raise UserError("a cell needs at least one prompt")
    if len(set(prompts)) < len(prompts):
        raise UserError("a cell has a prompt twice, so runs cannot be paired by prompt")
    if not by_seed:
        raise UserError("a cell needs at least one seed")
    runs = []
    for seed, outcomes in by_seed.items():
        run_P = np.asarray(outcomes, dtype=np.float64)
        if run_P.shape != (len(prompts),):
            raise UserError(f"seed {seed} has outcomes of shape {run_P.shape}, but there are {len(prompts)} prompts")
        judged = run_P[~np.isnan(run_P)]
        if not judged.size:
            raise UserError(f"seed {seed} has no judged outcome")
        if not np.isin(judged, (0, 1)).all():
            raise UserError(f"seed {seed} has an outcome that is neither 0, 1 nor NaN (unjudged)")
        runs.append(run_P)
    return Cell(tuple(prompts), tuple(by_seed), np.stack(runs), tuple(families) if families else None)


@dataclass(frozen=True)
class Summary:
    """Summary of a cell. `mean` and SDs are over the rates of the runs; the paper reports the population SD."""

    mean: float
    population_sd: float
    sample_sd: float | None
    """None for a single seed."""
    interval: Interval | None
    """95 %, for further seeds and prompts (with a single seed, for this run and further prompts). None where no prompt
    was judged in every run."""
    runs: dict[int, Rate]
    """Rate by seed, over the judged prompts."""


def summary(of: Cell) -> Summary:
    """Mean, SDs and a Wilson interval. Over several seeds its n is the effective sample size: the number of independent
    answers for which the mean has variance v (after Korn and Graubard 1998), with Student's quantile."""
    runs = {
        seed: Rate(int(np.nansum(run_P)), int((~np.isnan(run_P)).sum()))
        for seed, run_P in zip(of.seeds, of.outcomes_SP, strict=True)
    }
    rates_S = np.array([r.value for r in runs.values()])
    mean, seeds = float(rates_S.mean()), len(runs)
    if seeds == 1:
        return Summary(mean, 0.0, None, next(iter(runs.values())).interval, runs)
    complete_SP = of.outcomes_SP[:, ~np.isnan(of.outcomes_SP).any(0)]
    sds = float(rates_S.std()), float(rates_S.std(ddof=1))
    if not complete_SP.size:
        return Summary(mean, *sds, None, runs)
    variance, df = two_way_variance(complete_SP)
    # Without any spread (all are refusals, say) more runs add no information: n is the number of prompts.
    n = min(mean * (1 - mean) / variance, complete_SP.size) if variance else complete_SP.shape[1]
    interval = wilson(mean * n, n, float(stats.t.ppf(0.975, df)) if variance else Z_95)
    return Summary(mean, *sds, interval, runs)


def two_way_variance(x_SP: NDArray[np.float64]) -> tuple[float, float]:
    """(v, degrees of freedom) of the mean of a crossed table of at least two seeds. v is at least the largest of its
    three parts; with a single prompt it is v_S."""
    S, P = x_SP.shape
    assert S > 1 and P > 0, "a table of at least two seeds and one prompt"
    means_S, means_P = x_SP.mean(1), x_SP.mean(0)
    v_S = float(means_S.var(ddof=1)) / S
    if P == 1:
        return v_S, S - 1
    v_P = float(means_P.var(ddof=1)) / P
    residual_SP = x_SP - means_S[:, None] - means_P + x_SP.mean()
    v_R = float((residual_SP**2).sum()) / ((S - 1) * (P - 1)) / (S * P)
    v = max(v_S + v_P - v_R, v_S, v_P, v_R)
    if v < 1e-24:  # rounding of a table without spread
        return 0.0, S - 1
    df = v**2 / (v_S**2 / (S - 1) + v_P**2 / (P - 1) + v_R**2 / ((S - 1) * (P - 1)))
    return v, max(df, 1.0)


def sign_flip(differences_S: ArrayLike) -> float:
    """Exact two-sided p of paired differences by seed: the share of the 2^S ways to flip their signs with a sum at
    least as large. Never below 2 / 2^S: 0.25 at 3 seeds, 0.0625 at 5, 0.0078 at 8. Up to 20 seeds."""
    d_S = np.asarray(differences_S, dtype=np.float64)
    if not 1 <= len(d_S) <= MOST_FLIPPED:
        raise UserError(f"there are {len(d_S)} seeds", f"exact sign flips are for 1 to {MOST_FLIPPED}")
    sums = np.array(list(product((1, -1), repeat=len(d_S)))) @ d_S
    return float((np.abs(sums) >= abs(d_S.sum()) - 1e-12).mean())


def mcnemar(first_P: ArrayLike, second_P: ArrayLike) -> float:
    """Exact two-sided p of two runs on the same prompts (McNemar 1947): about these runs, not their settings. Prompts
    that are unjudged in either are left out."""
    difference_P = np.asarray(first_P, dtype=np.float64) - np.asarray(second_P, dtype=np.float64)
    more, fewer = int((difference_P == 1).sum()), int((difference_P == -1).sum())
    return float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def bootstrap_interval(x_SP: NDArray[np.float64], resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean, resampling seeds and prompts (Owen 2007, "pigeonhole bootstrap")."""
    S, P = x_SP.shape
    rng = np.random.default_rng(seed)
    drawn_BS = rng.multinomial(S, np.full(S, 1 / S), resamples) / S
    drawn_BP = rng.multinomial(P, np.full(P, 1 / P), resamples) / P
    low, high = np.quantile(((drawn_BS @ x_SP) * drawn_BP).sum(1), [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for multiple tests (Holm 1979), by name. Raises UserError for one outside 0 to 1."""
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise UserError(f"p of {name} is {p}", "it must be between 0 and 1")
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
