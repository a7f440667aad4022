"""The two-way t: mean, interval and p of a table of runs and units, both of which are samples, and crossed.

A unit is a prompt, or a family of prompts (evaluation/paired.py says which). The variance of the mean of x_SU is
estimated from the margins of the table:

    V = E v_S + E (v_U - v_R),  v_S = var(run means) / S,  v_U = var(unit means) / U,  v_R = MS(residual) / (S U)

It is that of two-way clustering (Cameron, Gelbach and Miller 2011). With S = 3 runs v_S has two degrees of freedom and
is sometimes far too small by chance; degrees of freedom by Satterthwaite (1946) then jump from 2 to those of the units,
and p < 0.001 comes up nine times too often. So the margins keep their own quantiles (Banerjee 1960):

    (half width)^2 = t_{S-1}^2 v_S + t_{U-1}^2 (v_U - v_R)

For normal effects the level is at most the nominal one, at every level and however the variance is shared out: the
distribution function of a squared normal is concave, so that of a weighted mean of the margins is at least the weighted
mean of theirs, each of which is Student's. It is never wider than with min(S, U) - 1 degrees of freedom for both.
benchmarks/contrast_simulation.py compares these on 0/1 outcomes; docs/statistics.md has its table.

Runs may come in groups (alignments of which each was fine-tuned with several seeds). The mean is over groups, v_S pools
the spread within them: the claim is about further runs of these groups, and further units.

    S: runs (seeds), U: units, G: groups; any dimensions in front (...) are tables of their own
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from ptst.errors import UserError
from ptst.evaluation.rates import Z_95

Interval = tuple[float, float]
Array = NDArray[np.float64]
SHARES: Interval = (-1.0, 1.0)  # what a difference of two shares can be
CHECKED = 0.001  # the smallest level that the simulation checks
_NO_SPREAD = 1e-24  # a variance that is rounding


@dataclass(frozen=True)
class Margins:
    """Mean of a table and the parts of its variance, each with its degrees of freedom (0: a single run)."""

    effect: Array
    runs: Array
    units: Array
    residual: Array
    df: tuple[int, int]
    """Of runs (within groups) and of units."""

    def squared(self, q_runs: float, q_units: float, q_residual: float) -> Array:
        """Sum of the parts, each times the square of a quantile. The residual is in both margins: it is taken out of
        the one with more degrees of freedom, which estimates the difference well. Runs that agree by chance do not
        hide it: what is left of a table without spread of runs is still the residual."""
        few, many, q_few, q_many = self.runs, self.units, q_runs, q_units
        if self.df[1] < self.df[0]:
            few, many, q_few, q_many = many, few, q_many, q_few
        return np.maximum(q_few**2 * few, q_residual**2 * self.residual) + q_many**2 * np.maximum(
            many - self.residual, 0
        )

    @property
    def variance(self) -> Array:
        return self.squared(1, 1, 1)

    def half_width(self, level: float) -> Array:
        """Of the interval with coverage 1 - level: the test rejects where |effect| is greater."""
        runs, units = self.df
        quantiles = (float(stats.t.isf(level / 2, df)) if df else 0.0 for df in (runs, units, runs * units))
        return np.sqrt(self.squared(*quantiles))


def margins(x_SU: Array, groups: Sequence[str] | None = None) -> Margins:
    """The margins of tables (..., S, U). `groups`: of each run. Raises UserError for a table without runs or units, one
    of a single number, NaN, and where every run is the only one of its group (then the groups are the runs)."""
    S, U = x_SU.shape[-2:]
    names, group_S = np.unique(groups or [""] * S, return_inverse=True)
    within = S - len(names)
    if S * U < 2 or (len(names) > 1 and not within):
        raise UserError(f"a table of {S} runs in {len(names)} groups and {U} units has no spread to estimate")
    if not np.isfinite(x_SU).all():
        raise UserError("a difference is not a number", "leave out the prompts that were unjudged in some run")
    member_GS = (group_S == np.arange(len(names))[:, None]).astype(float)
    member_GS /= member_GS.sum(1, keepdims=True)
    weight_S = member_GS.mean(0)
    means_U = weight_S @ x_SU
    effect = means_U.mean(-1)
    no_part = np.zeros_like(effect)
    v_U = means_U.var(-1, ddof=1) / U if U > 1 else no_part
    if not within:
        return Margins(effect, no_part, v_U, no_part, (0, U - 1))
    shares = float((weight_S**2).sum())
    d_SU = x_SU - (member_GS @ x_SU)[..., group_S, :]  # from the mean of the group
    d_S = d_SU.mean(-1)
    v_S = (d_S**2).sum(-1) / within * shares
    if U == 1:
        return Margins(effect, v_S, no_part, no_part, (within, 0))
    v_R = ((d_SU - d_S[..., None]) ** 2).sum((-2, -1)) / (within * (U - 1)) * shares / U
    return Margins(effect, v_S, v_U, v_R, (within, U - 1))


def least_p(runs: int, paired: bool = True) -> float:
    """The smallest p that so many runs support, between 0.001 and 0.05.

    Runs may collapse or not, so that their effects are far from normal. However the runs of two settings that do not
    differ are distributed, two of them differ by the same amount with a probability of at most 1/4 in each direction
    (runs of two kinds, equally frequent), and S pairs do so with 2 / 4^S: 0.031 at 3 seeds, 0.002 at 5. Against one
    fixed model (`paired` False) effects that are symmetric do so with 2 / 2^S. A smaller p would exclude what the
    design cannot. Below 0.001 no level is checked by simulation. At 2 runs the bound would be above 0.05; there p is
    0.05 at least, and the level is nearer to 7 % in the worst case.
    """
    return min(max(2.0 * (4.0 if paired else 2.0) ** -runs, CHECKED), 0.05)


@dataclass(frozen=True)
class TwoWayT:
    """Mean of paired differences, its 95 % interval, and two-sided p."""

    effect: float
    interval: Interval | None
    """Within what the measure can be. None where nothing varies and the measure has no bounds."""
    p: float
    bounded: bool
    """p is the smallest that the design supports (`least_p`): the test's own is smaller."""
    df: tuple[int, int]
    """Degrees of freedom of runs and of units."""


