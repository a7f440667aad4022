"""Tests and intervals for a contrast of two cells with 3 to 8 seeds: level, power and coverage on simulated
experiments, many at once. docs/statistics.md has the tables.

    python benchmarks/contrast_simulation.py [--runs 20000] [--prompts 200] [--family 5]

An answer to prompt p in the run of seed s in cell c succeeds with probability logistic(z),

    z = level + 1.5 a_p + 0.5 u_s + prompt_sd b_pc + seed_sd e_sc + h_gc + delta c,   all of a, u, b standard normal,

where u is shared by paired runs. In families, half of the variance of a and b is the family's. e is standard normal;
where runs "collapse" it is 2 for one run in five and -0.5 for the others. h is the effect of the alignment that a run
starts from: drawn anew (normal) where the claim is about further alignments, else fixed, of opposite sign in the two
cells, and zero on average. Without delta both cells have the same distribution, with new seeds and prompts in each
experiment: a test about further seeds and prompts may reject at a level in no greater share of them.

    B: experiments, S: seeds (runs), P: prompts, U: units, G: alignments
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from ptst.evaluation.secondary import bootstrap_interval
from ptst.evaluation.two_way import Margins, least_p, margins

SEEDS = (3, 5, 8)
LEVELS = (0.05, 0.01, 0.001)
ICC = 0.5  # the family's part of what varies over prompts
BATCH = 4_000_000  # outcomes at once
Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """How outcomes vary (module docstring). `alignment_sd`: SD of h; `uneven`: the seeds of the first alignment vary
    seven times as much as those of the last."""

    seed_sd: float
    prompt_sd: float
    level: float = 0.0
    collapse: tuple[float, float, float] | None = None
    """Share of the runs that collapse, e of these, e of the others."""
    alignment_sd: float = 0.0
    uneven: bool = False

    def true_effect(self, delta: float) -> float:
        """Expectation over seeds and prompts: the logistic of a normal z, by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        variance = 1.5**2 + 0.5**2 + self.prompt_sd**2 + (0.0 if self.collapse else self.seed_sd**2)
        z = self.level + variance**0.5 * nodes
        share, low, high = self.collapse or (0.0, 0.0, 0.0)
        shifts = {self.seed_sd * low: share, self.seed_sd * high: 1 - share}
        gaps = {s: special.expit(z + s) - special.expit(z + s + delta) for s in shifts}
        return float(sum(weight * (weights @ gaps[s]) for s, weight in shifts.items()) / weights.sum())


WORLDS = {
    "seeds vary": World(seed_sd=0.5, prompt_sd=0.0),
    "prompts vary": World(seed_sd=0.0, prompt_sd=1.0),
    "both vary": World(seed_sd=0.5, prompt_sd=1.0),
    "neither": World(seed_sd=0.0, prompt_sd=0.0),
    "rare successes": World(seed_sd=0.5, prompt_sd=1.0, level=-4.0),
    "runs collapse": World(seed_sd=0.8, prompt_sd=0.5, collapse=(0.2, 2.0, -0.5)),
}
WORST = {  # what `least_p` is for
    "one run in five": World(seed_sd=2.0, prompt_sd=0.5, collapse=(0.2, 1.0, 0.0)),
    "every other run": World(seed_sd=2.0, prompt_sd=0.5, collapse=(0.5, 1.0, 0.0)),
    "every other run, wholly": World(seed_sd=4.0, prompt_sd=0.5, collapse=(0.5, 1.0, 0.0)),
}
NESTED = {
    "alignments alike": World(seed_sd=0.5, prompt_sd=0.5),
    "alignments vary": World(seed_sd=0.5, prompt_sd=0.5, alignment_sd=0.5),
    "seeds of one vary more": World(seed_sd=0.5, prompt_sd=0.5, alignment_sd=0.5, uneven=True),
}


@dataclass(frozen=True)
class Design:
    """`seeds` of each of `alignments`; `prompts` in families of `family` (1: none). `fixed`: the claim is about these
    alignments."""

    seeds: int
    prompts: int = 200
    family: int = 1
    alignments: int = 1
    fixed: bool = True

    @property
    def groups(self) -> list[str]:
        return [str(g) for g in range(self.alignments) for _ in range(self.seeds)]


