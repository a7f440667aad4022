"""What was measured of a run, read from the folders of its evaluations: rates with counts and intervals, no answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.evaluate import EvalRecord
from ptst.evaluation.rates import Rate, RepeatedRate
from ptst.evaluation.tasks.table import shown
from ptst.exporting.data_names import data_name
from ptst.fingerprints import Fingerprint
from ptst.open import run_folder
from ptst.progress import say
from ptst.records import FILE, find_record, read_json


@dataclass(frozen=True)
class Row:
    """One figure of an evaluation in words: of the base model, and of the fine-tuned one. "" where it is missing."""

    label: str
    data: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Measured:
    """One finished evaluation. `judge`: who classified answers; `family`: how its prompts wrap a question."""

    template: str
    family: str
    judge: str
    finished_at: float
    rows: tuple[Row, ...]


def find_results(checkpoint: Path, weights: Fingerprint) -> tuple[Measured, ...]:
    """The finished evaluations in a run's folder that measured just these weights, the earliest first. Of several under
    the same template, the last. What cannot be read is reported and left out."""
    found: dict[tuple[str, str, tuple[str, ...]], Measured] = {}
    for path in sorted((run_folder(checkpoint) / "eval").glob(f"*/{FILE}")):
        try:
            record = find_record(path.parent, EvalRecord)
            if record is None or record.status != "finished" or not weights.matches(record.run_weights):
                continue
            measured = _measured(record, read_json(path.parent / "results.json"))
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            say(f"warning: the evaluation in {path.parent} cannot be read and is left out of the card ({error})")
            continue
        key = (measured.template, measured.family, tuple(row.label + row.data for row in measured.rows))
        if key not in found or found[key].finished_at <= measured.finished_at:
            found[key] = measured
    return tuple(sorted(found.values(), key=lambda m: m.finished_at))


def _measured(record: EvalRecord, values: Mapping[str, Any]) -> Measured:
    results = values["results"]
    tuned, base = results.get("fine-tuned", {}), results.get("untouched", {})
    rows = []
    for key, metric in shown([*tuned], "eval"):
        if figure := _figure(tuned[key], metric.key):
            label = metric.label if metric.unit == "%" else metric.heading
            data = data_name(record.data[key].name) if key in record.data else ""
            rows.append(Row(label, data, _figure(base.get(key, {}), metric.key), figure))
    family, judge = record.family.name, str(values["judge"]["name"])
    return Measured(record.template.name, family, judge, record.finished_at or 0.0, tuple(rows))


def _figure(result: Mapping[str, Any], metric: str) -> str:
    """`42 % [33, 52] (42/100)`: a rate in percent, its 95 % Wilson interval, its count; or a mean."""
    value = result.get(metric)
    if isinstance(value, Mapping):
        found = tuple(Rate(each["successes"], each["n"]) for each in value.get("decodings", (value,)))
        rate = found[0] if len(found) == 1 else RepeatedRate(found)
        return str(rate) if all(each.n for each in found) else "none judged"
    if isinstance(value, (int, float)):
        spread = result.get(f"{metric}_sd")
        return f"{value:.3f}" + (f" \u00b1 {spread:.4f}" if spread is not None else "")
    return ""