def two_way_t(
    x_SU: Array, groups: Sequence[str] | None = None, within: Interval | None = None, paired: bool = True
) -> TwoWayT:
    """The test of a table of paired differences of any real measure. `within`: what the measure can be at all (SHARES);
    the interval is cut there. With a single run the claim is about further units alone. Where nothing varies, and
    `within` is given, the interval is that of differing in none of U units (Wilson 1927). Raises UserError as
    `margins`."""
    table = margins(x_SU, groups)
    runs, (run_df, _) = len(x_SU), table.df
    least = least_p(runs, paired) if run_df else CHECKED
    effect = float(table.effect)
    if float(table.variance) < _NO_SPREAD:
        return TwoWayT(effect, _unvaried(effect, x_SU.shape[1], within), *_unvaried_p(effect, least), table.df)
    half = float(table.half_width(0.05))
    interval = effect - half, effect + half
    if within is not None:
        interval = max(interval[0], within[0]), min(interval[1], within[1])
    p = p_value(table, least)
    return TwoWayT(effect, interval, max(p, least), p < least, table.df)


def p_value(table: Margins, least: float) -> float:
    """The level at which the interval just reaches zero. Below `least` it is not searched for: 0."""
    effect = abs(float(table.effect))
    if not effect:
        return 1.0
    if effect > table.half_width(least):
        return 0.0
    # The half width falls from above the effect to nothing as the level rises to 1.
    return float(np.exp(optimize.brentq(lambda x: table.half_width(np.exp(x)) - effect, np.log(least), 0.0)))


def _unvaried(effect: float, units: int, within: Interval | None) -> Interval | None:
    if within is None:
        return None
    share = Z_95**2 / (units + Z_95**2)
    return effect - share * (effect - within[0]), effect + share * (within[1] - effect)


def _unvaried_p(effect: float, least: float) -> tuple[float, bool]:
    return (least, True) if effect else (1.0, False)


def p_text(p: float, bounded: bool = False) -> str:
    """`p = 0.012`; of a bounded p `p < 0.032`, rounded up."""
    if not bounded:
        return f"p = {p:.2g}"
    digits = 1 - int(np.floor(np.log10(p)))
    return f"p < {np.ceil(p * 10**digits - 1e-9) / 10**digits:g}"
