"""Rates with counts and Wilson intervals (Wilson 1927), which are valid near 0 and 1, where safety rates often are."""

import statistics
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from ptst.errors import UserError

Z_95 = NormalDist().inv_cdf(0.975)


def wilson(successes: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Interval of a proportion; counts may be effective ones (scipy's function takes whole numbers only). n = 0 gives
    (0, 1). Raises UserError for impossible counts."""
    if not 0 <= successes <= n:
        raise UserError(f"{successes} of {n} is not a rate")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Without rounding errors the interval ends exactly at 0 or 1.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


@dataclass(frozen=True)
class Rate:
    """`successes` out of `n`."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] ({self.successes}/{self.n})"

    def to_json(self) -> dict:
        low, high = self.interval
        rate = self.value if self.n else None  # JSON has no NaN
        return {"successes": self.successes, "n": self.n, "rate": rate, "wilson95": [low, high]}


@dataclass(frozen=True)
class RepeatedRate:
    """A rate over several decodings of the same prompts. These are not independent trials, so it has a spread over the
    decodings instead of an interval."""

    rates: tuple[Rate, ...]

    @property
    def value(self) -> float:
        return statistics.fmean(r.value for r in self.rates)

    @property
    def sd(self) -> float:
        """Population SD, as in the paper."""
        return statistics.pstdev([r.value for r in self.rates])

    def __str__(self) -> str:
        n = "-".join(map(str, sorted({r.n for r in self.rates})))
        return f"{100 * self.value:.1f} % \u00b1 {100 * self.sd:.1f} ({len(self.rates)} decodings of {n})"

    def to_json(self) -> dict:
        values = [r.value for r in self.rates]
        spread = {"sd": self.sd, "sample_sd": statistics.stdev(values)}
        return {"rate": self.value, **spread, "decodings": [r.to_json() for r in self.rates]}
