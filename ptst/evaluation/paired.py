"""Two cells compared, paired by run and prompt; a cell compared with the aligned model; the named contrast of PTST.

The primary test is the two-way t over runs and units (evaluation/two_way.py). Units are families where prompts come in
families, else prompts. Where runs are seeds of several aligned models, the primary test is about further seeds of
these alignments; two or three of them carry no more than a wide interval for further ones, which is given beside it.

    S: seeds (runs), P: prompts, U: units, G: alignments
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ptst.errors import UserError
from ptst.evaluation.secondary import MOST_FLIPPED, bootstrap_interval, holm, mcnemar, sign_flip
from ptst.evaluation.statistics import DECODING, SEED, Cell, units
from ptst.evaluation.two_way import SHARES, Interval, TwoWayT, p_text, two_way_t

Verdict = Literal["kept", "lost", "undecided"]


@dataclass(frozen=True)
class Contrast:
    """`first` minus `second`, as shares (means over alignments, where there are several)."""

    first: float
    second: float
    seeds: int
    """Number of runs of each cell."""
    prompts: int
    left_out: int
    """Number of prompts that were unjudged in some run of either cell."""
    unit: str
    """What is a sample besides the runs: "family" or "prompt"."""
    units: int
    test: TwoWayT
    """The primary test. Its claim is about further runs and units; with a single run, about further units alone."""
    over_prompts: TwoWayT | None = None
    """The test with prompts as units, where families are: too certain about anything but further prompts of these."""
    alignments: int = 1
    over_alignments: TwoWayT | None = None
    """Means of alignments in place of runs: about further alignments. None for a single one."""
    bootstrap: Interval | None = None
    """95 % percentile interval over seeds and prompts, for comparison: too narrow below 8 seeds."""
    p_seeds: float | None = None
    """Paired t over seeds, for these prompts only; None also where the seeds do not differ."""
    p_flips: float | None = None
    """Exact sign flips over seeds; None above 20 seeds."""
    mcnemar: float | None = None
    """Exact, for a single seed."""
    sample: str = SEED
    """What the runs are: of seeds, or decodings of one training."""

    @property
    def effect(self) -> float:
        return self.first - self.second

    @property
    def claim(self) -> str:
        """What the primary test is about."""
        units = _plural(self.unit)
        if self.alignments == 1:
            if self.sample == DECODING:
                return f"further decodings and {units}, for these runs"
            return f"further seeds and {units}" if self.seeds > 1 else f"further {units}, for this run"
        if self.test is self.over_alignments:
            return f"further alignments and {units}"
        return f"further seeds of these {self.alignments} alignments and further {units}"

    @property
    def sizes(self) -> str:
        """How much was compared: `3 seeds, 40 families of 200 prompts`."""
        families = f"{self.units} families of " if self.unit == "family" else ""
        of = f" of {self.alignments} alignments" if self.alignments > 1 else ""
        left_out = f", {self.left_out} left out as unjudged" if self.left_out else ""
        runs = f"{self.seeds} {self.sample}{'' if self.seeds == 1 else 's'}"
        return f"{runs}{of}, {families}{self.prompts} prompts{left_out}"


def paired_contrast(first: Cell, second: Cell) -> Contrast:
    """Compare two cells of the same runs. Raises UserError for different prompts or runs, and if no prompt was judged
    in every run."""
    if first.runs != second.runs:
        raise UserError(f"the cells have seeds {first.runs} and {second.runs}", "pairs need the same, in one order")
    return _compare(first, second, second.outcomes_SP, paired=True)


def against_aligned(tuned: Cell, aligned: Cell) -> Contrast:
    """Compare a cell with the aligned model that its runs were trained from: one run, or one for each alignment. It is
    taken as it is: the claim is about further runs of the other cell. Raises UserError as `paired_contrast` and
    `aligned_of`."""
    return _compare(tuned, aligned, aligned_of(tuned, aligned), paired=False)


def aligned_of(tuned: Cell, aligned: Cell) -> NDArray[np.float64]:
    """The outcomes of the aligned model from which each run of `tuned` was trained, (S, P). Raises UserError for an
    alignment that has no aligned model or several."""
    rows = list(aligned.groups or [""] * len(aligned.seeds))
    names = tuned.groups or ("",) * len(tuned.seeds)
    if twice := next((name for name in rows if rows.count(name) > 1), None):
        raise UserError(f"the aligned model {twice} has several runs", "it needs one for each alignment")
    if not aligned.groups and len(rows) > 1:
        raise UserError(f"the aligned model has {len(rows)} runs", "it needs one, or one for each alignment")
    if missing := [name for name in names if name not in rows]:
        raise UserError(f"there is no aligned model of {missing[0] or 'these runs'}", f"there are: {', '.join(rows)}")
    return aligned.outcomes_SP[[rows.index(name) for name in names]]


def _compare(first: Cell, second: Cell, second_SP: NDArray[np.float64], paired: bool) -> Contrast:
    if first.prompts != second.prompts:
        how = "in another order" if set(first.prompts) == set(second.prompts) else "different ones"
        raise UserError(f"the cells have prompts that do not match ({how})", "test both on the same")
    judged = np.flatnonzero(np.isfinite(first.outcomes_SP + second_SP).all(axis=0))
    if not judged.size:
        raise UserError("no prompt was judged in every run of both cells")
    a_SP, b_SP = first.outcomes_SP[:, judged], second_SP[:, judged]
    d_SP = a_SP - b_SP
    families = [first.families[i] for i in judged] if first.families else None
    groups = first.groups if first.groups and len(set(first.groups)) > 1 else None
    d_SU, unit = units(d_SP, families)
    seeds, prompts = d_SP.shape
    of_groups = two_way_t(_by_group(d_SU, groups), None, SHARES, paired) if groups else None
    compared = partial(
        Contrast,
        first=_mean_of(a_SP, groups),
        second=_mean_of(b_SP, groups),
        seeds=seeds,
        prompts=prompts,
        left_out=len(first.prompts) - prompts,
        unit=unit,
        units=d_SU.shape[1],
        alignments=len(set(groups)) if groups else 1,
        over_alignments=of_groups,
        sample=first.sample,
    )
    if of_groups and len(set(groups or ())) == seeds:
        return compared(test=of_groups)
    if seeds == 1 and prompts == 1:
        raise UserError("a single prompt of a single seed has no spread", "test more prompts, or more seeds")
    return compared(
        test=two_way_t(d_SU, groups, SHARES, paired),
        over_prompts=two_way_t(d_SP, groups, SHARES, paired) if unit == "family" else None,
        **(_secondary(d_SP) if seeds > 1 and not groups else {}),
        mcnemar=mcnemar(a_SP[0], b_SP[0]) if seeds == 1 else None,
    )


def _mean_of(x_SP: NDArray[np.float64], groups: Sequence[str] | None) -> float:
    return float((_by_group(x_SP, groups) if groups else x_SP).mean())


def _by_group(x_SU: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """Means over the runs of each alignment (G, U)."""
    names, group_S = np.unique(groups, return_inverse=True)
    return np.stack([x_SU[group_S == g].mean(0) for g in range(len(names))])


def _secondary(d_SP: NDArray[np.float64]) -> dict[str, Any]:
    d_S = d_SP.mean(1)
    return {
        "bootstrap": bootstrap_interval(d_SP),
        "p_seeds": float(stats.ttest_1samp(d_S, 0).pvalue) if np.ptp(d_S) > 1e-12 else None,
        "p_flips": sign_flip(d_S) if len(d_S) <= MOST_FLIPPED else None,
    }


def verdict(interval: Interval | None, margin: float, higher_is_better: bool) -> Verdict:
    """What the interval of a difference from the aligned model says: "kept" where it excludes a loss of `margin` or
    more (non-inferiority, the side of two one-sided tests, Schuirmann 1987, on which a loss lies), "lost" where it is
    not kept and the interval excludes that nothing was lost, else "undecided"."""
    if interval is None:
        return "undecided"
    least, most = (-interval[1], -interval[0]) if higher_is_better else interval  # of the loss
    if most < margin:
        return "kept"
    return "lost" if least > 0 else "undecided"


def adjusted(contrasts: Mapping[str, Contrast]) -> dict[str, tuple[float, bool]]:
    """p after Holm, by name, and whether it is only a bound, that of the design or the consequence of another's. Of a
    single seed, p is McNemar's."""
    p = {name: c.test.p if c.mcnemar is None else c.mcnemar for name, c in contrasts.items()}
    after = holm(p)
    bounds = {after[name] for name, c in contrasts.items() if c.mcnemar is None and c.test.bounded}
    return {name: (value, value in bounds and value < 1) for name, value in after.items()}


