"""Wilson intervals against figures worked out by hand, and their coverage."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from ptst.evaluation.rates import Rate, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 10, 0.0179, 0.4042), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_coverage():
    rng = random.Random(0)
    p, n, runs = 0.08, 100, 2000
    covers = [low <= p <= high for low, high in (wilson(k, n) for k in range(n + 1))]
    hits = sum(covers[sum(rng.random() < p for _ in range(n))] for _ in range(runs))
    assert 0.93 <= hits / runs <= 0.97


def test_rate():
    assert str(Rate(18, 100)) == "18 % [12, 27] (18/100)"
    assert Rate(1, 4).to_json()["rate"] == 0.25
    with pytest.raises(ValueError, match="5 of 4 is not a rate"):
        wilson(5, 4)


def test_wilson_is_scipys():
    for n in (1, 7, 100):
        for k in range(n + 1):
            want = binomtest(k, n).proportion_ci(method="wilson")
            assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-12)


def test_of_nothing_judged_json_says_null():
    assert Rate(0, 0).to_json()["rate"] is None
