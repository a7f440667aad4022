"""Two cells compared, paired by seed and prompt; and the named contrast of PTST.

The primary test is the two-way t, the mean difference over the square root of `two_way_variance`: its claim is about
further seeds and further prompts. The other tests, and why they are secondary: docs/statistics.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ptst.errors import UserError
from ptst.evaluation.statistics import (
    MOST_FLIPPED,
    Cell,
    Interval,
    bootstrap_interval,
    mcnemar,
    sign_flip,
    two_way_variance,
)


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
    test: TwoWayT | None
    bootstrap: Interval | None
    """95 % percentile interval over seeds and prompts, for comparison: too narrow below 8 seeds."""
    p_seeds: float | None
    """Paired t over seeds, for these prompts only; None also where the seeds do not differ."""
    families: TwoWayT | None
    """The test over the means of families; None for fewer than two families."""
    p_flips: float | None
    """Exact sign flips over seeds; None above 20 seeds."""
    mcnemar: float | None
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
        return Contrast(*means, seeds, prompts, left_out, None, None, None, None, None, mcnemar(a_SP[0], b_SP[0]))
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
        mcnemar=None,
    )


def ptst_contrast(
    trained_and_tested: Cell, tested_only: Cell, measure: str, names: tuple[str, str]
) -> tuple[Contrast, str]:
    """The named contrast and its sentence: the safety prompt in training and test, minus in the test only. `measure`:
    a noun with its article; `names`: of the two cells. Raises UserError as `paired_contrast`."""
    c = paired_contrast(trained_and_tested, tested_only)
    left_out = f", {c.left_out} left out as unjudged" if c.left_out else ""
    head = (
        f"With the safety prompt in training and test ({names[0]}), {measure} is {_percent(c.first)}, with it in the "
        f"test only ({names[1]}) {_percent(c.second)}: a difference of {_points(c.effect)} points "
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
