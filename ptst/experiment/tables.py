"""A summary as files: results.csv (a line for every figure), tables in Markdown, a heat map with matplotlib."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ptst.defense_names import NONE
from ptst.evaluation.tasks.requests import ASR
from ptst.evaluation.tasks.table import shown
from ptst.evaluation.tasks.task import Metric
from ptst.experiment.contrast_words import contrast_words
from ptst.experiment.plan import BASE, epoch_name
from ptst.experiment.summary import GAP, OVER_DECODINGS
from ptst.storage import write_atomically

_COLUMNS: tuple[str, ...] = ("train", "epochs", "test", "ptst", "task", "metric", "mean", "population_sd", "sample_sd")
_COLUMNS += ("low", "high", "seeds", "prompts", "judged", "unjudged")  # the last two over all runs


def to_csv(summary: dict[str, Any]) -> str:
    """One line for every cell, task and metric. Text that a spreadsheet would take for a formula has an apostrophe in
    front; numbers stay numbers."""
    text = io.StringIO()
    tuned = summary.get("tuned", {})
    defended = any(cell["defense"] != NONE for cell in summary["cells"])
    more = {"defense": defended, "weights": bool(tuned), "made_with": _is_mixed(summary)}
    columns = (*_COLUMNS, *(name for name, there in more.items() if there))
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for cell in summary["cells"]:
        cell = {**cell, "made_with": "; ".join(cell.get("made_with", ()))}
        cell["weights"] = tuned.get(cell["train"], {}).get("weights")  # of a model that was fine-tuned elsewhere
        for task, metrics in cell["tasks"].items():
            for metric, f in metrics.items():
                if task == GAP:
                    writer.writerow(_no_formulas({**cell, "task": metric, "metric": task, "mean": f}))
                    continue
                low, high = f.get("interval95") or ("", "")
                line = {**cell, **f, "task": task, "metric": metric, "low": low, "high": high, "seeds": len(f["runs"])}
                writer.writerow(_no_formulas(line))
    return text.getvalue()


def _no_formulas(line: dict[str, Any]) -> dict[str, Any]:
    return {k: no_formula(v) if isinstance(v, str) else v for k, v in line.items()}


def no_formula(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    quoted = f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return quoted.replace("\r", "\n")  # the csv module does not put a lone carriage return in quotes


def to_markdown(summary: dict[str, Any]) -> str:
    """A table for every metric: training templates in rows, test templates in columns; of each ladder, rungs in rows
    and models in columns. PTST cells are in bold."""
    metrics = [
        (task, metric)
        for task, metric in shown(summary["cells"][0]["tasks"], "grid")
        if any(metric.key in cell["tasks"].get(task, {}) for cell in summary["cells"])
    ]
    parts = [_table(summary, *each, matrix) for matrix in [_matrix(summary)] if matrix for each in metrics]
    for training, matrix in _ladders(summary).items():
        parts += [_table(summary, *each, matrix, f"Ladder of {training}: ") for each in metrics]
    over = "(for further families or prompts; of one seed for this run, else for further seeds, too)"
    decoded = any(_is_decoded(metrics) for cell in summary["cells"] for metrics in cell["tasks"].values())
    if decoded:
        over = "(for further decodings of this run, and further families or prompts)"
    parts.append(
        "Bold: PTST, trained without a safety prompt and tested with one. Rates: mean over "
        f"{OVER_DECODINGS if decoded else 'seeds'}, population SD after \u00b1, 95 % interval in brackets {over}. "
        "Rates are over the judged answers; where some are not, both numbers are given, over all runs."
    )
    parts += contrast_words(summary)
    runs = []
    for name, r in summary["runs"].items():
        counts = [r[key] for key in ("steps", "examples", "tokens", "trained_tokens")]
        cells = [*counts, ", ".join("-" if v is None else f"{v:.3f}" for v in r["validation_loss"].values())]
        runs.append(f"| {name} | {' | '.join('-' if cell is None else str(cell) for cell in cells)} |")
    if runs:
        head = "| run | steps | examples seen | their tokens | in the loss | validation loss before, after |\n"
        parts.append(head + "|---" * 6 + "|\n" + "\n".join(runs))
    if tuned := summary.get("tuned"):
        rows = [f"| {name} | {t['kind']} | {t['folder']} | {t['weights']} |" for name, t in tuned.items()]
        head = "| tuned elsewhere | kind | folder | fingerprint of its weights |\n"
        parts.append(head + "|---" * 4 + "|\n" + "\n".join(rows))
    if _is_mixed(summary):
        parts.append("The cells were not all made with the same versions and device:")
        lines = [f"| {name} | {test} | {'; '.join(cell['made_with'])} |" for name, test, cell in _cells(summary)]
        parts.append("\n".join(["| trained under | tested under | made with |", "|---" * 3 + "|", *lines]))
    return "\n\n".join(parts) + "\n"


def _is_decoded(metrics: dict[str, Any]) -> bool:
    return any(isinstance(f, dict) and "over" in f for f in metrics.values())


def _is_mixed(summary: dict[str, Any]) -> bool:
    return any("made_with" in cell for cell in summary["cells"])


def _cells(summary: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for cell in summary["cells"]:
        yield _name(summary, cell), cell["test"], cell


Matrix = dict[str, dict[str, dict[str, Any]]]  # cells by row and column


def _table(summary: dict[str, Any], task: str, metric: Metric, matrix: Matrix, ladder: str = "") -> str:
    """One metric of one task. `ladder`: how the heading of a ladder's table begins; its rows are rungs."""
    columns = next(iter(matrix.values()))
    corner = "tested under \\ trained under" if ladder else "trained under \\ tested under"
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in matrix.items():
        lines.append(f"| {name} | {' | '.join(_text(cell, task, metric.key) for cell in cells.values())} |")
    has_gap = task in summary["cells"][0]["tasks"].get(GAP, {})
    gap = " | harmful minus benign refusal, points" * (metric.key == "refusal" and has_gap)
    return f"**{ladder}{metric.heading}{gap} ({summary['sets'][task]})**\n\n" + "\n".join(lines)