def differences_BSP(world: World, design: Design, experiments: int, delta: float, rng: np.random.Generator) -> Array:
    """Outcomes of the first cell minus those of the second."""
    d, B, S = design, experiments, design.seeds * design.alignments

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal((B, *shape), dtype=np.float32)

    def over_prompts() -> NDArray[np.float32]:
        if d.family == 1:
            return normal(1, d.prompts)
        of_family = np.repeat(normal(1, d.prompts // d.family), d.family, -1)
        return np.float32(ICC**0.5) * of_family + np.float32((1 - ICC) ** 0.5) * normal(1, d.prompts)

    spread_S1 = np.repeat(np.linspace(1.75, 0.25, d.alignments) if world.uneven else np.ones(d.alignments), d.seeds)
    fixed_S1 = np.repeat(np.linspace(1, -1, d.alignments) if d.alignments > 1 else np.zeros(1), d.seeds)[:, None]
    common = world.level + 1.5 * over_prompts() + 0.5 * normal(S, 1)

    def cell(shift: float, sign: int) -> NDArray[np.bool_]:
        e = normal(S, 1)
        if world.collapse:
            share, low, high = world.collapse
            e = np.where(rng.random((B, S, 1)) < share, low, high).astype(np.float32)
        h = sign * fixed_S1 if d.fixed else np.repeat(normal(d.alignments, 1), d.seeds, 1)
        seeds = world.seed_sd * spread_S1[:, None].astype(np.float32) * e + world.alignment_sd * h.astype(np.float32)
        z = common + world.prompt_sd * over_prompts() + seeds + shift
        return rng.random(z.shape, dtype=np.float32) < special.expit(z)

    return cell(0.0, 1).astype(np.float64) - cell(delta, -1)


def over_families(d_BSP: Array, family: int) -> Array:
    return d_BSP.reshape(*d_BSP.shape[:-1], -1, family).mean(-1)


def t(level: float, df: Array | float) -> Array:
    return stats.t.isf(level / 2, df)


def satterthwaite(m: Margins, level: float) -> Array:
    """One variance, its degrees of freedom from the margins as they came out (Satterthwaite 1946)."""
    v_S, v_U, v_R, (a, b) = m.runs, m.units, m.residual, m.df
    v = np.maximum.reduce([v_S + v_U - v_R, v_S, v_U, v_R])
    parts = v_S**2 / a + v_U**2 / b + v_R**2 / (a * b)
    return t(level, np.maximum(v**2 / np.maximum(parts, 1e-300), 1.0)) * v**0.5


def fewest(m: Margins, level: float) -> Array:
    """min(S, U) - 1 degrees of freedom."""
    return t(level, min(m.df)) * np.maximum.reduce([m.runs + m.units - m.residual, m.runs, m.units]) ** 0.5


def weighted(m: Margins, level: float) -> Array:
    """The margins' quantiles, weighted by their variances (Cochran and Cox 1957)."""
    units = np.maximum(m.units - m.residual, 0)
    total = np.maximum(m.runs + units, 1e-300)
    return (m.runs * t(level, m.df[0]) + units * t(level, m.df[1])) / total * np.maximum(total, m.residual) ** 0.5


def paired_t(m: Margins, level: float) -> Array:
    """Over seeds alone: these prompts are all there are."""
    return t(level, m.df[0]) * m.runs**0.5


TESTS: dict[str, Callable[[Margins, float], Array]] = {
    "two-way t": Margins.half_width,
    "Satterthwaite": satterthwaite,
    "min(S, U) - 1": fewest,
    "weighted t": weighted,
    "paired t": paired_t,
}


def batches(design: Design, experiments: int) -> Iterator[int]:
    size = max(BATCH // (design.seeds * design.alignments * design.prompts), 1)
    for start in range(0, experiments, size):
        yield min(size, experiments - start)


def simulate(
    world: World, design: Design, runs: int, delta: float = 0.0, over: str = "families", resamples: int = 0
) -> dict[str, dict[float, float]]:
    """By test: the share of `runs` experiments that it rejects at each of LEVELS, and under 0 the share of the 95 %
    intervals that cover the true effect. `over`: what is a unit, "families", "prompts", or "alignments" (families, and
    means of alignments in place of runs). `resamples`: of the bootstrap; without, it is left out."""
    rng, true = np.random.default_rng(design.seeds), world.true_effect(delta)
    counts: dict[str, dict[float, float]] = {name: dict.fromkeys((*LEVELS, 0), 0.0) for name in TESTS}
    covered = 0
    for size in batches(design, runs):
        x_BSU = differences_BSP(world, design, size, delta, rng)
        if over != "prompts" and design.family > 1:
            x_BSU = over_families(x_BSU, design.family)
        if over == "alignments":
            x_BSU = x_BSU.reshape(size, design.alignments, design.seeds, -1).mean(2)
        found = margins(x_BSU, design.groups if over != "alignments" and design.alignments > 1 else None)
        for name, test in TESTS.items():
            for level in LEVELS:
                counts[name][level] += float((np.abs(found.effect) > test(found, level)).sum()) / runs
            counts[name][0] += float((np.abs(found.effect - true) <= test(found, 0.05)).sum()) / runs
        for x_SU in x_BSU if resamples else ():
            low, high = bootstrap_interval(x_SU, resamples)
            covered += low <= true <= high
    return counts | ({"bootstrap": {0: covered / runs}} if resamples else {})


def at_bound(world: World, design: Design, runs: int) -> tuple[float, float]:
    """The smallest p that the design supports, and the share of experiments without effect that reach it."""
    rng, least, reached = np.random.default_rng(design.seeds), least_p(design.seeds), 0
    for size in batches(design, runs):
        x_BSU = over_families(differences_BSP(world, design, size, 0.0, rng), design.family)
        found = margins(x_BSU)
        reached += int((np.abs(found.effect) >= found.half_width(least)).sum())
    return least, reached / runs


def table(head: list[str], rows: Iterator[list[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|" + "---|" * len(head))
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def percent(found: dict[float, float]) -> str:
    """At the three levels."""
    return " / ".join(f"{100 * found[level]:.{digits}f}" for level, digits in zip(LEVELS, (1, 2, 2), strict=True))


def level_rows(runs: int, prompts: int, family: int) -> Iterator[list[str]]:
    for name, world in WORLDS.items():
        for seeds in SEEDS:
            plain = simulate(world, Design(seeds, prompts), runs)
            design = Design(seeds, prompts, family)
            families, blind = simulate(world, design, runs), simulate(world, design, runs, over="prompts")
            cells = [plain[t] for t in ("two-way t", "Satterthwaite", "weighted t", "min(S, U) - 1", "paired t")]
            cells += [families["two-way t"], families["Satterthwaite"], blind["two-way t"], blind["Satterthwaite"]]
            yield [name, str(seeds), *map(percent, cells)]


def power_rows(runs: int, prompts: int, family: int, delta: float, resamples: int) -> Iterator[list[str]]:
    for name, world in WORLDS.items():
        for seeds in SEEDS:
            design = Design(seeds, prompts, family)
            real = simulate(world, design, runs, delta)
            few = simulate(world, design, max(runs // 20, 1), delta, resamples=resamples)
            power = [percent(real[t]) for t in ("two-way t", "Satterthwaite", "weighted t", "min(S, U) - 1")]
            cover = [real[t][0] for t in ("two-way t", "Satterthwaite", "paired t")] + [few["bootstrap"][0]]
            points = f"{-100 * world.true_effect(delta):.0f}"
            yield [name, str(seeds), points, *power, *(f"{100 * c:.1f}" for c in cover)]


def nested_rows(runs: int, prompts: int, family: int) -> Iterator[list[str]]:
    for name, world in NESTED.items():
        for alignments, seeds in ((2, 2), (2, 3), (3, 2), (3, 3), (5, 1)):
            cells = []
            for fixed, over in ((True, "families"), (False, "families"), (False, "alignments")):
                design = Design(seeds, prompts, family, alignments, fixed)
                tested = over == "alignments" or seeds > 1
                cells.append(percent(simulate(world, design, runs, over=over)["two-way t"]) if tested else "")
            yield [name, f"{alignments} x {seeds}", *cells]


def bound_rows(runs: int, prompts: int, family: int) -> Iterator[list[str]]:
    for name, world in WORST.items():
        for seeds in (2, 3, 4, 5, 6, 8):
            (least, share), (_, wide) = (
                at_bound(world, design, runs) for design in (Design(seeds, prompts, family), Design(seeds, prompts))
            )
            yield [name, str(seeds), f"{100 * least:.2f}", f"{100 * share:.2f}", f"{100 * wide:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, help="experiments per row")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--family", type=int, default=5, help="prompts per family")
    parser.add_argument("--delta", type=float, default=1.2, help="effect in logits, for power and coverage")
    parser.add_argument(
        "--resamples", type=int, default=300, help="of the bootstrap, in a twentieth of the experiments"
    )
    flags = parser.parse_args()
    size = (flags.runs, flags.prompts, flags.family)
    others = ["Satterthwaite", "weighted t", "min(S, U) - 1"]
    families = ["families: two-way t", "families: Satterthwaite", "prompts: two-way t", "prompts: Satterthwaite"]
    table(["outcomes", "seeds", "two-way t", *others, "paired t", *families], level_rows(*size))
    cover = ["covers: two-way t", "Satterthwaite", "paired t", "bootstrap"]
    table(
        ["outcomes", "seeds", "points", "two-way t", *others, *cover], power_rows(*size, flags.delta, flags.resamples)
    )
    claims = ["these alignments", "these, of further ones", "further alignments"]
    table(["outcomes", "alignments x seeds", *claims], nested_rows(*size))
    table(["runs that collapse", "seeds", "least p", "reached, families", "reached, prompts"], bound_rows(*size))


if __name__ == "__main__":
    main()
