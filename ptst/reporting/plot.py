"""Heat maps and charts as PNG and PDF, with matplotlib: for papers and slides, on white."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptst.packages import check_package
from ptst.progress import printable
from ptst.reporting.chart import COLORS, NOT_A_SERIES, Chart, Panel, Series
from ptst.reporting.heat import GOOD, HARM, STEPS, Heat
from ptst.storage import write_atomically

KINDS = ("png", "pdf")
_MAPS = {HARM: "Oranges", GOOD: "Blues"}  # else Greys
_MARKERS = "os^DX"
_GREY = "#6e7781"
_FULL = 0.6  # of matplotlib's scale of colours: black text is legible on all of it
PTST_FRAME = "#000000"


def check_matplotlib() -> None:
    """Raise UserError where matplotlib is not installed."""
    check_package("matplotlib", "figures as PNG and PDF need", "plot")


def write_heat(heat: Heat, folder: Path) -> list[Path]:
    """The heat map as PNG and PDF."""
    rows, columns = len(heat.rows), len(heat.columns)
    figure, axes = _figure(2.6 + 1.25 * columns, 1.5 + 0.62 * rows)
    steps = np.array([[np.nan if c.value is None else heat.step(c) for c in line] for line in heat.cells])
    axes.imshow(steps, cmap=_MAPS.get(heat.hue, "Greys"), vmin=0, vmax=STEPS / _FULL, aspect="auto")
    axes.set_xticks(range(columns), [_words(c) for c in heat.columns], rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(rows), [_words(r) for r in heat.rows], fontsize=8)
    axes.set_title(_words(f"{heat.title}, {heat.unit}\n({heat.set_name}; 95 % intervals; framed: PTST)"), fontsize=9)
    axes.tick_params(length=0)
    from matplotlib.patches import Rectangle

    for y, x in np.ndindex(rows, columns):
        cell = heat.cells[y][x]
        lines = [cell.text, cell.interval, f"n {cell.n}" if cell.n and cell.value is not None else ""]
        words = "\n".join(_words(line) for line in lines if line)
        axes.text(x, y, words, ha="center", va="center", fontsize=7)
        if cell.value is None:
            hatched = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#c9d1d9", linewidth=0)
            axes.add_patch(hatched)
        if cell.ptst:
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, lw=2, edgecolor=PTST_FRAME))
    return _save(figure, folder / heat.key)


def write_chart(chart: Chart, folder: Path) -> list[Path]:
    """The chart as PNG and PDF, its panels beside each other."""
    across = min(3, len(chart.panels))
    down = -(-len(chart.panels) // across)
    figure, _ = _figure(1.8 + 3.4 * across, 0.6 + 3.0 * down, axes=False)
    for number, panel in enumerate(chart.panels):
        axes = figure.add_subplot(down, across, number + 1)
        _draw(axes, chart, panel)
    figure.suptitle(_words(chart.title), fontsize=10, x=0.01, ha="left")
    _legend(figure, chart)
    return _save(figure, folder / chart.key)


def _draw(axes: Any, chart: Chart, panel: Panel) -> None:
    for series in panel.series:
        _series(axes, series)
    axes.set_xlim(*chart.x_range)
    axes.set_ylim(*chart.y_range)
    axes.set_xlabel(_words(chart.x_label), fontsize=8)
    axes.set_ylabel(_words(chart.y_label), fontsize=8)
    axes.set_title(_words(panel.title), fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="#d1d9e0", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _series(axes: Any, series: Series) -> None:
    color = _color(series)
    if series.line:
        style = "--" if series.dashed else "-"
        axes.plot([p.x for p in series.points], [p.y for p in series.points], style, color=color, linewidth=1.2)
    for p in series.points if series.dots else ():
        marker = series.color if series.line else p.marker
        for ends, name in ((p.x_ends, "xerr"), (p.y_ends, "yerr")):
            if ends:
                middle = p.x if name == "xerr" else p.y
                sizes: Mapping[str, Any] = {name: [[max(0.0, middle - ends[0])], [max(0.0, ends[1] - middle)]]}
                axes.errorbar(p.x, p.y, **sizes, color=color, alpha=0.5, linewidth=0.8)
        axes.plot(p.x, p.y, _MARKERS[marker % len(_MARKERS)], color=color, markersize=4.5, clip_on=False)
        if p.ringed:
            axes.plot(p.x, p.y, "o", markersize=10, markerfacecolor="none", markeredgecolor="black", clip_on=False)


def _legend(figure: Any, chart: Chart) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for s in chart.legend:
        style = ("--" if s.dashed else "-") if s.line else ""
        marker = _MARKERS[s.color % len(_MARKERS)] if s.line and s.dots else "" if s.line else "o"
        looks: dict[str, Any] = {"color": _color(s), "linestyle": style, "marker": marker, "markersize": 4}
        handles.append(Line2D([], [], label=_words(s.name), **looks))
    for number, words in enumerate(chart.markers):
        marker = _MARKERS[number % len(_MARKERS)]
        handles.append(
            Line2D(
                [], [], color=_GREY, linestyle="", marker=marker, markersize=4, label=_words(f"tested under {words}")
            )
        )
    if chart.rings:
        ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": "black"}
        handles.append(Line2D([], [], linestyle="", label="PTST", **ring))
    if handles:
        figure.legend(handles=handles, loc="outside right center", fontsize=7, frameon=False)


def _color(series: Series) -> str:
    return _GREY if series.color == NOT_A_SERIES else COLORS[series.color % len(COLORS)]


def _words(text: str) -> str:
    """Text as matplotlib shows it: no formula in it, and nothing that cannot be seen."""
    return printable(text).replace("$", r"\$")


def _figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot() if axes else None


def _save(figure: Any, stem: Path) -> list[Path]:
    paths: Sequence[Path] = [stem.with_name(f"{stem.name}.{kind}") for kind in KINDS]
    for path, kind in zip(paths, KINDS, strict=True):
        data = io.BytesIO()
        # Without a date, so that the same results are the same file.
        figure.savefig(data, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(path, data.getvalue())
    return list(paths)
