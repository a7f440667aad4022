"""The contrasts of a summary in words and as a table, for its Markdown."""

from typing import Any

from ptst.defense_names import NONE
from ptst.evaluation.two_way import p_text
from ptst.experiment.plan import epoch_name

HEADINGS = {"refusal": "refused", "attack-success": "attack success rate", "incoherent": "incoherent"}


def contrast_words(summary: dict[str, Any]) -> list[str]:
    """The contrast that was named beforehand, the others, and the tables against the aligned model."""
    contrast = summary["contrast"]
    parts = [f"{'Named beforehand: ' if contrast['named'] else ''}{contrast['sentence']}"]
    parts += [f"Besides, {' minus '.join(c['cells'])}: {difference(c)}." for c in summary["others"].values()]
    return [*parts, *_defended(summary), *_kept(summary)]


def _defended(summary: dict[str, Any]) -> list[str]:
    """What each defence changes, in a line each ([] without defences)."""
    lines = [f"- {' minus '.join(c['cells'])}: {difference(c)}" for c in summary["defended"].values()]
    head = "Attack success rate with a defence minus that without one:\n\n"
    return [head + "\n".join(lines)] if lines else []


def difference(c: dict[str, Any]) -> str:
    """`first - second = effect` in % and points, interval, p."""
    if c["effect"] is None:
        return c["sentence"]
    low, high = c["test"]["interval"]
    within = "" if c["mcnemar"] is None else ", within one seed"
    shares = f"{100 * c['first']:.1f} % - {100 * c['second']:.1f} % = {100 * c['effect']:+.1f} points"
    p = p_text(c["p_holm"], c["p_holm_bounded"])
    return f"{shares} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}; {p} after Holm{within})"


def _kept(summary: dict[str, Any]) -> list[str]:
    """A table for every safety task ([] where no model was fine-tuned)."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for cell in summary["kept"]["cells"]:
        by_task.setdefault(cell["task"], []).append(cell)
    parts = []
    for task, cells in by_task.items():
        head = f"**Harmful requests, points more than the {summary['base']} model ({summary['sets'][task]})**\n\n"
        lines = [f"| trained under | tested under | {' | '.join(HEADINGS.values())} |", "|---" * 5 + "|"]
        for cell in cells:
            measures = " | ".join(against(cell["measures"][metric]) for metric in HEADINGS)
            lines.append(f"| {model_of(cell)} | {cell['test']} | {measures} |")
        parts.append(head + "\n".join(lines))
    if parts:
        parts.append(legend(100 * summary["kept"]["margin"]))
    return parts


def legend(margin: float) -> str:
    """What the table against the aligned model means."""
    return (
        f"95 % intervals in brackets, as in the contrasts. Kept: the interval excludes a loss of {margin:g} points or "
        "more (fewer refusals, more attack successes, more incoherent answers); the margin was set beforehand. Lost: "
        "not kept, and the interval excludes that nothing was lost. Else undecided. With one seed this is said of that "
        "run alone. The verdicts are not adjusted for their number."
    )


def model_of(cell: dict[str, Any]) -> str:
    """The name of a cell's trained model."""
    name = cell["train"] + ("" if cell["defense"] == NONE else f", {cell['defense']}")
    return name + ("" if cell["epochs"] is None else f", {epoch_name(cell['epochs'])}")


def against(c: dict[str, Any]) -> str:
    """`+12.0 [+3.0, +21.0] lost`: points more than the aligned model, and the verdict."""
    if c["effect"] is None:
        return c["sentence"]
    low, high = c["test"]["interval"]
    return f"{100 * c['effect']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {c['verdict']}"
