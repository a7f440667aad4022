"""Sign flips, McNemar's test, the bootstrap and Holm's adjustment."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ptst.evaluation.secondary import bootstrap_interval, holm, mcnemar, sign_flip

NAN = float("nan")


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
