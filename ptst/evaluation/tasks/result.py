"""What a task measures, once or over several decodings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptst.evaluation.rates import Rate, RepeatedRate


@dataclass(frozen=True)
class TaskResult:
    """Rates and values by name, and one row per answer (for the run folder, never for the report). `data`: which set
    was asked, where a task has several."""

    task: str
    rates: Mapping[str, Rate | RepeatedRate] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = field(default_factory=list)
    data: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**{k: r.to_json() for k, r in self.rates.items()}, **self.values}


def over_decodings(results: Mapping[int, TaskResult]) -> TaskResult:
    """Results of the same task by the seed of their decoding as one: rates as means with their spread, values as means
    beside `<name>_sd` (population, as the paper) and `<name>_sample_sd`, rows with their seed."""
    each = list(results.values())
    first = each[0]
    rates = {name: RepeatedRate(tuple(r.rates[name] for r in each)) for name in first.rates}
    values: dict[str, float] = {}
    for name in first.values:
        found = [r.values[name] for r in each]
        values |= {name: statistics.fmean(found), f"{name}_sd": statistics.pstdev(found)}
        values[f"{name}_sample_sd"] = statistics.stdev(found)
    rows = [{"seed": seed, **row} for seed, r in results.items() for row in r.rows]
    return TaskResult(first.task, rates, values, rows, first.data)
