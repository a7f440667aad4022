"""Statistics of a cell (one pair of templates, training and test; several seeds, the same prompts for every seed), of
two cells compared, paired by seed and prompt, and the named contrast of PTST.

Seeds and prompts are both samples, and crossed (every run meets every prompt). The variance of a mean over both is
estimated from the margins of the table x_SP:

    v = v_S + v_P - v_R,   v_S = var(run means) / S,  v_P = var(prompt means) / P,  v_R = MS(residual) / (S P)

with Satterthwaite's degrees of freedom (Satterthwaite 1946; v is that of two-way clustering, Cameron, Gelbach and
Miller 2011). With S = 3 runs v_S has 2 degrees of freedom, which widens the interval; a bootstrap does not account for
that (docs/statistics.md has the coverage of both). The primary test of two cells is the two-way t, the mean difference
over the square root of v: its claim is about further seeds and further prompts; docs/statistics.md says
why the other tests are secondary.

    S: seeds (runs), P: prompts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

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
    names = sorted(p_values, key=p_values.__getitem__)
    scaled = (min(1.0, (len(names) - rank) * p_values[name]) for rank, name in enumerate(names))
    adjusted = dict(zip(names, accumulate(scaled, max), strict=True))
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class TwoWayT:
    """Mean of paired differences, 95 % interval (None where nothing varies), two-sided p, degrees of freedom."""

    effect: float
    interval: Interval | None
    p: float
    df: float


@dataclass(frozen=True)
class Contrast:
    """`first` minus `second`, as shares. Everything about further seeds is None for a single seed."""

    first: float
    second: float
    seeds: int
    prompts: int
    left_out: int
    """Number of prompts that were unjudged in some run of either cell."""
    test: TwoWayT | None = None
    bootstrap: Interval | None = None
    """95 % percentile interval over seeds and prompts, for comparison: too narrow below 8 seeds."""
    p_seeds: float | None = None
    """Paired t over seeds, for these prompts only; None also where the seeds do not differ."""
    families: TwoWayT | None = None
    """The test over the means of families; None for fewer than two families."""
    p_flips: float | None = None
    """Exact sign flips over seeds; None above 20 seeds."""
    mcnemar: float | None = None
    """Exact, for a single seed."""

    @property
    def effect(self) -> float:
        return self.first - self.second


def two_way_t(differences_SP: NDArray[np.float64]) -> TwoWayT:
    """The mean of paired differences of any real measure, seeds and prompts both being samples. Where no difference
    varies, p is the smallest of the sign flips. Raises UserError for fewer than two seeds, no prompts, and NaN."""
    S, P = differences_SP.shape
    if S < 2 or P < 1:
        raise UserError(f"a test between seeds needs at least 2 seeds and 1 prompt; there are {S} and {P}")
    if not np.isfinite(differences_SP).all():
        raise UserError("a difference is not a number", "leave out the prompts that were unjudged in some run")
    effect = float(differences_SP.mean())
    variance, df = two_way_variance(differences_SP)
    if not variance:
        return TwoWayT(effect, None, 2.0 ** (1 - S) if effect else 1.0, df)
    half = float(stats.t.ppf(0.975, df)) * variance**0.5
    p = float(2 * stats.t.sf(abs(effect) / variance**0.5, df))
    return TwoWayT(effect, (effect - half, effect + half), p, df)


def paired_contrast(first: Cell, second: Cell) -> Contrast:
    """Compare two cells. Raises UserError for different prompts or seeds, and if no prompt was judged in every run."""
    if first.prompts != second.prompts:
        how = "in another order" if set(first.prompts) == set(second.prompts) else "different ones"
        raise UserError(f"the cells have prompts that do not match ({how})", "test both on the same")
    if first.seeds != second.seeds:
        raise UserError(f"the cells have seeds {first.seeds} and {second.seeds}", "pairs need the same, in one order")
    whole_P = ~np.isnan(first.outcomes_SP + second.outcomes_SP).any(0)
    if not whole_P.any():
        raise UserError("no prompt was judged in every run of both cells")
    a_SP, b_SP = first.outcomes_SP[:, whole_P], second.outcomes_SP[:, whole_P]
    seeds, prompts = a_SP.shape
    means = float(a_SP.mean()), float(b_SP.mean())
    left_out = len(first.prompts) - prompts
    if seeds == 1:
        return Contrast(*means, seeds, prompts, left_out, mcnemar=mcnemar(a_SP[0], b_SP[0]))
    d_SP = a_SP - b_SP
    d_S = d_SP.mean(1)
    families_P = np.array(first.families)[whole_P] if first.families else np.array([])
    d_SF = [d_SP[:, families_P == name].mean(1) for name in np.unique(families_P)]
    return Contrast(
        *means,
        seeds,
        prompts,
        left_out,
        test=two_way_t(d_SP),
        bootstrap=bootstrap_interval(d_SP),
        p_seeds=float(stats.ttest_1samp(d_S, 0).pvalue) if np.ptp(d_S) > 1e-12 else None,
        families=two_way_t(np.stack(d_SF, 1)) if len(d_SF) > 1 else None,
        p_flips=sign_flip(d_S) if seeds <= MOST_FLIPPED else None,
    )


def ptst_contrast(
    trained_and_tested: Cell, tested_only: Cell, measure: str, names: tuple[str, str]
) -> tuple[Contrast, str]:
    """The named contrast and its sentence: the safety prompt in training and test, minus in the test only. `measure`:
    a noun with its article; `names`: of the two cells. Raises UserError as `paired_contrast`."""
    c = paired_contrast(trained_and_tested, tested_only)
    left_out = f", {c.left_out} left out as unjudged" if c.left_out else ""
    head = (
        f"With the safety prompt in training and test ({names[0]}), {measure} is {100 * c.first:.1f} %, with it in the "
        f"test only ({names[1]}) {100 * c.second:.1f} %: a difference of {_points(c.effect)} points "
    )
    if c.test is None:
        return c, head + (
            f"on {c.prompts} prompts{left_out}, within one seed, so nothing can be said about further seeds (exact "
            f"McNemar test between these two runs: p = {c.mcnemar:.2g})."
        )
    sentence = head + f"({_interval(c.test)}; p = {c.test.p:.2g}; {c.seeds} seeds, {c.prompts} prompts{left_out})."
    if c.families is not None:
        sentence += (
            f" With families of prompts in place of prompts: {_points(c.families.effect)} points "
            f"({_interval(c.families)}; p = {c.families.p:.2g})."
        )
    return c, sentence


def _interval(test: TwoWayT) -> str:
    if test.interval is None:
        return "the same in every run and prompt, so there is no interval"
    return f"95 % interval {_points(test.interval[0])} to {_points(test.interval[1])}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
