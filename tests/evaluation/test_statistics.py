"""A cell over its seeds: mean, spread and interval, families and alignments."""

from __future__ import annotations

import numpy as np
import pytest

from ptst.evaluation.rates import wilson
from ptst.evaluation.statistics import cell, summary, units
from ptst.evaluation.two_way import margins

NAN = float("nan")


def test_summary():
    """DirectHarm4, CV tested under CL in the paper's table: 1.08 +- 0.12 is (4, 4, 5) of 400."""
    runs = {seed: [1] * n + [0] * (400 - n) for seed, n in ((0, 4), (1, 4), (2, 5))}
    s = summary(cell([str(i) for i in range(400)], runs))
    assert (round(100 * s.mean, 2), round(100 * s.population_sd, 2)) == (1.08, 0.12)
    assert s.sample_sd == pytest.approx(s.population_sd * (3 / 2) ** 0.5)
    assert [str(r) for r in s.runs.values()][2] == "1 % [1, 3] (5/400)"
    assert 0 < s.interval[0] < s.mean < s.interval[1]


def test_summary_of_one_seed_and_of_unjudged_answers():
    s = summary(cell("abcd", {7: [1, 0, NAN, 1]}))
    assert (s.mean, s.sample_sd, s.runs[7].n) == (pytest.approx(2 / 3), None, 3)
    assert s.interval == s.runs[7].interval
    both = summary(cell("abcd", {7: [1, 0, NAN, 1], 8: [1, 0, 0, 0]}))
    assert [r.n for r in both.runs.values()] == [3, 4]
    assert both.mean == pytest.approx((2 / 3 + 1 / 4) / 2)
    apart = summary(cell("ab", {1: [1, NAN], 2: [NAN, 0]}))
    assert (apart.mean, apart.interval) == (0.5, None)


def test_runs_that_all_agree_count_once():
    """Eight runs that refuse all of 100 prompts do not show what 800 independent answers would."""
    s = summary(cell([str(i) for i in range(100)], {seed: np.ones(100) for seed in range(8)}))
    assert s.interval == summary(cell([str(i) for i in range(100)], {0: np.ones(100)})).interval


def test_an_interval_has_the_effective_number_of_answers():
    rng = np.random.default_rng(0)
    x_SP = (rng.random((3, 60)) < 0.3) * 1.0
    found = margins(x_SP)
    n = x_SP.mean() * (1 - x_SP.mean()) / float(found.variance)
    want = wilson(x_SP.mean() * n, n, float(found.half_width(0.05)) / float(found.variance) ** 0.5)
    assert summary(cell([str(i) for i in range(60)], dict(enumerate(x_SP)))).interval == pytest.approx(want)


@pytest.mark.parametrize("seeds", [1, 3])
def test_families_whose_prompts_agree_are_one_answer_each(seeds):
    """20 families of five alike prompts: the interval is that of 20 prompts (with Student's quantile), not of 100."""
    rng = np.random.default_rng(1)
    few_SF = np.repeat((rng.random((1, 20)) < 0.4) * 1.0, seeds, 0)
    few_SF[-1, :2] = 1 - few_SF[-1, :2]
    many = {s: np.repeat(run, 5) for s, run in enumerate(few_SF)}
    prompts, families = [str(i) for i in range(100)], [str(i // 5) for i in range(100)]
    blind, honest = summary(cell(prompts, many)), summary(cell(prompts, many, families))
    few = margins(few_SF)
    n = few_SF.mean() * (1 - few_SF.mean()) / float(few.variance)
    want = wilson(few_SF.mean() * n, n, float(few.half_width(0.05)) / float(few.variance) ** 0.5)
    assert honest.interval == pytest.approx(want)
    assert np.diff(honest.interval) > 1.15 * np.diff(blind.interval)


def test_families_of_unequal_size_keep_the_mean_over_prompts():
    x_SP = np.array([[1.0, 0, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1]])
    table_SF, unit = units(x_SP, ["a", "b", "b", "b", "c", "c"])
    assert (table_SF.shape, unit) == ((2, 3), "family")
    assert table_SF.mean(1) == pytest.approx(x_SP.mean(1))
    constant, _ = units(np.ones((2, 6)), ["a", "b", "b", "b", "c", "c"])
    assert constant == pytest.approx(np.ones((2, 3))), "sizes alone are no spread"
    equal, _ = units(x_SP, list("aabbcc"))
    assert equal == pytest.approx(x_SP.reshape(2, 3, 2).mean(-1))
    assert units(x_SP, list("aaaaaa"))[1] == units(x_SP, None)[1] == "prompt"


def test_the_mean_is_over_alignments():
    runs = {("a", 0): [1, 1, 1, 0], ("b", 0): [0, 0, 1, 0], ("b", 1): [0, 0, 1, 1]}
    of = cell("wxyz", runs)
    assert (of.seeds, of.groups, of.runs) == ((0, 0, 1), ("a", "b", "b"), tuple(runs))
    s = summary(of)
    assert s.mean == pytest.approx((0.75 + (0.25 + 0.5) / 2) / 2)
    assert s.runs["b", 1].successes == 2
    table = margins(of.outcomes_SP, of.groups)
    n = s.mean * (1 - s.mean) / float(table.variance)
    q = float(table.half_width(0.05)) / float(table.variance) ** 0.5
    assert s.interval == pytest.approx(wilson(s.mean * n, n, q))
    alone = summary(cell("wxyz", {("a", 0): [1, 1, 1, 0], ("b", 0): [0, 0, 1, 0]}))
    assert alone.interval == summary(cell("wxyz", {0: [1, 1, 1, 0], 1: [0, 0, 1, 0]})).interval


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cell([], {0: []}), "at least one prompt"),
        (lambda: cell("ab", {}), "at least one seed"),
        (lambda: cell("aa", {0: [1, 0]}), "has a prompt twice"),
        (lambda: cell("ab", {3: [1, 0, 1]}), r"seed 3 has outcomes of shape \(3,\), but there are 2 prompts"),
        (lambda: cell("ab", {("x", 3): [1, 2]}), "seed 3 of x has an outcome that is neither 0, 1 nor NaN"),
        (lambda: cell("ab", {3: [1, float("inf")]}), "neither 0, 1 nor NaN"),
        (lambda: cell("ab", {3: [NAN, NAN]}), "seed 3 has no judged outcome"),
        (lambda: cell("ab", {0: [1, 0]}, ["f"]), "has 1 families of 2 prompts"),
        (lambda: cell("ab", {0: [1, 0], ("x", 1): [1, 0]}), "only some seeds of a cell have an alignment"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.thorough
@pytest.mark.parametrize("level", [-6.0, -2.0, 0.0])
def test_a_cells_interval_covers_the_rate_of_further_seeds_and_prompts(level):
    rng = np.random.default_rng(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    true = float(weights @ (1 / (1 + np.exp(-(level + (1.5**2 + 0.4**2) ** 0.5 * nodes)))) / weights.sum())
    hits = 0
    for _ in range(500):
        z_SP = level + 1.5 * rng.standard_normal(200) + 0.4 * rng.standard_normal((3, 1))
        runs_SP = rng.random(z_SP.shape) < 1 / (1 + np.exp(-z_SP))
        low, high = summary(cell([str(i) for i in range(200)], dict(enumerate(runs_SP)))).interval
        hits += low <= true <= high
    assert hits / 500 >= 0.90
