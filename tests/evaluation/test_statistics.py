"""Cells, contrasts and their sentence: against figures by hand, scipy's functions, laws, and simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from benchmarks.contrast_simulation import WORLDS, simulate
from ptst.evaluation.statistics import (
    bootstrap_interval,
    cell,
    holm,
    mcnemar,
    paired_contrast,
    ptst_contrast,
    sign_flip,
    summary,
    two_way_t,
    two_way_variance,
)

NAN = float("nan")
tables = arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(2, 12)), elements=st.sampled_from([-1.0, 0, 1]))


def random_cell(share: float, seeds: int = 3, prompts: int = 40, seed: int = 0):
    rng = np.random.default_rng(seed)
    return cell([f"p{i}" for i in range(prompts)], {s: rng.random(prompts) < share for s in range(seeds)})


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


def test_two_way_variance_is_that_of_a_table_of_sums():
    """Without residual, v is the sum of the margins' variances."""
    seeds_S, prompts_P = np.array([0.0, 1, 5]), np.array([2.0, 3, 7, 8])
    v, df = two_way_variance(seeds_S[:, None] + prompts_P)
    parts = seeds_S.var(ddof=1) / 3, prompts_P.var(ddof=1) / 4
    assert v == pytest.approx(sum(parts))
    assert df == pytest.approx(v**2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3))


