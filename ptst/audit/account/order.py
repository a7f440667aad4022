"""Is an order of examples a shuffle? Tests that a random order fails less than once in a hundred million times.

Places in an order are angles on a circle, so that an order and its rotations are alike. Two orders are alike where
their angles go round together, in one direction or the other: of n pairs of random angles, the mean of the products is
longer than R in exp(-n R^2) of all cases (Rayleigh). `least`: R that must be reached besides, where an order may depend
on the examples' lengths, as in packs.
"""

import math
from collections.abc import Sequence

import numpy as np

LEAST = 21  # examples: fewer prove nothing
_NEVER = math.log(1e-8)
Numbers = Sequence[int] | np.ndarray


def is_sorted(steps: Numbers, least: float = 0.0) -> bool:
    """Whether rows, given the step of each by their order in the data, are taken in that order, or in its reverse."""
    steps = np.asarray(steps, np.int64)
    change = np.diff(steps)
    exactly = bool((change >= 0).all() or (change <= 0).all())
    return _proven(exactly, steps) or _alike(_angle(np.arange(len(steps)), len(steps)), steps, least)


def is_in_turn(steps: Numbers, waiting: int = 0, wraps: bool = False) -> bool:
    """Whether rows, given the step of each by their order in the data, are taken in that order. `waiting`: how many may
    be passed over, as those that do not fit into a pack are. `wraps`: they may begin in the middle and go on with the
    first."""
    steps = np.asarray(steps, np.int64)
    if wraps and len(steps):
        falls = np.flatnonzero(np.diff(steps) < 0)
        begin = max((0, *(falls + 1).tolist()), key=lambda at: (-int(steps[at]), at))
        steps = np.roll(steps, -begin)
    taken = np.searchsorted(np.sort(steps), steps, side="right")  # when each one's step is over
    fitting = bool((taken > np.arange(len(steps)) - waiting).all())
    return fitting and (waiting > 0 or bool((np.diff(steps) >= 0).all()))


def is_repeated(before: Numbers, now: Numbers, least: float = 0.0) -> bool:
    """Whether two epochs, given each row's step in both, take the rows in the same order, or in its reverse."""
    before, now = np.asarray(before, np.int64), np.asarray(now, np.int64)
    if not len(before) or not _enough(before):
        return False
    exactly = bool((before - now == before[0] - now[0]).all())
    return _proven(exactly, now) or _alike(_angles(before), now, least)


def is_clustered(own: Numbers, every: Numbers, least: float = 0.0) -> bool:
    """Whether the steps of one source's examples are in one part of an epoch, whose steps are `every` example's."""
    own, every = np.asarray(own, np.int64), np.asarray(every, np.int64)
    if len(own) < LEAST:
        return False
    first, size = every.min(), every.max() - every.min() + 1
    mean, whole = (_angle(steps - first, size).mean() for steps in (own, every))
    return bool(abs(mean - whole) > least and -len(own) * abs(mean - whole) ** 2 < _NEVER)


def _proven(exactly: bool, steps: np.ndarray) -> bool:
    return exactly and len(steps) >= LEAST and _enough(steps)


def _alike(angles: np.ndarray, steps: np.ndarray, least: float) -> bool:
    if len(steps) < LEAST or not _enough(steps):
        return False
    ours, theirs = angles - angles.mean(), _angles(steps)
    theirs -= theirs.mean()
    scale = math.sqrt(np.vdot(ours, ours).real * np.vdot(theirs, theirs).real)
    for other in (theirs, theirs.conj()):
        together = abs(ours @ other) / scale
        if together > least and -len(steps) * together**2 < _NEVER:
            return True
    return False


def _enough(steps: np.ndarray) -> bool:
    """Whether examples can be put into these steps in so many ways that chance would not find the same one."""
    sizes, times = np.unique(np.unique(steps, return_counts=True)[1], return_counts=True)
    ways = sum(math.lgamma(size + 1) * number for size, number in zip(sizes.tolist(), times.tolist(), strict=True))
    return ways - math.lgamma(len(steps) + 1) < _NEVER


def _angles(steps: np.ndarray) -> np.ndarray:
    first, size = steps.min(), steps.max() - steps.min() + 1
    return _angle(steps - first, size)


def _angle(places: np.ndarray, size: int) -> np.ndarray:
    return np.exp(2j * np.pi * places / size)
