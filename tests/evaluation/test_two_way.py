"""The two-way t: against figures by hand, scipy's functions, laws, and simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from benchmarks.contrast_simulation import NESTED, WORLDS, WORST, Design, at_bound, simulate
from ptst.evaluation.two_way import SHARES, least_p, margins, p_text, two_way_t

NAN = float("nan")
tables = arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(2, 12)), elements=st.sampled_from([-1.0, 0, 1]))


def test_the_variance_is_that_of_a_table_of_sums():
    """Without residual, v is the sum of the margins' variances, each with its own degrees of freedom."""
    seeds_S, prompts_P = np.array([0.0, 1, 5]), np.array([2.0, 3, 7, 8])
    found = margins(seeds_S[:, None] + prompts_P)
    parts = seeds_S.var(ddof=1) / 3, prompts_P.var(ddof=1) / 4
    assert found.variance == pytest.approx(sum(parts))
    assert found.df == (2, 3)
    squares = stats.t.ppf(0.995, 2) ** 2 * parts[0] + stats.t.ppf(0.995, 3) ** 2 * parts[1]
    assert found.half_width(0.01) == pytest.approx(squares**0.5)


def test_the_variance_is_the_analysis_of_variance():
    """Sums of squares of a table with a residual, the classical way."""
    x = np.array([[1.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    S, P = x.shape
    seeds, prompts = P * ((x.mean(1) - x.mean()) ** 2).sum(), S * ((x.mean(0) - x.mean()) ** 2).sum()
    residual = ((x - x.mean()) ** 2).sum() - seeds - prompts
    ms = seeds / (S - 1) / (S * P), prompts / (P - 1) / (S * P), residual / ((S - 1) * (P - 1)) / (S * P)
    assert min(*ms[:2], ms[0] + ms[1]) > ms[2] > 0.001
    found = margins(x)
    assert (found.runs, found.units, found.residual) == pytest.approx(ms)
    assert found.variance == pytest.approx(ms[0] + ms[1] - ms[2])


def test_the_residual_is_taken_out_of_the_margin_with_more_degrees_of_freedom():
    x_SU = np.random.default_rng(3).standard_normal((3, 9)) + np.arange(9)
    for x, few, many in ((margins(x_SU), "runs", "units"), (margins(x_SU.T), "units", "runs")):
        q = stats.t.ppf(0.975, [2, 8, 16]) ** 2
        first = max(q[0] * getattr(x, few), q[2] * x.residual)
        assert x.half_width(0.05) ** 2 == pytest.approx(first + q[1] * (getattr(x, many) - x.residual))


def test_runs_within_alignments():
    """Two alignments of two and three runs: the mean is over alignments, the spread of runs is pooled within them."""
    rng = np.random.default_rng(5)
    x_SU = rng.standard_normal((5, 7)) + np.array([0, 4, 0, 4, 4])[:, None]
    first, second = x_SU[[0, 2]], x_SU[[1, 3, 4]]
    found = margins(x_SU, ["a", "b", "a", "b", "b"])
    assert found.effect == pytest.approx((first.mean() + second.mean()) / 2)
    assert found.df == (3, 6)
    pooled = (first.mean(1).var(ddof=1) * 1 + second.mean(1).var(ddof=1) * 2) / 3
    assert found.runs == pytest.approx(pooled * (1 / 2 + 1 / 3) / 4)
    assert found.units == pytest.approx(((first.mean(0) + second.mean(0)) / 2).var(ddof=1) / 7)
    squares = sum(((part - part.mean(1)[:, None] - part.mean(0) + part.mean()) ** 2).sum() for part in (first, second))
    assert found.residual == pytest.approx(squares / (3 * 6) * (1 / 2 + 1 / 3) / 4 / 7)


def test_many_tables_at_once_are_each_alone():
    x_BSU = np.random.default_rng(0).standard_normal((4, 6, 5))
    for groups in (None, list("aabbbb")):
        together, alone = margins(x_BSU, groups), [margins(x, groups) for x in x_BSU]
        np.testing.assert_allclose(together.half_width(0.01), [m.half_width(0.01) for m in alone])
        np.testing.assert_allclose(together.effect, [m.effect for m in alone])


def test_a_residual_alone_is_spread():
    test = two_way_t(np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
    assert (test.effect, test.p) == (0, 1)
    assert test.interval[1] > 0.5


def test_only_seeds_that_vary_make_a_paired_t():
    """Every prompt gives what its seed gives: the two-way t is the paired t over seeds."""
    d_S = np.array([0.0, 1, 1, 1, 0])
    test = two_way_t(np.repeat(d_S[:, None], 50, axis=1))
    want = stats.ttest_1samp(d_S, 0)
    assert test.p == pytest.approx(want.pvalue)
    assert test.interval == pytest.approx(tuple(want.confidence_interval()))
    alone = two_way_t(d_S[:, None])
    assert (alone.p, alone.df) == (pytest.approx(want.pvalue), (4, 0))


def test_only_prompts_that_vary_make_a_t_over_prompts():
    d_P = np.array([0.0, 1, 1, 0, -1, 1, 1])
    want = stats.ttest_1samp(d_P, 0)
    for runs in (1, 4):
        test = two_way_t(np.repeat(d_P[None], runs, axis=0))
        assert (test.p, test.interval) == (pytest.approx(want.pvalue), pytest.approx(tuple(want.confidence_interval())))


@given(tables)
@settings(deadline=None)
def test_laws(d_SP):
    """Order does not matter, exchanging the cells turns the sign, interval and p agree, and all is within bounds."""
    test = two_way_t(d_SP, within=SHARES)
    shuffled, turned = two_way_t(d_SP[::-1, ::-1], within=SHARES), two_way_t(-d_SP, within=SHARES)
    assert shuffled.p == pytest.approx(test.p)
    assert (turned.effect, turned.p) == (pytest.approx(-test.effect), pytest.approx(test.p))
    assert least_p(len(d_SP)) <= test.p <= 1
    low, high = test.interval
    assert -1 <= low <= test.effect + 1e-12
    assert test.effect - 1e-12 <= high <= 1
    if np.ptp(d_SP) and len(d_SP) > 2 and abs(test.p - 0.05) > 1e-9:
        assert (test.p < 0.05) == (low > 0 or high < 0)
    found = margins(d_SP)
    fewest = stats.t.ppf(0.975, min(found.df)) * np.sqrt(np.maximum(found.variance, 0))
    assert found.half_width(0.05) <= fewest + 1e-9, "never wider than with min(S, U) - 1 degrees of freedom"


def test_an_interval_ends_where_the_measure_does():
    d_SU = np.array([[1.0, 0.5, 0], [-1, -0.5, 0]])
    assert two_way_t(d_SU).interval[0] < -1
    assert two_way_t(d_SU, within=SHARES).interval == (-1, 1)


def test_what_does_not_vary():
    """No number of runs that agree shows more than their prompts; p is the smallest of the design."""
    for value, interval in ((0.0, (-0.0876, 0.0876)), (1.0, (0.8247, 1.0)), (-1.0, (-1.0, -0.8247))):
        d_SU = np.full((3, 40), value)
        test = two_way_t(d_SU, within=SHARES)
        assert test.interval == pytest.approx(interval, abs=1e-4)
        assert (test.p, test.bounded) == ((2 / 4**3, True) if value else (1, False))
        assert two_way_t(d_SU).interval is None


def test_the_smallest_p():
    assert [least_p(n) for n in (2, 3, 4, 5, 6, 20)] == [0.05, 2 / 64, 2 / 256, 2 / 1024, 0.001, 0.001]
    assert [least_p(n, paired=False) for n in (3, 5, 6, 8, 11)] == [0.05, 0.05, 1 / 32, 1 / 128, 0.001]
    clear = 1 + 0.01 * np.random.default_rng(0).standard_normal((3, 40))
    assert (two_way_t(clear).p, two_way_t(clear).bounded) == (2 / 64, True)
    assert two_way_t(clear, paired=False).p == 0.05
    assert two_way_t(np.vstack([clear, clear, clear])).p == 0.001


def test_p_in_words():
    assert p_text(0.01234) == "p = 0.012"
    assert [p_text(p, True) for p in (0.03125, 0.001, 0.05, 2 / 1024)] == [
        "p < 0.032",
        "p < 0.001",
        "p < 0.05",
        "p < 0.002",
    ]


@pytest.mark.parametrize(
    ("table", "groups", "message"),
    [
        (np.zeros((1, 1)), None, "1 runs in 1 groups and 1 units has no spread"),
        (np.zeros((2, 5)), ["a", "b"], "2 runs in 2 groups and 5 units"),
        (np.array([[1, NAN], [0, 0]]), None, "not a number; leave out the prompts"),
    ],
)
def test_mistakes(table, groups, message):
    with pytest.raises(ValueError, match=message):
        two_way_t(table, groups)


@pytest.mark.parametrize("family", [1, 5])
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_level_holds_where_both_vary(seeds, family):
    """The hardest of the worlds; the bounds reject Satterthwaite's degrees of freedom."""
    found = simulate(WORLDS["both vary"], Design(seeds, 100, family), runs=2000)
    # Nominal plus four standard errors of a share of 2,000.
    bounds = {level: level + 4 * (level * (1 - level) / 2000) ** 0.5 for level in (0.05, 0.01, 0.001)}
    assert all(found["two-way t"][level] <= bound for level, bound in bounds.items())
    if (seeds, family) == (3, 1):
        assert found["Satterthwaite"][0.001] > bounds[0.001]


@pytest.mark.thorough
@pytest.mark.parametrize("family", [1, 5])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_simulated_experiments(world, seeds, family):
    """It rejects what is not there no more often than its level says, in the tail, too, and its interval covers."""
    null = simulate(WORLDS[world], Design(seeds, 200, family), runs=5000)["two-way t"]
    assert all(null[level] <= level + 4 * (level / 5000) ** 0.5 for level in (0.05, 0.01, 0.001))
    real = simulate(WORLDS[world], Design(seeds, 200, family), runs=1000, delta=1.2)["two-way t"]
    assert real[0] >= 0.93
    assert real[0.05] >= (0.12 if seeds == 3 else 0.35)


@pytest.mark.thorough
def test_why_the_others_are_not_the_first():
    """The same bounds catch Satterthwaite's degrees of freedom in the tail, families taken for independent prompts, a
    paired t that takes the prompts for all there are, and a bootstrap over three seeds."""
    families = Design(8, 200, 5)
    assert simulate(WORLDS["both vary"], Design(3), runs=5000)["Satterthwaite"][0.001] > 0.005
    assert simulate(WORLDS["prompts vary"], families, runs=2000, over="prompts")["two-way t"][0.05] > 0.08
    assert simulate(WORLDS["prompts vary"], families, runs=2000)["paired t"][0.05] > 0.12
    assert simulate(WORLDS["seeds vary"], Design(3), runs=500, delta=1.2, resamples=200)["bootstrap"][0] < 0.91


@pytest.mark.thorough
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("alignments", [2, 3])
def test_seeds_within_alignments(alignments, seeds):
    """Both claims keep their level; the one about these alignments does not carry one about further alignments."""
    world, design = NESTED["alignments vary"], Design(seeds, 200, 5, alignments)
    these = simulate(world, design, runs=4000)["two-way t"]
    assert these[0.05] <= 0.064
    assert these[0.001] <= 0.003
    further = Design(seeds, 200, 5, alignments, fixed=False)
    assert simulate(world, further, runs=4000, over="alignments")["two-way t"][0.05] <= 0.064
    assert simulate(world, further, runs=2000)["two-way t"][0.05] > 0.08


@pytest.mark.thorough
@pytest.mark.parametrize("world", WORST)
@pytest.mark.parametrize("seeds", [3, 4, 5])
def test_no_smaller_p_than_runs_that_collapse_allow(world, seeds):
    least, reached = at_bound(WORST[world], Design(seeds, 200, 5), runs=5000)
    assert reached <= least + 4 * (least / 5000) ** 0.5
