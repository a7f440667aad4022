"""Kappa and alpha against values of the literature, and their intervals."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ptst.evaluation.agreement import alpha, bootstrap, kappa


def ratings(*judges: str) -> list[list[str | None]]:
    """One string per judge, a letter for each answer, a dot where none was given."""
    return [[None if r == "." else r for r in answer] for answer in zip(*judges, strict=True)]


FOUR = ("123321412...", "1233224125.3", ".3332342251.", "123324412" + "51.")


@pytest.mark.parametrize(
    ("judges", "value"),
    [
        # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", examples A, B and C.
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (FOUR, 0.743),
    ],
)
def test_alpha_is_that_of_its_author(judges, value):
    assert alpha(ratings(*judges), range(len(judges[0]))).value == pytest.approx(value, abs=0.0005)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ("y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15, 0.4),  # Cohen's coefficient in any textbook
        ("202201", "002202", 0.4285714),  # scikit-learn's own example of three classes
        ("abcabc", "abcabc", 1.0),
        ("abab", "baba", -1.0),
    ],
)
def test_kappa(first, second, value):
    assert kappa(ratings(first, second), range(len(first))).value == pytest.approx(value)


def test_kappa_agrees_with_scikit_learn_on_any_ratings():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    rng = random.Random(0)
    for _ in range(20):
        pairs = [(rng.choice("abcd"), rng.choice("abcd")) for _ in range(30)]
        assert kappa(pairs, range(30)).value == pytest.approx(metrics.cohen_kappa_score(*zip(*pairs, strict=True)))


def test_answers_that_fewer_than_two_judged_say_nothing():
    with_gaps = ratings("ab.ba..", "abab.b.")
    assert kappa(with_gaps, range(7)) == kappa(ratings("abb", "abb")[:2] + ratings("b", "b"), range(3))
    assert kappa(with_gaps, range(7)).n == alpha(with_gaps, range(7)).n == 3
    assert alpha(ratings(*FOUR), range(12)).n == 11


def test_one_class_alone_is_not_defined():
    for found in (kappa(ratings("aaa", "aaa"), range(3)), alpha(ratings("aaa", "aaa"), range(3))):
        assert (found.value, found.interval, found.n) == (None, None, 3)
        assert "not defined" in str(found)
    assert "no answer" in str(kappa(ratings("a.", ".a"), range(2)))


def test_the_interval_covers_the_coefficient_of_the_whole():
    """Of 200 samples of a population whose kappa is 0.5, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        first = rng.integers(0, 2, 80)
        second = np.where(rng.random(80) < 0.75, first, 1 - first)
        low, high = kappa(list(zip(first.tolist(), second.tolist(), strict=True)), range(80)).interval
        covered += low <= 0.5 <= high
    assert covered >= 180


def test_answers_to_one_request_are_resampled_together():
    pairs = ratings("aabbabab", "aabbbaab")
    alone = kappa(pairs * 5, range(40)).interval
    together = kappa(pairs * 5, [i % 8 for i in range(40)]).interval
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])
    assert kappa(pairs, [0] * 8).interval is None  # a single request says nothing of others
    assert bootstrap(np.ones((1, 4)), lambda sums: sums.sum(-1)) is None


def test_the_interval_does_not_depend_on_the_order_of_the_answers():
    generator = random.Random(1)
    answers = [("R", "C") if generator.random() < 0.3 else (c := generator.choice("RCI"), c) for _ in range(200)]
    requests = [i % 40 for i in range(200)]
    first = kappa(answers, requests)
    for _ in range(5):
        order = generator.sample(range(200), 200)
        assert kappa([answers[i] for i in order], [requests[i] for i in order]).interval == first.interval
