"""Tests that are reported next to the two-way t, and the adjustment for several of them. docs/statistics.md says why
each is not the first.

    S: seeds (runs), P: prompts, B: resamples
"""

from collections.abc import Mapping
from itertools import accumulate, product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ptst.errors import UserError
from ptst.evaluation.two_way import Interval

MOST_FLIPPED = 20  # seeds; there are 2^20 ways to flip their signs


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
