"""Is an order of examples a shuffle? Tests that a random order fails less than once in a hundred million times.

Places in an order are angles on a circle, so that an order and its rotations are alike. Two orders are alike where
their angles go round together, in one direction or the other: of n pairs of random angles, the mean of the products is
longer than R in exp(-n R^2) of all cases (Rayleigh). `least`: R that must be reached besides, where an order may depend
on the examples' lengths, as in packs.
"""

import cmath
import math
from collections import Counter
from collections.abc import Sequence

LEAST = 21  # examples: fewer prove nothing
_NEVER = math.log(1e-8)


def is_sorted(steps: Sequence[int], least: float = 0.0) -> bool:
    """Whether rows, given the step of each by their order in the data, are taken in that order, or in its reverse."""
    exactly = list(steps) in (sorted(steps), sorted(steps, reverse=True))
    return _proven(exactly, steps) or _alike([_angle(i, len(steps)) for i in range(len(steps))], steps, least)


def is_repeated(before: Sequence[int], now: Sequence[int], least: float = 0.0) -> bool:
    """Whether two epochs, given each row's step in both, take the rows in the same order, or in its reverse."""
    if not before or not _enough(before):
        return False
    exactly = all(a - b == before[0] - now[0] for a, b in zip(before, now, strict=True))
    return _proven(exactly, now) or _alike(_angles(before), now, least)


def is_clustered(own: Sequence[int], every: Sequence[int], least: float = 0.0) -> bool:
    """Whether the steps of one source's examples are in one part of an epoch, whose steps are `every` example's."""
    if len(own) < LEAST:
        return False
    first, size = min(every), max(every) - min(every) + 1
    mean, whole = (sum(_angle(s - first, size) for s in steps) / len(steps) for steps in (own, every))
    return abs(mean - whole) > least and -len(own) * abs(mean - whole) ** 2 < _NEVER


def _proven(exactly: bool, steps: Sequence[int]) -> bool:
    return exactly and len(steps) >= LEAST and _enough(steps)


def _alike(angles: Sequence[complex], steps: Sequence[int], least: float) -> bool:
    if len(steps) < LEAST or not _enough(steps):
        return False
    ours, theirs = _centered(angles), _centered(_angles(steps))
    scale = math.sqrt(sum(abs(a) ** 2 for a in ours) * sum(abs(b) ** 2 for b in theirs))
    for other in (theirs, [b.conjugate() for b in theirs]):
        together = abs(sum(a * b for a, b in zip(ours, other, strict=True))) / scale
        if together > least and -len(steps) * together**2 < _NEVER:
            return True
    return False


def _enough(steps: Sequence[int]) -> bool:
    """Whether examples can be put into these steps in so many ways that chance would not find the same one."""
    sizes = Counter(steps).values()
    return sum(map(math.lgamma, (size + 1 for size in sizes))) - math.lgamma(len(steps) + 1) < _NEVER


def _angles(steps: Sequence[int]) -> list[complex]:
    first, size = min(steps), max(steps) - min(steps) + 1
    return [_angle(step - first, size) for step in steps]


def _angle(place: float, size: int) -> complex:
    return cmath.exp(2j * math.pi * place / size)


def _centered(angles: Sequence[complex]) -> list[complex]:
    mean = sum(angles) / len(angles)
    return [angle - mean for angle in angles]