def test_two_way_variance_is_the_analysis_of_variance():
    """Sums of squares of a table with a residual, the classical way."""
    x = np.array([[1.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    S, P = x.shape
    seeds, prompts = P * ((x.mean(1) - x.mean()) ** 2).sum(), S * ((x.mean(0) - x.mean()) ** 2).sum()
    residual = ((x - x.mean()) ** 2).sum() - seeds - prompts
    ms = seeds / (S - 1), prompts / (P - 1), residual / ((S - 1) * (P - 1))
    assert residual > 0.1
    v, df = two_way_variance(x)
    assert v == pytest.approx((ms[0] + ms[1] - ms[2]) / (S * P))
    squares = ms[0] ** 2 / (S - 1) + ms[1] ** 2 / (P - 1) + ms[2] ** 2 / ((S - 1) * (P - 1))
    assert df == pytest.approx((ms[0] + ms[1] - ms[2]) ** 2 / squares)


def test_a_residual_alone_is_spread():
    test = two_way_t(np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
    assert (test.effect, test.p) == (0, 1)
    assert test.interval[1] > 0.5


def test_only_seeds_that_vary_make_a_paired_t():
    """Every prompt gives what its seed gives: the two-way t is the paired t over seeds."""
    d_S = np.array([0.0, 1, 1, 1, 0])
    test = two_way_t(np.repeat(d_S[:, None], 50, axis=1))
    want = stats.ttest_1samp(d_S, 0)
    assert (test.p, test.df) == (pytest.approx(want.pvalue), pytest.approx(4))
    assert test.interval == pytest.approx(tuple(want.confidence_interval()))
    alone = two_way_t(d_S[:, None])
    assert (alone.p, alone.df) == (pytest.approx(want.pvalue), 4)


def test_only_prompts_that_vary_make_a_t_over_prompts():
    d_P = np.array([0.0, 1, 1, 0, -1, 1, 1])
    test = two_way_t(np.repeat(d_P[None], 4, axis=0))
    assert test.p == pytest.approx(stats.ttest_1samp(d_P, 0).pvalue)


@given(tables)
@settings(deadline=None)
def test_laws(d_SP):
    """Order does not matter, exchanging the cells turns the sign, interval and p agree, and all is finite."""
    test = two_way_t(d_SP)
    shuffled = two_way_t(d_SP[::-1, ::-1])
    turned = two_way_t(-d_SP)
    assert shuffled.p == pytest.approx(test.p)
    assert (turned.effect, turned.p) == (pytest.approx(-test.effect), pytest.approx(test.p))
    assert 0 <= test.p <= 1
    if test.interval is None:
        assert np.ptp(d_SP) == 0
        assert test.p == (1.0 if not d_SP.any() else 2.0 ** (1 - len(d_SP)))
        return
    low, high = test.interval
    assert low <= test.effect <= high
    if abs(test.p - 0.05) > 1e-9:
        assert (test.p < 0.05) == (low > 0 or high < 0)
    variance, _ = two_way_variance(d_SP)
    assert variance >= d_SP.mean(1).var(ddof=1) / len(d_SP) - 1e-12
    low, high = bootstrap_interval(d_SP, resamples=50)
    assert d_SP.min() - 1e-9 <= low <= high <= d_SP.max() + 1e-9


def test_sign_flips_and_their_floor():
    assert [sign_flip([0.3] * n) for n in (3, 5, 8)] == [0.25, 0.0625, 0.0078125]
    assert sign_flip([0.0, 0, 0]) == 1
    d = np.array([0.2, -0.1, 0.4, 0.3, 0.05])
    want = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(d) == pytest.approx(want)
    with pytest.raises(ValueError, match="there are 21 seeds; exact sign flips are for 1 to 20"):
        sign_flip([1.0] * 21)


def test_mcnemar():
    first, second = [1] * 9 + [0] * 2 + [1] * 30, [0] * 9 + [1] * 2 + [1] * 30
    assert mcnemar(first, second) == pytest.approx(0.06543, abs=1e-5)  # 2 P(X <= 2), X of 11 at one half
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1
    assert mcnemar([1, NAN, 1], [0, 1, 0]) == 0.5


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="p of b is nan"):
        holm({"a": 0.1, "b": NAN})


def test_the_bootstrap_draws_seeds_and_prompts_anew():
    rng = np.random.default_rng(1)
    table = rng.standard_normal((8, 1)) + rng.standard_normal((1, 100))
    both, seeds, prompts = (
        np.diff(bootstrap_interval(t))[0]
        for t in (table, np.tile(table.mean(1)[:, None], 100), np.tile(table.mean(0), (8, 1)))
    )
    assert both == pytest.approx((seeds**2 + prompts**2) ** 0.5, rel=0.1)
    assert min(seeds, prompts) > 0.1
    assert bootstrap_interval(table) == bootstrap_interval(table)


def test_a_contrast_and_its_sentence():
    both, only = random_cell(0.4, seeds=5), random_cell(0.9, seeds=5, seed=1)
    c, sentence = ptst_contrast(both, only, "the share of harmful requests refused", ("CL->CL", "CV->CL"))
    assert (c.seeds, c.prompts, c.left_out, c.mcnemar) == (5, 40, 0, None)
    assert c.effect == pytest.approx(c.test.effect)
    assert c.effect < -0.3
    assert c.test.p < 0.01
    assert c.p_flips == 0.0625
    assert c.p_seeds == pytest.approx(
        stats.ttest_rel(np.nanmean(both.outcomes_SP, 1), np.nanmean(only.outcomes_SP, 1)).pvalue
    )
    assert c.bootstrap[0] < c.effect < c.bootstrap[1]
    assert sentence == (
        f"With the safety prompt in training and test (CL->CL), the share of harmful requests refused is "
        f"{100 * c.first:.1f} %, with it in the test only (CV->CL) {100 * c.second:.1f} %: a difference of "
        f"{100 * c.effect:.1f} points (95 % interval {100 * c.test.interval[0]:.1f} to {100 * c.test.interval[1]:.1f}; "
        f"p = {c.test.p:.2g}; 5 seeds, 40 prompts)."
    )


def test_families_of_prompts_are_tested_beside_prompts():
    families = "ccaabb"
    first = cell("uvwxyz", {1: [1, NAN, 1, 0, 1, 1], 2: [1, 1, 1, 1, 0, 1], 3: [1, 1, 0, 1, 1, 1]}, families)
    second = cell("uvwxyz", {1: [0, 0, 0, 0, 1, 0], 2: [0, 0, 1, 0, 1, 0], 3: [0, 1, 0, 0, 0, 0]}, families)
    c, sentence = ptst_contrast(first, second, "the refusal rate", ("CL->CL", "CV->CL"))
    by_hand = two_way_t(np.array([[0.5, 0.5, 1], [0.5, 0, 1], [0.5, 1, 1]]))  # a, b, c; prompt v is left out
    assert (c.prompts, c.families) == (5, by_hand)
    assert (
        f"With families of prompts in place of prompts: {100 * by_hand.effect:+.1f} points (95 % interval" in sentence
    )
    alike = cell("ab", {1: [1, 0], 2: [1, 1]}, "ff")
    assert paired_contrast(alike, alike).families is None


def test_a_single_seed_says_so():
    both, only = random_cell(0.4, seeds=1), random_cell(0.9, seeds=1, seed=1)
    c, sentence = ptst_contrast(both, only, "the refusal rate", ("CL->CL", "CV->CL"))
    assert (c.test, c.bootstrap, c.p_seeds, c.families, c.p_flips) == (None,) * 5
    assert c.mcnemar == mcnemar(both.outcomes_SP[0], only.outcomes_SP[0])
    assert "within one seed, so nothing can be said about further seeds (exact McNemar test" in sentence


def test_no_spread_at_all_is_no_certainty():
    prompts = [str(i) for i in range(30)]
    all_, none = (cell(prompts, {s: np.full(30, v) for s in range(3)}) for v in (1, 0))
    c, sentence = ptst_contrast(none, all_, "the refusal rate", ("CL->CL", "CV->CL"))
    assert (c.test.p, c.test.interval, c.p_seeds) == (0.25, None, None)
    assert "there is no interval; p = 0.25" in sentence
    assert paired_contrast(all_, all_).test.p == 1


def test_prompts_unjudged_anywhere_are_left_out_and_counted():
    first = cell("abcd", {1: [1, 0, 1, NAN], 2: [1, 1, 1, 0]})
    second = cell("abcd", {1: [0, 0, 1, 1], 2: [NAN, 0, 1, 0]})
    c, sentence = ptst_contrast(first, second, "the refusal rate", ("CL->CL", "CV->CL"))
    assert (c.prompts, c.left_out, c.first, c.second) == (2, 2, 0.75, 0.5)
    assert "2 prompts, 2 left out as unjudged" in sentence


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cell([], {0: []}), "at least one prompt"),
        (lambda: cell("ab", {}), "at least one seed"),
        (lambda: cell("aa", {0: [1, 0]}), "has a prompt twice"),
        (lambda: cell("ab", {3: [1, 0, 1]}), r"seed 3 has outcomes of shape \(3,\), but there are 2 prompts"),
        (lambda: cell("ab", {3: [1, 2]}), "neither 0, 1 nor NaN"),
        (lambda: cell("ab", {3: [1, float("inf")]}), "neither 0, 1 nor NaN"),
        (lambda: cell("ab", {3: [NAN, NAN]}), "seed 3 has no judged outcome"),
        (lambda: paired_contrast(cell("ab", {0: [1, 0]}), cell("ac", {0: [1, 0]})), "different ones"),
        (lambda: paired_contrast(cell("ab", {0: [1, 0]}), cell("ba", {0: [1, 0]})), "in another order"),
        (lambda: paired_contrast(cell("ab", {0: [1, 0]}), cell("ab", {1: [1, 0]})), r"seeds \(0,\) and \(1,\)"),
        (lambda: paired_contrast(cell("ab", {0: [1, NAN]}), cell("ab", {0: [NAN, 0]})), "no prompt was judged"),
        (lambda: two_way_t(np.zeros((1, 9))), "at least 2 seeds and 1 prompt; there are 1 and 9"),
        (lambda: two_way_t(np.array([[1, NAN], [0, 0]])), "not a number"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.thorough
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_simulated_experiments(world, seeds):
    """The two-way t rejects what is not there in about 5 % of experiments, and its interval covers what is."""
    null = simulate(WORLDS[world], seeds, 200, 0.0, runs=400, resamples=0)
    assert null["reject two-way t"] <= 0.10
    real = simulate(WORLDS[world], seeds, 200, 1.2, runs=400, resamples=200)
    assert real["cover two-way t"] >= 0.89
    assert real["reject two-way t"] >= (0.15 if seeds == 3 else 0.35)


@pytest.mark.thorough
def test_why_the_others_are_not_the_first():
    """The same bounds catch a paired t that takes the prompts for all there are, and a bootstrap over three seeds."""
    assert simulate(WORLDS["prompts vary"], 8, 200, 0.0, runs=400, resamples=0)["reject paired t"] > 0.12
    assert simulate(WORLDS["seeds vary"], 3, 200, 1.2, runs=1000, resamples=200)["cover bootstrap"] < 0.90


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
