"""Levenshtein's distance of two token sequences."""

from collections.abc import Sequence

import numpy as np


def edit_share(a: Sequence[int], b: Sequence[int]) -> float:
    """Levenshtein's distance as a share of the longer sequence: 0 for equal ones, 1 where nothing can be kept."""
    return edit_distance(a, b) / (max(len(a), len(b)) or 1)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """The fewest insertions, deletions and replacements of one token that turn `a` into `b` (Levenshtein 1966)."""
    row, steps, target = np.arange(len(b) + 1), np.arange(len(b) + 1), np.asarray(b)
    for i, token in enumerate(a, 1):
        # Without insertions first; then each place is reached from the cheapest one before it by insertions alone.
        row = np.concatenate(([i], np.minimum(row[1:] + 1, row[:-1] + (target != token))))
        row = np.minimum.accumulate(row - steps) + steps
    return int(row[-1])