def _matrix(summary: dict[str, Any]) -> Matrix:
    """The cells under the grid's test templates by the name of their model and by test template; no rungs."""
    matrix: Matrix = {}
    for cell in summary["cells"]:
        if cell["test"] not in summary.get("ladder", {}):
            matrix.setdefault(_name(summary, cell), {})[cell["test"]] = cell
    return matrix


def _ladders(summary: dict[str, Any]) -> dict[str, Matrix]:
    """By training template, the cells under its rungs by the rung's name and that of the model."""
    ladders: dict[str, Matrix] = {}
    for cell in summary["cells"]:
        if rung := summary.get("ladder", {}).get(cell["test"]):
            matrix = ladders.setdefault(rung["training"], {})
            matrix.setdefault(rung["rung"], {})[_name(summary, cell)] = cell
    return ladders


def _name(summary: dict[str, Any], cell: dict[str, Any]) -> str:
    """The name of a cell's model."""
    name = summary["base"] if cell["train"] == BASE else cell["train"]
    name += "" if cell["defense"] == NONE else f", {cell['defense']}"
    return name + ("" if cell["epochs"] is None else f", {epoch_name(cell['epochs'])}")


def _text(cell: dict[str, Any], task: str, metric: str) -> str:
    f = cell["tasks"].get(task, {}).get(metric)
    if f is None:
        return ""  # the distance from a training that is unknown, or what a recipe does not measure
    if f["mean"] is None:
        text = "nothing judged in some run"
    elif "interval95" not in f:
        text = f"{f['mean']:.3f}" + (f" ± {f['population_sd']:.3f}" if len(f["runs"]) > 1 else "")
    else:
        sd = f" ± {100 * f['population_sd']:.1f}" if len(f["runs"]) > 1 else ""
        ends = f["interval95"]
        text = f"{100 * f['mean']:.1f}{sd}" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")
        text += f" ({f['judged']} judged, {f['unjudged']} not)" if f["unjudged"] else ""
    gap = cell["tasks"].get(GAP, {}).get(task)
    if metric == "refusal" and gap is not None:
        text += f" \\| {100 * gap:+.0f}"
    return f"**{text}**" if cell["ptst"] else text


def heat_map(summary: dict[str, Any], task: str, path: Path, metric: str = ASR) -> bool:
    """Draw a safety task's `metric` as a matrix into a PNG, in one hue; False where matplotlib is not installed, and
    for a grid of rungs alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        return False
    heading = next(m.heading for _, m in shown([task], "grid") if m.key == metric)
    if not (matrix := _matrix(summary)):
        return False
    rows, columns = list(matrix), list(next(iter(matrix.values())))
    cells = [list(by_test.values()) for by_test in matrix.values()]
    values = [[100 * cell["tasks"][task][metric]["mean"] for cell in line] for line in cells]
    figure = Figure(figsize=(2.4 + 1.6 * len(columns), 1.8 + 0.8 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=20)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("tested under")
    axes.set_ylabel("trained under")
    axes.set_title(f"{heading}\n(with 95 % interval and judged answers; framed: PTST)", fontsize=10)
    for y, x in np.ndindex(len(rows), len(columns)):
        f, value = cells[y][x]["tasks"][task][metric], values[y][x]
        ends = f["interval95"]
        interval = f"\n[{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else ""
        text, color = f"{value:.0f}{interval}\nn = {f['judged']}", "white" if value > 60 else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        if cells[y][x]["ptst"]:
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, linewidth=3, edgecolor="#d55e00"))
    figure.colorbar(image)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(path, png.getvalue())
    return True
