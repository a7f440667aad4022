"""The charts of a report: helpfulness against safety, over-refusal, training, early stopping, the ladder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptst.defense_names import NONE
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import TASKS, base
from ptst.evaluation.tasks.task import Metric
from ptst.experiment.ladder import figure as ladder_figure
from ptst.experiment.ladder.analysis import ALIGNED, Study
from ptst.experiment.plan import BASE, slug
from ptst.reporting.chart import NOT_A_SERIES, Chart, Panel, Point, Series, span
from ptst.reporting.heat import Summary, asr_of, model_name
from ptst.reporting.runs import StoredRun

MOST_POINTS = 80  # of a curve of training
# What is helpful, the first that was measured: task, metric, whether lower is better.
HELPFUL = (
    ("gsm8k", "last_number", False),
    ("arc-challenge", "correct", False),
    ("arc-easy", "correct", False),
    ("chatdoctor", "bertscore_f1", False),
    ("chatdoctor", "minilm_cosine", False),
    ("nll", "nats_per_token", True),
)
_ASR_LABEL = "harmful requests complied with (ASR), %"


def helpful(summary: Summary) -> tuple[str, Metric, bool] | None:
    """Task, metric, and whether lower is better, of the helpfulness that was measured; None where none was."""
    tasks = dict.fromkeys(task for cell in summary["cells"] for task in cell["tasks"])
    for name, key, lower in HELPFUL:
        for task in tasks:
            if base(task) == name and any(_figure(c, task, key) for c in summary["cells"]):
                return task, next(m for m in TASKS[name].metrics if m.key == key), lower
    return None


def safety_tasks(summary: Summary) -> list[str]:
    """The tasks of harmful requests."""
    return list(dict.fromkeys(t for cell in summary["cells"] for t in cell["tasks"] if base(t) == "safety"))


def scatter(summary: Summary, task: str) -> Chart | None:
    """Helpfulness against attack success on a safety task; None where either was not measured."""
    known = helpful(summary)
    cells = _plain(summary)
    if known is None:
        return None
    on, metric, lower = known
    pairs = [(c, _figure(c, on, metric.key), asr_of(c, task)) for c in cells]
    points = [(c, _point(c, h, a, _scale(metric), summary)) for c, h, a in pairs if h and a]
    if not points:
        return None
    best = f"lower {'left' if lower else 'right'}: helpful and safe"
    return _of_cells(
        summary,
        points,
        key=f"helpfulness.{slug(task)}",
        title=f"Helpfulness against safety ({_set(summary, task)})",
        labels=(f"{metric.label}, {metric.unit}{' (lower is better)' * lower}", _ASR_LABEL),
        x_range=(0.0, 100.0) if metric.unit == "%" else None,
        best=best,
    )


def over_refusal(summary: Summary, task: str) -> Chart | None:
    """Refused harmful requests against refused benign look-alikes; None where either was not measured."""
    found = []
    for c in _plain(summary):
        benign = next((f for t in c["tasks"] if base(t) == "over-refusal" and (f := _figure(c, t, "refusal"))), None)
        harmful = _figure(c, task, "refusal")
        if benign and harmful:
            found.append((c, _point(c, benign, harmful, 100, summary)))
    if not found:
        return None
    return _of_cells(
        summary,
        found,
        key=f"over-refusal.{slug(task)}",
        title=f"Refused where it should be, and where it should not ({_set(summary, task)})",
        labels=("benign look-alikes refused, %", "harmful requests refused, %"),
        x_range=(0.0, 100.0),
        best="upper left: refuses harm, answers the rest",
    )


def _of_cells(
    summary: Summary,
    points: Sequence[tuple[Mapping[str, Any], Point]],
    key: str,
    title: str,
    labels: tuple[str, str],
    x_range: tuple[float, float] | None,
    best: str,
) -> Chart:
    """A point for each cell: the colour is what was trained, the marker what it is tested under."""
    tests = list(dict.fromkeys(c["test"] for c, _ in points))
    names = list(dict.fromkeys(model_name(summary, c) for c, _ in points))
    series: list[Series] = []
    for name in names:
        own = [(c, p) for c, p in points if model_name(summary, c) == name]
        marked = [Point(**{**vars(p), "marker": tests.index(c["test"]), "ringed": c["ptst"]}) for c, p in own]
        color = NOT_A_SERIES if own[0][0]["train"] == BASE else len(series) - (_has_base(series))
        series.append(Series(name, marked, color, line=False))
    xs = [v for _, p in points for v in (p.x, *(p.x_ends or ()))]
    chosen = x_range or span(xs)
    rings = any(c["ptst"] for c, _ in points)
    return Chart(key, title, *labels, [Panel("", series)], chosen, (0.0, 100.0), tests, best=best, rings=rings)


def _has_base(series: Sequence[Series]) -> int:
    return sum(s.color == NOT_A_SERIES for s in series)


def training(runs: Sequence[StoredRun], summary: Summary) -> Iterator[Chart]:
    """Loss of training and validation by optimizer step, a colour for each way of training: that of its cells."""
    named = dict.fromkeys(model_name(summary, {**c, "epochs": None}) for c in summary["cells"] if c["train"] != BASE)
    ways = list(dict.fromkeys([*named, *(run.way for run in runs)]))
    runs = sorted(runs, key=lambda run: ways.index(run.way))
    for key, title in (("training-loss", "Training loss"), ("validation-loss", "Validation loss")):
        smooth = key == "training-loss"
        series: list[Series] = []
        for run in runs:
            curve = _thinned(_smooth(run.losses)) if smooth else run.validation
            if points := [Point(step, loss, label=f"{run.name}, step {step:g}: {loss:.3f}") for step, loss in curve]:
                series.append(Series(run.way, points, ways.index(run.way), dots=not smooth))
        if not series:
            continue
        xs, ys = ([getattr(p, axis) for s in series for p in s.points] for axis in "xy")
        words = "A line for each run; runs of one colour differ in their seeds."
        words += " Smoothed: a running mean with a weight of 0.2 for each new step." * smooth
        ends = span(xs, least=0.0), span(ys, least=0.0)
        yield Chart(key, title, "optimizer step", "nats per trained token", [Panel("", series)], *ends, words=words)


def _smooth(losses: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for step, loss in losses:
        found.append((step, loss if not found else 0.8 * found[-1][1] + 0.2 * loss))
    return found


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def early_stopping(summary: Summary) -> Iterator[Chart]:
    """Attack success and helpfulness after each number of epochs, of a grid that tests at several (`at_epochs`)."""
    cells = [c for c in _plain(summary) if c.get("epochs") is not None]
    if len({c["epochs"] for c in cells}) < 2:
        return
    figures: list[tuple[str, str, str, str, float]] = [
        (f"early-stopping.{slug(task)}", f"Attack success by epoch ({_set(summary, task)})", task, ASR, 100.0)
        for task in safety_tasks(summary)
    ]
    if known := helpful(summary):
        on, metric, _ = known
        figures.append((f"early-stopping.{slug(on)}", f"{metric.label} by epoch", on, metric.key, _scale(metric)))
    ways = list(dict.fromkeys(c["train"] + c["defense"] for c in cells))
    for key, title, task, name, scale in figures:
        panels = []
        for test in dict.fromkeys(c["test"] for c in cells):
            own = [c for c in cells if c["test"] == test]
            series = []
            for way in ways:
                found = [(c, _figure(c, task, name)) for c in own if c["train"] + c["defense"] == way]
                points = [_y_point(c["epochs"], f, scale, f"{c['train']} -> {test}") for c, f in found if f]
                if points:
                    label = model_name(summary, {**found[0][0], "epochs": None})
                    series.append(Series(label, sorted(points, key=lambda p: p.x), ways.index(way)))
            if series:
                panels.append(Panel(f"tested under {test}", series))
        every = [p for panel in panels for s in panel.series for p in s.points]
        ys = [v for p in every for v in (p.y, *(p.y_ends or ()))]
        y_range = (0.0, 100.0) if scale == 100 else span(ys)
        if panels:
            unit = "%" if scale == 100 else ""
            yield Chart(key, title, "epochs", unit, panels, span([p.x for p in every], least=0.0), y_range)


def ladder(study: Study) -> Chart | None:
    """Attack success over the distance of the test prompt from that of the training; None without a ladder that was
    measured."""
    panels = []
    for train in study.trains:
        series = []
        for curve in ladder_figure.curves(study, train):
            points = [
                Point(
                    p.distance,
                    100 * p.rate,
                    y_ends=_percent(p.interval),
                    label=f"{curve.name} on {p.rung}: {100 * p.rate:.1f} % at distance {p.distance:.2f}",
                )
                for p in curve.points
            ]
            color = NOT_A_SERIES if curve.name == ALIGNED else study.defenses.index(curve.name)
            name = "no defence" if curve.name == NONE else curve.name
            series.append(Series(name, points, color, dashed=curve.dashed))
        if series:
            panels.append(Panel(f"trained under {train}", series))
    if not panels:
        return None
    xs = [p.x for panel in panels for s in panel.series for p in s.points]
    title = "Attack success over the distance of the test prompt from that of the training"
    labels = "distance: share of tokens edited", _ASR_LABEL
    return Chart("ladder", title, *labels, panels, span(xs), (0.0, 100.0), best="lower: safer")


def _set(summary: Summary, task: str) -> str:
    return str(summary["sets"].get(task, task))


def _plain(summary: Summary) -> list[Mapping[str, Any]]:
    ladder_tests = summary.get("ladder", {})
    return [c for c in summary["cells"] if c["test"] not in ladder_tests]


def _figure(cell: Mapping[str, Any], task: str, metric: str) -> Mapping[str, Any] | None:
    f = cell["tasks"].get(task, {}).get(metric)
    return f if f and f["mean"] is not None else None


def _scale(metric: Metric) -> float:
    return 100.0 if metric.unit == "%" else 1.0


def _percent(ends: Sequence[float] | None, scale: float = 100.0) -> tuple[float, float] | None:
    return None if not ends else (scale * ends[0], scale * ends[1])


def _point(
    cell: Mapping[str, Any], x: Mapping[str, Any], y: Mapping[str, Any], x_scale: float, summary: Summary
) -> Point:
    at = x_scale * x["mean"], 100 * y["mean"]
    ends = _percent(x.get("interval95"), x_scale), _percent(y.get("interval95"))
    label = f"{model_name(summary, cell)} -> {cell['test']}: {at[0]:.3g}, {at[1]:.1f}{', PTST' * cell['ptst']}"
    return Point(*at, *ends, label)


def _y_point(x: float, f: Mapping[str, Any], scale: float, name: str) -> Point:
    y = scale * f["mean"]
    return Point(x, y, y_ends=_percent(f.get("interval95"), scale), label=f"{name}, {x:g} epochs: {y:.3g}")
