"""The figures of results.json as a long table: a line for every model, test template, task and metric.

Evaluations get results.parquet and results.csv, grids results.parquet next to the results.csv that they have; the
columns of both are those of the grid's, with the set and the judge.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptst.evaluation.stored_answers import BASE
from ptst.evaluation.table_files import Column, write_table
from ptst.records import read_json, record_kind

NAME = "results"
GAP = "harmful_minus_benign_refusal"
COLUMNS = (
    Column("train", "text", "training template, untouched (the base model), or the name of a model tuned elsewhere"),
    Column("defense", "text", "the defence of a grid's run; none without one"),
    Column("epochs", "number", "epochs after which a grid tests a run; absent: at its end"),
    Column("test", "text", "test template"),
    Column("ptst", "yes or no", "trained without a safety prompt, tested with one"),
    Column("task", "text", "task, with its set where one was named"),
    Column("data", "text", "name of the set of prompts"),
    Column("metric", "text", "the figure, as in results.json"),
    Column("mean", "number", "the rate (0 to 1) or value; over seeds, their mean"),
    Column("population_sd", "number", "standard deviation over seeds, as in the paper"),
    Column("sample_sd", "number", "standard deviation over seeds, of the sample"),
    Column("low", "number", "lower end of the 95 % interval"),
    Column("high", "number", "upper end of the 95 % interval"),
    Column("seeds", "whole number", "training seeds of a grid, decodings of an evaluation"),
    Column("prompts", "whole number", "prompts in the rate"),
    Column("judged", "whole number", "answers in the rate, over all seeds"),
    Column("unjudged", "whole number", "answers that no judge classified, over all seeds"),
    Column("judge", "text", "the judge, where the task has one"),
)


def write_long_results(folder: Path) -> list[Path]:
    """Write the table of a finished evaluation or grid; returns its files. Raises UserError for damaged files."""
    results = read_json(folder / "results.json")
    if record_kind(folder) == "grid":
        return write_table(folder, NAME, COLUMNS, _grid(results), formats=("parquet",))
    record = read_json(folder / "run.json")
    return write_table(folder, NAME, COLUMNS, _evaluation(results, record))


def _evaluation(results: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    data = record.get("data") or {}
    for model, by_task in results["results"].items():
        tuned = results.get("train_template") or results.get("adapter") or model
        line = {"train": model if model == BASE else tuned, "test": results["test_template"]}
        line["ptst"] = bool(results["ptst"]) and model != BASE
        for task, figures in by_task.items():
            judge = results["judge"]["name"] if "unjudged" in figures else None
            line |= {"task": task, "data": (data.get(task) or {}).get("name"), "judge": judge}
            for metric, value in figures.items():
                if not metric.endswith(("_sd", "_sample_sd")):
                    found = _rate(value) if isinstance(value, Mapping) else _value(metric, figures)
                    yield {**line, "metric": metric, **found}


def _rate(rate: Mapping[str, Any]) -> dict[str, Any]:
    each = rate.get("decodings") or [rate]
    low, high = rate.get("wilson95") or (None, None)
    found = {"mean": rate["rate"], "population_sd": rate.get("sd"), "sample_sd": rate.get("sample_sd")}
    return {**found, "low": low, "high": high, "seeds": len(each), "judged": sum(one["n"] for one in each)}


def _value(metric: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    spread = {"population_sd": figures.get(f"{metric}_sd"), "sample_sd": figures.get(f"{metric}_sample_sd")}
    return {"mean": figures[metric], **spread}


def _grid(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    judge = ((results.get("settings") or {}).get("eval") or {}).get("judge")
    for cell in results["cells"]:
        line = {key: cell.get(key) for key in ("train", "defense", "epochs", "test", "ptst")}
        for task, metrics in cell["tasks"].items():
            if task == GAP:
                yield from ({**line, "task": of, "metric": GAP, "mean": value} for of, value in metrics.items())
                continue
            own = {**line, "task": task, "data": results["sets"].get(task)}
            own["judge"] = judge if "refusal" in metrics or "safe:refusal" in metrics else None
            for metric, f in metrics.items():
                low, high = f.get("interval95") or (None, None)
                names = ("mean", "population_sd", "sample_sd", "prompts", "judged", "unjudged")
                found = {name: f.get(name) for name in names}
                yield {**own, "metric": metric, **found, "low": low, "high": high, "seeds": len(f["runs"])}