def ptst_contrast(
    trained_and_tested: Cell, tested_only: Cell, measure: str, names: tuple[str, str]
) -> tuple[Contrast, str]:
    """The named contrast and its sentence: the safety prompt in training and test, minus in the test only. `measure`:
    a noun with its article; `names`: of the two cells. Raises UserError as `paired_contrast`."""
    c = paired_contrast(trained_and_tested, tested_only)
    head = (
        f"With the safety prompt in training and test ({names[0]}), {measure} is {100 * c.first:.1f} %, with it in the "
        f"test only ({names[1]}) {100 * c.second:.1f} %: a difference of {_points(c.effect)} points "
    )
    if c.mcnemar is not None:
        return c, head + (
            f"({interval_text(c.test)} for further {_plural(c.unit)} of these two runs; {c.sizes}); within one seed "
            f"nothing can be said about further seeds (exact McNemar test between these two runs: p = {c.mcnemar:.2g})."
        )
    return c, head + f"({told(c)}).{besides(c)}"


def told(c: Contrast) -> str:
    """The primary test in words: interval, p, what it is about, how much was compared."""
    return f"{interval_text(c.test)}; {p_text(c.test.p, c.test.bounded)}, for {c.claim}; {c.sizes}"


def besides(c: Contrast) -> str:
    """What is reported next to the primary test ("" or sentences)."""
    tests = {}
    if c.over_alignments is not None and c.over_alignments is not c.test:
        tests["further alignments"] = c.over_alignments
    if c.over_prompts is not None:
        tests["further prompts of these families alone"] = c.over_prompts
    return "".join(
        f" For {what}: {_points(test.effect)} points ({interval_text(test)}; {p_text(test.p, test.bounded)})."
        for what, test in tests.items()
    )


def interval_text(test: TwoWayT) -> str:
    if test.interval is None:
        return "the same in every run and prompt, so there is no interval"
    return f"95 % interval {_points(test.interval[0])} to {_points(test.interval[1])}"


def _plural(unit: str) -> str:
    return {"family": "families", "prompt": "prompts"}[unit]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
