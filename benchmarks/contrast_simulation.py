"""Tests and intervals for a contrast of two cells with 3 to 8 seeds: type-I error, power and coverage on simulated
experiments. docs/statistics.md has the table.

    python benchmarks/contrast_simulation.py [--runs 1000] [--prompts 200]

An answer to prompt p in the run of seed s in cell c succeeds with probability logistic(z),

    z = level + 1.5 a_p + 0.5 u_s + prompt_sd b_pc + seed_sd e_sc + delta c,     all of a, u, b standard normal,

where u is shared by paired runs. e is standard normal; where runs "collapse" it is 2 for one run in five and -0.5 for
the others. Without delta both cells have the same distribution, with new seeds and prompts in each experiment: a test
about further seeds and prompts may reject in 5 % of them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from ptst.evaluation.statistics import bootstrap_interval, sign_flip, two_way_t

SEEDS = (3, 5, 8)


@dataclass(frozen=True)
class World:
    """How outcomes vary (module docstring)."""

    seed_sd: float
    prompt_sd: float
    level: float = 0.0
    collapse: bool = False

    def probabilities_SP(
        self, rng: np.random.Generator, seeds: int, prompts: int, delta: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        common_SP = self.level + 1.5 * rng.standard_normal(prompts) + 0.5 * rng.standard_normal((seeds, 1))

        def cell(shift: float) -> NDArray[np.float64]:
            e_S1 = rng.standard_normal((seeds, 1))
            if self.collapse:
                e_S1 = np.where(rng.random((seeds, 1)) < 0.2, 2.0, -0.5)
            b_P = rng.standard_normal(prompts)
            return special.expit(common_SP + self.prompt_sd * b_P + self.seed_sd * e_S1 + shift)

        return cell(0.0), cell(delta)

    def differences_SP(self, rng: np.random.Generator, seeds: int, prompts: int, delta: float) -> NDArray[np.float64]:
        """Outcomes of the first cell minus those of the second, in one experiment."""
        first, second = (rng.random(p.shape) < p for p in self.probabilities_SP(rng, seeds, prompts, delta))
        return first.astype(float) - second

    def true_effect(self, delta: float) -> float:
        """Expectation over seeds and prompts: the logistic of a normal z, by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        variance = 1.5**2 + 0.5**2 + self.prompt_sd**2 + (0.0 if self.collapse else self.seed_sd**2)
        z = self.level + variance**0.5 * nodes
        shifts = {2.0 * self.seed_sd: 0.2, -0.5 * self.seed_sd: 0.8} if self.collapse else {0.0: 1.0}
        gaps = {s: special.expit(z + s) - special.expit(z + s + delta) for s in shifts}
        return float(sum(share * (weights @ gaps[s]) for s, share in shifts.items()) / weights.sum())


WORLDS = {
    "seeds vary": World(seed_sd=0.5, prompt_sd=0.0),
    "prompts vary": World(seed_sd=0.0, prompt_sd=1.0),
    "both vary": World(seed_sd=0.5, prompt_sd=1.0),
    "neither": World(seed_sd=0.0, prompt_sd=0.0),
    "rare successes": World(seed_sd=0.5, prompt_sd=1.0, level=-4.0),
    "runs collapse": World(seed_sd=0.8, prompt_sd=0.5, collapse=True),
}


def experiment(differences_SP: NDArray[np.float64], resamples: int) -> tuple[dict[str, float], dict[str, tuple]]:
    """p-values and intervals by test."""
    d_S = differences_SP.mean(1)
    test = two_way_t(differences_SP)
    spread = np.ptp(d_S) > 1e-12
    paired = stats.ttest_1samp(d_S, 0) if spread else None
    p_values = {"two-way t": test.p, "paired t": float(paired.pvalue) if paired else 1.0, "flips": sign_flip(d_S)}
    intervals = {"two-way t": test.interval or (test.effect, test.effect)}
    intervals["paired t"] = tuple(paired.confidence_interval()) if paired else (test.effect, test.effect)
    if resamples:
        intervals["bootstrap"] = bootstrap_interval(differences_SP, resamples)
    return p_values, intervals


def simulate(world: World, seeds: int, prompts: int, delta: float, runs: int, resamples: int) -> dict[str, float]:
    """Shares of `runs` experiments: "reject NAME" at 5 %, "cover NAME" of the 95 % intervals."""
    rng, true = np.random.default_rng(seeds), world.true_effect(delta)
    counts: dict[str, int] = {}
    for _ in range(runs):
        p_values, intervals = experiment(world.differences_SP(rng, seeds, prompts, delta), resamples)
        for name, p in p_values.items():
            counts[f"reject {name}"] = counts.get(f"reject {name}", 0) + (p <= 0.05)
        for name, (low, high) in intervals.items():
            counts[f"cover {name}"] = counts.get(f"cover {name}", 0) + (low <= true <= high)
    return {name: count / runs for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--delta", type=float, default=1.2, help="effect in logits, for power")
    parser.add_argument("--resamples", type=int, default=500)
    flags = parser.parse_args()
    print("| outcomes | seeds | type-I: two-way t | paired t | flips | power: two-way t | paired t | flips ", end="")
    print("| coverage: two-way t | paired t | bootstrap |\n|" + "---|" * 11)
    for name, world in WORLDS.items():
        for seeds in SEEDS:
            null = simulate(world, seeds, flags.prompts, 0.0, flags.runs, 0)
            real = simulate(world, seeds, flags.prompts, flags.delta, flags.runs, flags.resamples)
            tests = ("two-way t", "paired t", "flips")
            cells = [null[f"reject {t}"] for t in tests] + [real[f"reject {t}"] for t in tests]
            cells += [real[f"cover {t}"] for t in ("two-way t", "paired t", "bootstrap")]
            print(f"| {name} | {seeds} | " + " | ".join(f"{100 * c:.1f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
