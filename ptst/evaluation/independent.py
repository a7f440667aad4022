"""Two rates of which only the figures are known, not the answers: a published one, or one of another run.

Prompts cannot be paired then, so the interval of a difference is wider than that of evaluation/paired.py.
"""

from collections.abc import Sequence
from math import sqrt

from scipy import stats

from ptst.evaluation.rates import wilson
from ptst.evaluation.two_way import Interval


def difference_interval(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """95 % interval of `first` minus `second` from their own (Newcombe 1998, method 10; for other measures than rates
    Zou and Donner 2008, MOVER). It assumes that the two are independent."""
    effect = first - second
    low = sqrt((first - of_first[0]) ** 2 + (of_second[1] - second) ** 2)
    high = sqrt((of_first[1] - first) ** 2 + (second - of_second[0]) ** 2)
    return effect - low, effect + high


def published_interval(rate: float, prompts: int, seeds: int = 1, population_sd: float | None = None) -> Interval:
    """95 % interval of a mean rate of which mean, prompts, seeds and their population SD are published: for further
    prompts and, with an SD, further seeds. A Wilson interval whose n is the effective one: the variance of the mean is
    at most rate (1 - rate) / prompts from the prompts, as if every seed gave the same answers, plus that of the seeds;
    t has Satterthwaite's degrees of freedom."""
    of_prompts = rate * (1 - rate) / prompts
    of_seeds = population_sd**2 / (seeds - 1) if population_sd and seeds > 1 else 0.0
    if not of_prompts or not of_seeds:
        return wilson(rate * prompts, prompts)
    variance = of_prompts + of_seeds
    df = variance**2 / (of_seeds**2 / (seeds - 1))
    n = rate * (1 - rate) / variance
    return wilson(rate * n, n, float(stats.t.isf(0.025, df)))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """95 % t interval of the mean over runs, for further runs; None of a single one."""
    if len(values) < 2:
        return None
    mean, n = sum(values) / len(values), len(values)
    sd = sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.isf(0.025, n - 1)) * sd / sqrt(n)
    return mean - half, mean + half
