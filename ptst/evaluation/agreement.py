"""How far judges agree beyond chance: Cohen's kappa for two, Krippendorff's alpha for any number, with intervals.

Intervals are bootstrapped over requests, not answers: answers to one request are alike, and further requests are what
a claim is about. Everything is computed from sums over requests, so that a resample is a weighting of these.

    N: answers, J: judges, K: classes, G: requests, X: figures of a request that are summed
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptst.evaluation.two_way import Interval

Array = NDArray[np.float64]
RESAMPLES = 2000
MISSING = -1


def to_codes(ratings: Sequence[Sequence[Hashable | None]]) -> tuple[NDArray[np.int64], list[Hashable]]:
    """Classes (N, J) as numbers, MISSING for None, and the classes that occur, by name: intervals do not depend on the
    order of the answers."""
    classes = sorted({r for row in ratings for r in row if r is not None}, key=str)
    number = {name: i for i, name in enumerate(classes)} | {None: MISSING}
    return np.array([[number[r] for r in row] for row in ratings], dtype=np.int64), classes


def confusions(codes_N2: NDArray[np.int64], classes: int) -> Array:
    """(N, K, K): for each answer a one at (class of the first, class of the second), nothing where one is missing."""
    found = np.zeros((len(codes_N2), classes, classes))
    both = np.flatnonzero((codes_N2 != MISSING).all(1))
    found[both, codes_N2[both, 0], codes_N2[both, 1]] = 1
    return found


def coincidences(codes_NJ: NDArray[np.int64], classes: int) -> Array:
    """(N, K, K): the pairs of classes that the judges of an answer gave, in both orders, each answer weighing as many
    as its judges. Nothing for an answer with fewer than two judges (Krippendorff 2011)."""
    given_NK = (codes_NJ[:, :, None] == np.arange(classes)).sum(1).astype(np.float64)
    judges_N = given_NK.sum(1)
    pairs = given_NK[:, :, None] * given_NK[:, None, :] - given_NK[:, :, None] * np.eye(classes)
    return pairs / np.maximum(judges_N - 1, 1)[:, None, None] * (judges_N > 1)[:, None, None]


def cohens_kappa(confusion: Array) -> Array:
    """Kappa (Cohen 1960) of confusion matrices (..., K, K) of counts; NaN where both always give the same class."""
    n = confusion.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.trace(confusion, axis1=-2, axis2=-1) / n
        expected = (confusion.sum(-1) * confusion.sum(-2)).sum(-1) / n**2
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def krippendorffs_alpha(coincidence: Array) -> Array:
    """Alpha for nominal classes, of coincidence matrices (..., K, K); NaN where there is one class alone."""
    each = coincidence.sum(-1)
    n = each.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        disagreement = n - np.trace(coincidence, axis1=-2, axis2=-1)
        expected = (n**2 - (each**2).sum(-1)) / (n - 1)
        return np.where(expected > 1e-9, 1 - disagreement / expected, np.nan)


def sums_by(groups_N: Sequence[Hashable], figures_NX: Array) -> Array:
    """(G, X): the sums of figures over the answers to each request."""
    order = {name: i for i, name in enumerate(dict.fromkeys(groups_N))}
    sums = np.zeros((len(order), *figures_NX.shape[1:]))
    np.add.at(sums, [order[name] for name in groups_N], figures_NX)
    return sums


def bootstrap(sums_GX: Array, statistic: Callable[[Array], Array], seed: int = 0) -> Interval | None:
    """95 % percentile interval of `statistic` (of sums over requests, any number at once), resampling the requests.
    None for fewer than two, and where most resamples leave it undefined."""
    groups, shape = len(sums_GX), sums_GX.shape[1:]
    if groups < 2:
        return None
    # Requests with the same figures are drawn together: there are few kinds.
    kinds, counts = np.unique(sums_GX.reshape(groups, -1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(groups, counts / groups, RESAMPLES)
    values = statistic((drawn @ kinds).reshape(RESAMPLES, *shape))
    if np.isnan(values).mean() > 0.5:
        return None
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Agreement:
    """A coefficient over `n` answers that at least two judges judged; `value` None: there is one class alone, so that
    nothing can be said."""

    value: float | None
    interval: Interval | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "not defined (one class alone)" if self.n else "no answer judged by both"
        ends = f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]" if self.interval else ""
        return f"{self.value:.2f}{ends}"

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval95": self.interval and list(self.interval), "n": self.n}


def _agreement(matrices_NKK: Array, requests_N: Sequence[Hashable], statistic: Callable[[Array], Array]) -> Agreement:
    value = float(statistic(matrices_NKK.sum(0)))
    n = int((matrices_NKK.sum((1, 2)) > 0).sum())
    if np.isnan(value):
        return Agreement(None, None, n)
    return Agreement(value, bootstrap(sums_by(requests_N, matrices_NKK), statistic), n)


def kappa(ratings: Sequence[Sequence[Hashable | None]], requests_N: Sequence[Hashable]) -> Agreement:
    """Cohen's kappa of two judges; `ratings`: (N, 2), None where one did not judge."""
    codes, classes = to_codes(ratings)
    return _agreement(confusions(codes, len(classes)), requests_N, cohens_kappa)


def alpha(ratings: Sequence[Sequence[Hashable | None]], requests_N: Sequence[Hashable]) -> Agreement:
    """Krippendorff's alpha of two judges or more; `ratings`: (N, J), None where one did not judge."""
    codes, classes = to_codes(ratings)
    return _agreement(coincidences(codes, len(classes)), requests_N, krippendorffs_alpha)
